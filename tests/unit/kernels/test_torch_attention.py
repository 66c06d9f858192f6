"""Attention against its definition in float64, on the CPU; needs PyTorch."""

from __future__ import annotations

import pytest

from lltm_ray.errors import ConfigError
from lltm_ray.kernels.attention import attend, usable_backends

pytestmark = pytest.mark.torch
TOLERANCE = {"float64": 1e-12, "float32": 2e-6, "float16": 3e-3, "bfloat16": 2e-2}


def inputs(dtype, heads=(4, 4), tokens=(5, 5), size=16, seed=0):
    import torch

    source = torch.Generator().manual_seed(seed)
    shapes = [(2, heads[0], tokens[0], size)] + [(2, heads[1], tokens[1], size)] * 2
    return [torch.randn(shape, generator=source, dtype=torch.float64).to(getattr(torch, dtype)) for shape in shapes]


def definition(query, key, value, *, causal):
    import torch

    times = query.shape[1] // key.shape[1]
    query, key, value = (each.double() for each in (query, *(x.repeat_interleave(times, 1) for x in (key, value))))
    scores = query @ key.mT / query.shape[-1] ** 0.5
    if causal:
        m, n = scores.shape[2:]
        seen = torch.arange(n)[None, :] <= torch.arange(m)[:, None] + n - m
        scores = scores.masked_fill(~seen, float("-inf"))
    return scores.softmax(-1) @ value


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("heads", [(4, 4), (8, 2), (3, 1)])
@pytest.mark.parametrize("tokens", [(1, 1), (1, 9), (7, 7), (3, 9)])
@pytest.mark.parametrize("causal", [False, True])
def test_every_usable_backend_gives_the_definition(dtype, heads, tokens, causal):
    given = inputs(dtype, heads, tokens)
    wanted = definition(*given, causal=causal)
    usable = usable_backends(*given, causal=causal)
    assert usable[-1] == "math"
    for backend in ("auto", *usable):
        found = attend(*given, causal=causal, backend=backend)
        assert found.backend == (usable[0] if backend == "auto" else backend)
        assert found.output.dtype == given[0].dtype
        assert (found.output.double() - wanted).abs().max() < TOLERANCE[dtype]


def test_new_tokens_behind_a_cache_see_all_of_it():
    query, key, value = inputs("float64", tokens=(6, 6))
    whole = attend(query, key, value, causal=True).output
    behind = attend(query[:, :, 4:], key, value, causal=True).output
    assert (behind - whole[:, :, 4:]).abs().max() < 1e-12


def test_nothing_attends_to_nothing():
    query, key, value = inputs("float32", tokens=(0, 3))
    assert attend(query, key, value).output.shape == (2, 4, 0, 16)
    query, key, value = inputs("float32", tokens=(2, 0))
    assert not attend(query, key, value).output.any()
    assert attend(*inputs("float32", size=0)).output.shape == (2, 4, 5, 0)


def test_what_does_not_fit_is_refused_by_name():
    query, key, value = inputs("float32")
    wrong = {
        "query=": [(query[0], key, value), (query[:, :3], key[:, :2], value[:, :2]), (query.long(), key, value)],
        "key=": [(query, key.half(), value), (query, key[..., :8], value), (query, key[:1], value[:1])],
        "value=": [(query, key, value.double())],
    }
    for name, calls in wrong.items():
        for given in calls:
            with pytest.raises(ConfigError, match=name):
                attend(*given)
    with pytest.raises(ConfigError, match="more tokens than the 2 keys"):
        attend(query, key[:, :, :2], value[:, :, :2], causal=True)
    for backend in ("efficient", "magic"):
        with pytest.raises(ConfigError, match="backend"):
            attend(query, key, value, backend=backend)
