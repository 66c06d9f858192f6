"""Paged attention and its cache against dense float64, on the CPU; needs PyTorch, and Triton for its interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from lltm_ray.errors import CacheFullError, ConfigError
from lltm_ray.kernels.paged_attention import paged_attention, part_tokens
from lltm_ray.kernels.paged_cache import CacheShape, PagedBatch, PagedCache

pytestmark = pytest.mark.torch
SHAPE = CacheShape(n_layers=2, n_kv_heads=2, head_dim=8, n_blocks=40, block_size=4)


def filled(lengths, dtype="float64", shape=SHAPE):
    """A cache with sequences of these lengths, and the keys and values that were written, by sequence and layer."""
    import torch

    cache = PagedCache(shape, dtype=getattr(torch, dtype))
    cache.keys.fill_(float("nan"))  # what lies behind a sequence must not matter
    cache.values.fill_(float("nan"))
    written = {}
    for length in lengths:
        sequence = cache.tables.open()
        cache.reserve(sequence, length)
        slots = torch.from_numpy(cache.slots(sequence, length))
        for layer in range(shape.n_layers):
            pair = torch.randn(2, length, shape.n_kv_heads, shape.head_dim, dtype=torch.float64).to(cache.keys.dtype)
            cache.write(layer, slots, *pair)
            written[sequence, layer] = pair
        cache.tables.advance(sequence, [sequence * 1000 + at for at in range(length)])
    return cache, written


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("heads", [2, 6])
def test_decoding_from_blocks_is_attention_over_what_was_written(dtype, heads):
    import torch

    torch.manual_seed(1)
    cache, written = filled([5, 0, 1, 17], dtype)
    query = torch.randn(4, heads, 8, dtype=torch.float64).to(cache.keys.dtype)
    for layer in (0, 1):
        found = paged_attention(query, cache.keys[layer], cache.values[layer], cache.batch(range(4)))
        assert found.dtype == query.dtype
        assert not found[1].any()
        for sequence in (0, 2, 3):
            keys, values = (
                each.double().repeat_interleave(heads // 2, 1).transpose(0, 1) for each in written[sequence, layer]
            )
            weights = (query[sequence].double()[:, None] @ keys.mT / 8**0.5).softmax(-1)
            wanted = (weights @ values)[:, 0]
            limit = {"float64": 1e-12, "float32": 2e-6, "bfloat16": 2e-2}[dtype]
            assert (found[sequence].double() - wanted).abs().max() < limit


def test_blocks_read_back_what_was_written_also_from_a_fork():
    import torch

    cache, written = filled([10])
    fork = cache.tables.fork(0)
    cache.reserve(fork, 1)
    new = torch.ones(2, 1, 2, 8, dtype=torch.float64)
    for layer in (0, 1):
        cache.write(layer, torch.from_numpy(cache.slots(fork, 1)), *new)
    cache.tables.advance(fork, [7])
    for layer in (0, 1):
        for sequence, length in ((0, 10), (fork, 10)):
            found = cache.read(layer, cache.block_ids(sequence, length), length)
            assert all(torch.equal(one, two.transpose(0, 1)) for one, two in zip(found, written[0, layer], strict=True))
        assert (cache.read(layer, cache.block_ids(fork, 11), 11)[0][:, 10] == 1).all()


def test_a_cache_is_bounded_and_says_so():
    cache, _ = filled([100])
    assert cache.nbytes == 2 * 2 * 40 * 2 * 4 * 8 * 8 == 8 * SHAPE.elements
    before = cache.tables.free_blocks
    with pytest.raises(CacheFullError, match="free a sequence or make the cache larger"):
        cache.reserve(0, 100)
    assert cache.tables.free_blocks == before
    with pytest.raises(ConfigError, match="call reserve first"):
        cache.slots(0, 5)
    with pytest.raises(ConfigError, match="n_layers"):
        CacheShape(n_layers=0, n_kv_heads=2, head_dim=8, n_blocks=40)


def test_the_batch_counts_tokens_that_are_written_but_not_told():
    cache, _ = filled([5, 8])
    cache.reserve(1, 3)
    batch = cache.batch([1, 0], [3, 0])
    assert (batch.lengths.tolist(), batch.longest, batch.total) == ([11, 5], 11, 16)
    assert batch.tables.shape == (2, 3)
    assert cache.batch([]).longest == 0


def test_what_does_not_fit_is_refused_by_name():
    import torch

    cache, _ = filled([5, 3], "float32")
    query, batch = torch.randn(2, 4, 8), cache.batch([0, 1])
    keys, values = cache.keys[0], cache.values[0]
    far = PagedBatch(tables=batch.tables, lengths=batch.lengths, longest=99, total=99)
    wrong = [
        ("query=", (query[0], keys, values, batch)),
        ("query=", (query[:, :3], keys, values, batch)),
        ("query=", (query.double(), keys, values, batch)),
        ("keys=", (query[..., :4], keys, values, batch)),
        ("keys=", (query, keys, values[:3], batch)),
        ("batch=", (query[:1], keys, values, batch)),
        ("batch.longest=", (query, keys, values, far)),
    ]
    for name, given in wrong:
        with pytest.raises(ConfigError, match=name):
            paged_attention(*given)
    with pytest.raises(ConfigError, match="backend="):
        paged_attention(query, keys, values, batch, backend="magic")
    with pytest.raises(ConfigError, match="for the Triton kernel"):
        paged_attention(query.double(), keys.double(), values.double(), batch, backend="triton")
    assert paged_attention(query[:0], keys, values, cache.batch([])).shape == (0, 4, 8)
    assert paged_attention(query[..., :0], keys[..., :0], values[..., :0], batch).shape == (2, 4, 0)


def test_parts_grow_with_the_work_and_stay_within_bounds():
    def part(lengths, kv_heads=8, processors=132):
        return part_tokens(SimpleNamespace(longest=max(lengths), total=sum(lengths)), kv_heads, processors)

    assert part([100]) == 256
    assert part([32_768]) == 512  # 64 parts of 8 heads: about one program for each place
    assert part([2048] * 512) >= 2048
    assert all(part([length]) % 64 == 0 for length in (1, 1000, 131_072, 10**6))
    assert 10**6 / part([10**6], 1, 10_000) <= 256


_INTERPRETED = """
import torch
import triton.language as tl
from lltm_ray.kernels import _paged_triton
from lltm_ray.kernels.paged_attention import paged_attention
from lltm_ray.kernels.paged_cache import CacheShape, PagedCache
torch.manual_seed(0)
# NumPy 2.4 makes no number of an array of one, on which the interpreter's own range() relies.
number = lambda each: int(each.handle.data.item()) if isinstance(each, tl.tensor) else each
_paged_triton.range = lambda *ends: range(*map(number, ends))
for heads, kv_heads, size, block, lengths in (
    (4, 4, 64, 16, [1, 17, 0, 130]),
    (8, 2, 80, 8, [700, 3, 0, 257]),
    (7, 1, 128, 16, [300, 255, 256, 1]),
    (3, 3, 20, 3, [513, 64]),
):
    for dtype, limit in ((torch.float32, 2e-6), (torch.float16, 2e-3)):
        shape = CacheShape(n_layers=1, n_kv_heads=kv_heads, head_dim=size, n_blocks=500, block_size=block)
        cache = PagedCache(shape, dtype=dtype)
        for length in lengths:
            sequence = cache.tables.open()
            cache.reserve(sequence, length)
            pair = torch.randn(2, length, kv_heads, size)
            cache.write(0, torch.from_numpy(cache.slots(sequence, length)), *pair)
            cache.tables.advance(sequence, range(length), shareable=False)
        query, pools = torch.randn(len(lengths), heads, size).to(dtype), (cache.keys[0], cache.values[0])
        batch = cache.batch(range(len(lengths)))
        found = paged_attention(query, *pools, batch, backend="triton")
        wanted = paged_attention(query.double(), *(pool.double() for pool in pools), batch, backend="torch")
        error = (found.double() - wanted).abs().max().item()
        assert error < limit, (heads, kv_heads, size, dtype, error)
        print("equal")
