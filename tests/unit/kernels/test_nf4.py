"""NF4 on the CPU: the bytes of bitsandbytes, nearest levels, small errors, and refusals."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lltm_ray.errors import ConfigError
from lltm_ray.kernels import nf4
from tests.unit.kernels.nf4_cases import CASES, digest, values

REFERENCE = json.loads((Path(__file__).parent / "bitsandbytes.json").read_text(encoding="utf-8"))
WORST_STEP = 0.152
"""Half the widest gap between two levels, -1 and -0.696, of a block's largest magnitude."""


def decoded(name, dtype):
    return np.frombuffer(base64.b64decode(REFERENCE["nested"][name]), dtype)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("name", CASES)
def test_bytes_scales_and_values_are_those_of_bitsandbytes(name, dtype):
    quantized = nf4.quantize(values(CASES[name], dtype), double=False)
    back = nf4.dequantize(quantized)
    found = {"packed": digest(quantized.packed), "absmax": digest(quantized.absmax), "values": digest(back)}
    assert found == REFERENCE["cases"][f"{name} {dtype}"]


def test_both_maps_are_those_of_bitsandbytes():
    assert {"levels": digest(nf4.LEVELS), "dynamic": digest(nf4.dynamic_map())} == REFERENCE["maps"]


def test_a_nested_state_of_bitsandbytes_gives_its_values():
    size = CASES["tail"]
    state = nf4.Nf4Tensor(
        packed=nf4.quantize(values(size, "float32"), double=False).packed,
        absmax=decoded("absmax", np.uint8),
        shape=(size,),
        dtype="float32",
        nested_absmax=decoded("nested_absmax", np.float32),
        offset=np.array(REFERENCE["nested"]["offset"], np.float32),
    )
    assert digest(nf4.dequantize(state)) == REFERENCE["nested"]["values"]


def test_our_nested_scales_are_no_worse_than_those_of_bitsandbytes():
    scales = nf4.quantize(values(CASES["tail"], "float32"), double=False).absmax
    theirs_offset = np.float32(REFERENCE["nested"]["offset"])
    codes, nested = nf4.quantize_scales(scales, theirs_offset)
    theirs, outer = decoded("absmax", np.uint8), decoded("nested_absmax", np.float32)
    assert np.array_equal(nested, outer)
    spread = np.repeat(outer, 256)[: scales.size]
    wanted, levels = (scales - theirs_offset).astype(np.float64), nf4.dynamic_map().astype(np.float64)
    ours_error = np.abs(levels[codes] * spread - wanted)
    assert (ours_error <= np.abs(levels[theirs] * spread - wanted) + 1e-6 * spread).all()


@given(st.integers(0, 2**32 - 1), st.integers(1, 700), st.sampled_from(["float32", "float16"]))
@settings(max_examples=60, deadline=None)
def test_every_value_gets_its_nearest_level(seed, size, dtype):
    given_values = (np.random.default_rng(seed).standard_normal(size) * 3).astype(dtype)
    quantized = nf4.quantize(given_values, double=False)
    blocks = np.arange(size) // 64
    scaled = given_values.astype(np.float64) / np.maximum(quantized.absmax[blocks], 1e-38)
    error = np.abs(scaled[:, None] - nf4.LEVELS.astype(np.float64)).min(axis=1) * quantized.absmax[blocks]
    back = nf4.dequantize(quantized, dtype="float32").astype(np.float64)
    assert np.abs(np.abs(back - given_values) - error).max() <= 1e-6 * quantized.absmax.max()


@given(st.integers(0, 2**32 - 1), st.integers(1, 2000))
@settings(max_examples=40, deadline=None)
def test_every_scale_gets_its_nearest_8_bit_level_and_ties_go_to_even(seed, size):
    rng = np.random.default_rng(seed)
    middles = nf4.midpoints(nf4.dynamic_map())
    scales = np.where(rng.random(size) < 0.3, rng.choice(middles, size), rng.uniform(-1, 1, size)).astype(np.float32)
    scales[::256] = 1.0
    codes, nested = nf4.quantize_scales(scales, np.float32(0))
    assert (nested == 1).all()
    far = np.abs(scales[:, None].astype(np.float64) - nf4.dynamic_map().astype(np.float64))
    chosen = far[np.arange(size), codes]
    tied = np.isin(scales, middles)
    assert (chosen[~tied] == far.min(axis=1)[~tied]).all()
    assert (codes[tied] % 2 == 0).all()


