"""GGUF blocks on the CPU, against the format's own library."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from lltm_ray.errors import ConfigError
from lltm_ray.kernels.gguf_blocks import KINDS, dequantize
from tests.unit.kernels.gguf_samples import random_blocks

QUANTIZED = ["Q4_0", "Q8_0", "Q4_K", "Q6_K"]


def reference(raw, kind):
    rows = raw.reshape(-1, KINDS[kind].nbytes)
    return gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[kind]).reshape(-1)


@pytest.mark.parametrize("count", [1, 3, 257, 4000])
@pytest.mark.parametrize("kind", KINDS)
def test_values_equal_those_of_gguf_bit_for_bit(kind, count):
    raw = random_blocks(kind, count, seed=count)
    found = dequantize(raw, kind, n_elements=count * KINDS[kind].values)
    assert found.dtype == np.float32
    assert found.tobytes() == reference(raw, kind).tobytes()


@pytest.mark.parametrize("kind", QUANTIZED)
def test_zeros_subnormal_and_infinite_scales_are_those_of_gguf(kind):
    scales = np.array([0.0, -0.0, 6e-8, -65504.0, np.inf], np.float16)
    raw = random_blocks(kind, scales.size).reshape(scales.size, -1)
    at = 208 if kind == "Q6_K" else 0
    raw[:, at : at + 2] = scales[:, None].view(np.uint8)
    with np.errstate(invalid="ignore"):
        found = dequantize(raw, kind, n_elements=scales.size * KINDS[kind].values)
        wanted = reference(raw, kind)
    assert np.array_equal(found, wanted, equal_nan=True)
    real = ~np.isnan(wanted)
    assert found[real].tobytes() == wanted[real].tobytes()


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q4_0", "Q8_0"])
def test_what_gguf_quantizes_comes_back_close(kind):
    values = np.random.default_rng(5).standard_normal((8, 256)).astype(np.float32)
    raw = gguf.quants.quantize(values, gguf.GGMLQuantizationType[kind])
    found = dequantize(raw.view(np.uint8), kind, n_elements=values.size)
    allowed = {"F32": 0, "F16": 2e-3, "BF16": 2e-2, "Q4_0": 0.6, "Q8_0": 0.03}[kind]
    assert np.abs(found - values.reshape(-1)).max() <= allowed


@pytest.mark.parametrize("kind", KINDS)
def test_views_and_shapes_make_no_difference_and_nothing_gives_nothing(kind):
    raw = random_blocks(kind, 64)
    wanted = dequantize(raw, kind, n_elements=64 * KINDS[kind].values)
    spaced = np.zeros((raw.size, 2), np.uint8)
    spaced[:, 0] = raw
    assert np.array_equal(dequantize(spaced[:, 0], kind, n_elements=wanted.size), wanted)
    assert np.array_equal(dequantize(raw.reshape(8, -1), kind, n_elements=wanted.size), wanted)
    shifted = np.concatenate([np.zeros(1, np.uint8), raw])[1:]
    assert np.array_equal(dequantize(shifted, kind, n_elements=wanted.size), wanted)
    assert dequantize(raw[:0], kind, n_elements=0).shape == (0,)


def test_the_input_is_left_alone():
    raw = random_blocks("F32", 10)
    before = raw.copy()
    dequantize(raw, "F32", n_elements=10)[:] = 0
    assert np.array_equal(raw, before)


@pytest.mark.parametrize(
    ("raw", "kind", "n_elements", "field"),
    [
        (np.zeros(18, np.uint8), "Q5_1", 32, "kind"),
        (np.zeros(18, np.int8), "Q4_0", 32, "blocks"),
        (b"\0" * 18, "Q4_0", 32, "blocks"),
        (np.zeros(18, np.uint8), "Q4_0", 31, "n_elements"),
        (np.zeros(18, np.uint8), "Q4_0", 64, "n_elements"),
        (np.zeros(19, np.uint8), "Q4_0", 32, "n_elements"),
        (np.zeros(0, np.uint8), "Q4_0", -32, "n_elements"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(raw, kind, n_elements, field):
    with pytest.raises(ConfigError) as caught:
        dequantize(raw, kind, n_elements=n_elements)
    assert caught.value.field == field


def test_an_unknown_kind_is_told_the_known_ones():
    with pytest.raises(ConfigError, match="Q4_0, Q8_0, Q4_K, Q6_K"):
        dequantize(np.zeros(18, np.uint8), "IQ2_XS", n_elements=32)
