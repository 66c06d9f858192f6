"""On a GPU: attention, paged attention, the batcher, similarity and `models diff` against plainer computations.

Needs PyTorch and Triton, but not Ray.
"""

from __future__ import annotations

import random
import secrets
import threading

import pytest

from lltm_ray.errors import ConfigError
from lltm_ray.kernels.attention import attend, usable_backends
from lltm_ray.kernels.batcher import Batcher
from lltm_ray.kernels.paged_attention import paged_attention, part_tokens, processors
from lltm_ray.kernels.paged_cache import CacheShape, PagedCache
from lltm_ray.kernels.reference_llama import LlamaShape, ReferenceLlama
from lltm_ray.kernels.sampling import Sampling

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
TOLERANCE = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1.6e-2}
"""Of |error| / (1 + |wanted|): rounding of the result and of the weights to the type."""


@pytest.fixture
def torch():
    import torch

    seed = secrets.randbits(32)
    print("seed", seed)
    torch.manual_seed(seed)
    return torch


def error(found, wanted):
    wanted = wanted.double()
    return float(((found.double() - wanted).abs() / (1 + wanted.abs())).max())


def one_layer(torch, lengths, *, kv_heads, size, dtype, block=16):
    """A cache of one layer whose blocks are strewn; what nobody wrote is NaN."""
    n_blocks = sum(-(-length // block) for length in lengths) + 7
    shape = CacheShape(n_layers=1, n_kv_heads=kv_heads, head_dim=size, n_blocks=n_blocks, block_size=block)
    cache = PagedCache(shape, device=DEVICE, dtype=getattr(torch, dtype))
    cache.keys.fill_(float("nan"))
    cache.values.fill_(float("nan"))
    sequences = [cache.tables.open() for _ in lengths]
    left = dict(zip(sequences, lengths, strict=True))
    while any(left.values()):  # in turns, so that no sequence's blocks lie together
        for sequence in sequences:
            step = min(left[sequence], 1024 if max(lengths) > 4096 else block)
            if step:
                cache.reserve(sequence, step)
                cache.tables.advance(sequence, range(step), shareable=False)
                left[sequence] -= step
    for sequence, length in zip(sequences, lengths, strict=True):
        at = torch.arange(length)
        blocks = torch.tensor(list(cache.tables.blocks(sequence)), dtype=torch.int64)[at // block]
        pair = torch.randn(2, length, kv_heads, size, device=DEVICE)
        cache.write(0, (blocks * block + at % block).to(DEVICE), *pair)
    return cache, cache.batch(sequences)


def compare(torch, lengths, *, heads, kv_heads, size, dtype, block=16):
    cache, batch = one_layer(torch, lengths, kv_heads=kv_heads, size=size, dtype=dtype, block=block)
    query = torch.randn(len(lengths), heads, size, device=DEVICE).to(cache.keys.dtype)
    pools = cache.keys[0], cache.values[0]
    found = paged_attention(query, *pools, batch, backend="triton")
    wanted = paged_attention(query.double(), *(pool.double() for pool in pools), batch, backend="torch")
    assert found.dtype == query.dtype
    empty = [row for row, length in enumerate(lengths) if not length]
    assert not found[empty].any()
    return error(found, wanted)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("size", [64, 80, 128])
@pytest.mark.parametrize("heads", [(4, 4), (8, 2), (7, 1), (32, 8)])
def test_paged_attention_is_that_of_float64(torch, dtype, size, heads):
    lengths = [1, 15, 16, 17, 0, 63, 64, 65, 1023, 0, 300, 777]
    assert compare(torch, lengths, heads=heads[0], kv_heads=heads[1], size=size, dtype=dtype) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_long_sequence_is_split_and_added_up(torch, dtype):
    for lengths in ([32_768], [32_769, 0, 5], [32_767, 4097, 1, 255, 256, 257]):
        assert compare(torch, lengths, heads=8, kv_heads=2, size=128, dtype=dtype) < TOLERANCE[dtype]


@pytest.mark.parametrize("block", [1, 3, 16, 64, 256])
def test_any_block_size_serves(torch, block):
    assert compare(torch, [1, 100, 0, 513], heads=6, kv_heads=2, size=96, dtype="float16", block=block) < 2e-3


def test_lengths_around_the_border_of_a_part(torch):
    cache, batch = one_layer(torch, [4096], kv_heads=1, size=64, dtype="float16")
    part = part_tokens(batch, 1, processors(cache.device))
    lengths = [part - 1, part, part + 1, 2 * part - 1, 2 * part, 2 * part + 1, 4096]
    assert compare(torch, lengths, heads=2, kv_heads=1, size=64, dtype="float16") < 2e-3


def test_views_of_larger_tensors_are_read_where_they_lie(torch):
    cache, batch = one_layer(torch, [5, 600], kv_heads=2, size=64, dtype="float16")
    wide = torch.randn(2, 12, 64, device=DEVICE, dtype=torch.float16)
    found = paged_attention(wide[:, 3:11], cache.keys[0], cache.values[0], batch)
    assert torch.equal(
        found, paged_attention(wide[:, 3:11].contiguous(), cache.keys[0].clone(), cache.values[0].clone(), batch)
    )


def test_what_lies_elsewhere_is_refused(torch):
    cache, batch = one_layer(torch, [5], kv_heads=2, size=64, dtype="float16")
    keys, values = cache.keys[0], cache.values[0]
    query = torch.randn(1, 4, 64, dtype=torch.float16)
    with pytest.raises(ConfigError, match="one device"):
        paged_attention(query, keys, values, batch)
    with pytest.raises(ConfigError, match="type"):
        paged_attention(query.to(DEVICE).float(), keys, values, batch)
    with pytest.raises(ConfigError, match="lie on"):
        attend(query[None], query[None].to(DEVICE), query[None].to(DEVICE))


def test_eight_threads_get_what_one_gets(torch):
    cache, batch = one_layer(torch, [700, 33, 0, 5000], kv_heads=2, size=128, dtype="bfloat16")
    pools = cache.keys[0], cache.values[0]
    queries = [torch.randn(4, 8, 128, device=DEVICE, dtype=torch.bfloat16) for _ in range(8)]
    wanted = [paged_attention(query, *pools, batch) for query in queries]
    torch.cuda.synchronize()
    wrong = []

    def work(number):
        with torch.cuda.stream(torch.cuda.Stream()):
            found = [paged_attention(queries[number], *pools, batch) for _ in range(30)]
            wrong.extend(number for each in found if not torch.equal(each, wanted[number]))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert wrong == []


def test_a_thousand_calls_leave_no_memory_behind(torch):
    cache, batch = one_layer(torch, [3000, 20], kv_heads=2, size=64, dtype="float16")
    query = torch.randn(2, 4, 64, device=DEVICE, dtype=torch.float16)
    paged_attention(query, cache.keys[0], cache.values[0], batch)
    before = torch.cuda.memory_allocated()
    for _ in range(1000):
        paged_attention(query, cache.keys[0], cache.values[0], batch)
    assert torch.cuda.memory_allocated() == before


# attention ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("heads", [(4, 4), (8, 2)])
@pytest.mark.parametrize("tokens", [(1, 300), (77, 77), (64, 333)])
@pytest.mark.parametrize("size", [64, 80, 128])
def test_every_usable_backend_gives_the_definition(torch, dtype, heads, tokens, size):
    shapes = [(2, heads[0], tokens[0], size)] + [(2, heads[1], tokens[1], size)] * 2
    query, key, value = (torch.randn(shape, device=DEVICE).to(getattr(torch, dtype)) for shape in shapes)
    wide = [each.double() for each in (query, *(x.repeat_interleave(heads[0] // heads[1], 1) for x in (key, value)))]
    for causal in (False, True):
        scores = wide[0] @ wide[1].mT / size**0.5
        hidden = torch.ones_like(scores, dtype=torch.bool).triu(tokens[1] - tokens[0] + 1)
        wanted = scores.masked_fill(hidden & causal, float("-inf")).softmax(-1) @ wide[2]
        usable = usable_backends(query, key, value, causal=causal)
        assert usable[0] != "math"
        assert ("flash" in usable) == (dtype != "float32")
        for backend in ("auto", *usable):
            found = attend(query, key, value, causal=causal, backend=backend)
            assert backend in ("auto", found.backend)
            assert found.backend != "math" or backend == "math"
            assert error(found.output, wanted) < 2 * TOLERANCE[dtype], (backend, found.backend, causal)


# the batcher -------------------------------------------------------------------------------------------------------


def batcher(torch, model, dtype, **options):
    shape = CacheShape(
        n_layers=model.shape.n_layers, n_kv_heads=model.shape.n_kv_heads, head_dim=model.shape.head_dim, n_blocks=600
    )
    return Batcher(model, PagedCache(shape, device=DEVICE, dtype=dtype), **options)


def test_each_answer_of_a_batch_is_that_of_the_request_alone(torch):
    source = random.Random(0)
    model = ReferenceLlama(LlamaShape(n_embd=128, n_heads=8, n_kv_heads=2), device=DEVICE)
    prompts = [[source.randrange(256) for _ in range(source.choice([1, 2, 17, 90, 700]))] for _ in range(16)]

    def alone(prompt):
        tokens = list(prompt)
        for _ in range(12):
            tokens.append(int(model.full(torch.tensor(tokens, device=DEVICE))[-1].argmax()))
        return tokens[len(prompt) :]

    wanted = [alone(prompt) for prompt in prompts]
    for options in ({}, {"max_running": 3, "chunk_tokens": 50}):
        batch = batcher(torch, model, torch.float32, **options)
        streams = [batch.submit(prompt, max_tokens=12) for prompt in prompts]
        batch.run()
        assert [stream.tokens for stream in streams] == wanted


def test_eight_threads_read_their_streams_at_once(torch):
    model = ReferenceLlama(LlamaShape(n_embd=128, n_heads=2, n_kv_heads=1), device=DEVICE, dtype=torch.float32)
    together, found = batcher(torch, model, torch.float32), {}
    sampling = [Sampling(temperature=1.0, top_p=0.9, seed=seed) for seed in range(8)]

    def read(number):
        found[number] = list(together.submit([number, 1, 2], max_tokens=20, sampling=sampling[number]))

    threads = [threading.Thread(target=read, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    apart = batcher(torch, model, torch.float32, max_running=1)
    wanted = [apart.submit([number, 1, 2], max_tokens=20, sampling=sampling[number]).read() for number in range(8)]
    assert [found[number] for number in range(8)] == wanted


# the product's uses ------------------------------------------------------------------------------------------------


def test_neighbours_and_similar_pairs_are_those_of_numpy(torch):
    import numpy as np

    from lltm_ray.kernels.similarity import TorchScorer
    from lltm_ray.knowledge.pairs import similar_pairs
    from lltm_ray.knowledge.search import VectorIndex

    vectors = np.random.default_rng(0).normal(size=(9000, 32)).astype(np.float32)
    scorer = TorchScorer(DEVICE)
    indexes = [VectorIndex("m"), VectorIndex("m", scorer=scorer)]
    for index in indexes:
        index.add([str(number) for number in range(len(vectors))], vectors)
    one, two = ([[hit.index for hit in hits] for hits in index.search_all(vectors[:50], 3)] for index in indexes)
    assert one == two
    one, two = similar_pairs(vectors, 0.7), similar_pairs(vectors, 0.7, scorer=scorer)
    pairs = [set(zip(each.first.tolist(), each.second.tolist(), strict=True)) for each in (one, two)]
    border = sum(int((abs(each.scores - 0.7) < 1e-5).sum()) for each in (one, two))
    assert len(one) > 50
    assert len(pairs[0] ^ pairs[1]) <= border


def test_models_compared_on_the_gpu_differ_as_on_the_cpu(torch, tmp_path):
    import gguf
    import numpy as np

    from lltm_ray.cli.models_diff import choose_decoder
    from lltm_ray.models.diff import diff_models

    values = np.random.default_rng(0).normal(size=(512, 1024)).astype(np.float32)
    kinds = [getattr(gguf.GGMLQuantizationType, name) for name in ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q5_0")]
    paths = [tmp_path / "a.gguf", tmp_path / "b.gguf"]
    for path, order in zip(paths, ([kinds[1]] * 6, kinds), strict=True):
        writer = gguf.GGUFWriter(path, "llama")
        for number, kind in enumerate(order):
            writer.add_tensor(f"t{number}", gguf.quants.quantize(values, kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    decode, where = choose_decoder("cuda")
    assert where == torch.cuda.get_device_name()
    ours, theirs = diff_models(*paths, dequantize=decode).tensors, diff_models(*paths).tensors
    assert [each.note for each in ours] == [""] * 5 + ["Q5_0 decoded by gguf on the CPU"]
    for one, two in zip(ours, theirs, strict=True):
        assert one.max_abs == two.max_abs
        for name in ("rmse", "relative", "cosine"):
            assert getattr(one, name) == pytest.approx(getattr(two, name), rel=1e-9), (one.name, name)