def test_bins_hold_one_limit_each_and_none_near_an_end():
    base, limit = nf4.level_bins()
    ends = (np.arange(33) - 16.5) / nf4.BIN_SCALE
    assert np.abs(ends[:, None] - nf4.midpoints(nf4.LEVELS)).min() > 1e-4
    assert np.isfinite(limit).sum() == 15
    near = np.concatenate([np.nextafter(nf4.midpoints(nf4.LEVELS), way, dtype=np.float32) for way in (-2, 2)])
    every = np.concatenate([near, nf4.midpoints(nf4.LEVELS), ends.astype(np.float32), nf4.LEVELS])
    every = every[np.abs(every) <= 1]
    wanted = np.searchsorted(nf4.midpoints(nf4.LEVELS), every)
    bins = (every * nf4.BIN_SCALE + nf4.BIN_SHIFT).view(np.int32) & 31
    assert np.array_equal(base[bins] + (every > limit[bins]), wanted)


@pytest.mark.parametrize("shape", [(0,), (1,), (3, 5), (2, 64), (7, 9, 11), (300, 300)])
@pytest.mark.parametrize("double", [False, True])
def test_shape_and_type_come_back_and_the_error_is_within_half_a_step(shape, double):
    given_values = np.random.default_rng(7).standard_normal(shape).astype(np.float16)
    quantized = nf4.quantize(given_values, double=double)
    back = nf4.dequantize(quantized)
    assert (back.shape, back.dtype) == (shape, np.float16)
    worst = np.abs(given_values.astype(np.float32)).max(initial=0)
    assert np.abs(back.astype(np.float32) - given_values).max(initial=0) <= (WORST_STEP + 0.01 * double) * worst


def test_nesting_saves_what_it_says():
    given_values = np.random.default_rng(1).standard_normal(1 << 20).astype(np.float32)
    single, double = nf4.quantize(given_values, double=False), nf4.quantize(given_values)
    assert single.nbytes * 8 / given_values.size == 4.5
    assert double.nbytes * 8 / given_values.size == pytest.approx(4.127, abs=1e-3)


def test_a_product_is_that_of_the_dequantized_weight():
    rng = np.random.default_rng(2)
    weight, x = rng.standard_normal((48, 192)).astype(np.float32), rng.standard_normal((2, 5, 192)).astype(np.float32)
    quantized = nf4.quantize(weight)
    wanted = x.astype(np.float64) @ nf4.dequantize(quantized).astype(np.float64).T
    found = nf4.matmul(x, quantized)
    assert found.shape == (2, 5, 48)
    assert np.abs(found - wanted).max() <= 1e-4


def test_other_layouts_are_read_in_c_order():
    base = np.random.default_rng(3).standard_normal((40, 70)).astype(np.float32)
    turned = nf4.quantize(base.T, double=False)
    assert np.array_equal(turned.packed, nf4.quantize(np.ascontiguousarray(base.T), double=False).packed)


def test_numpy_alone_is_enough():
    code = "import numpy, sys; from lltm_ray.kernels import nf4; nf4.dequantize(nf4.quantize(numpy.ones(99, 'f4')))"
    done = subprocess.run(
        [sys.executable, "-c", code + "; print('torch' in sys.modules)"], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("bad", "field"),
    [([1.0, 2.0], "values"), (np.arange(5), "values"), (np.array([1.0, np.nan], np.float32), "values"),
     (np.array([np.inf] * 70, np.float32), "values")],
)  # fmt: skip
def test_what_cannot_be_quantized_is_refused(bad, field):
    with pytest.raises(ConfigError) as caught:
        nf4.quantize(bad)
    assert caught.value.field == field


def test_wrong_sizes_and_types_are_refused_when_read():
    good = nf4.quantize(np.ones((4, 64), np.float32))
    wrong = {
        "packed": replace(good, shape=(4, 65)),
        "absmax": replace(good, nested_absmax=None),
        "nested_absmax": replace(good, nested_absmax=good.nested_absmax[:0]),
        "offset": replace(good, offset=None),
        "dtype": replace(good, dtype="int8"),
    }
    for field, bad in wrong.items():
        with pytest.raises(ConfigError) as caught:
            nf4.dequantize(bad)
        assert caught.value.field == field
        if field != "dtype":
            with pytest.raises(ConfigError, match=f"{field}="):
                nf4.matmul(np.ones((2, bad.shape[1]), np.float32), bad)
    with pytest.raises(ConfigError, match="NumPy has no such type"):
        nf4.dequantize(good, dtype="bfloat16")
    with pytest.raises(ConfigError, match="last dimension"):
        nf4.matmul(np.ones((2, 63), np.float32), good)