"""


def test_the_triton_kernel_gives_the_same_when_it_is_interpreted():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", _INTERPRETED]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.stdout.split() == ["equal"] * 8, done.stderr[-2000:]


def test_a_torch_scorer_finds_what_numpy_finds():
    import numpy as np

    from lltm_ray.kernels.similarity import TorchScorer
    from lltm_ray.knowledge.pairs import similar_pairs
    from lltm_ray.knowledge.search import VectorIndex

    random = np.random.default_rng(0)
    scorer, vectors = TorchScorer("cpu"), random.normal(size=(200, 8)).astype(np.float32)
    indexes = [VectorIndex("m"), VectorIndex("m", scorer=scorer)]
    for part in (vectors[:150], vectors[150:]):  # the second time the device's copy is out of date
        for index in indexes:
            index.add([str(len(index) + number) for number in range(len(part))], part)
        one, two = ([[hit.index for hit in hits] for hits in index.search_all(vectors[:9], 5)] for index in indexes)
        assert one == two
    one, two = similar_pairs(vectors, 0.8), similar_pairs(vectors, 0.8, scorer=scorer)
    pairs = [dict(zip(zip(each.first, each.second, strict=True), each.scores, strict=True)) for each in (one, two)]
    assert len(one) > 10
    assert pairs[0] == pytest.approx(pairs[1], abs=1e-5)
    for device in ("abacus", "cuda:999"):
        with pytest.raises(ConfigError, match="device"):
            TorchScorer(device)


def test_a_torch_scorer_takes_vectors_of_any_memory():
    import numpy as np

    from lltm_ray.kernels.similarity import TorchScorer

    scorer = TorchScorer("cpu")
    for scale in (1, -1):  # what lies at the same place later is not taken for the first
        raw = (scale * np.eye(4, dtype=np.float32)).tobytes()
        vectors = np.frombuffer(raw, np.float32).reshape(4, 4)
        indices, scores = scorer.top(vectors[2:3].copy(), vectors, 1)
        assert (indices.tolist(), scores.tolist()) == ([[2]], [[1.0]])
