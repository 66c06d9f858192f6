"""Products of the native module on the CPU against float64."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lltm_ray.errors import DTypeError, NativeError, ShapeError
from tests.unit.kernels.tensor_cases import FLOATS, LAYOUTS, check_product, laid_out, make, random_array, values

pytestmark = pytest.mark.timeout(600)  # the first test of a run waits for the compiler

FACTORS = (*FLOATS, "int8")
SIZES = [(1, 1, 1), (3, 5, 7), (64, 256, 256), (65, 257, 259), (130, 20, 1), (1, 600, 33)]
property_test = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.parametrize("dtype", FACTORS)
@pytest.mark.parametrize(("m", "k", "n"), SIZES)
def test_products_are_those_of_float64_within_the_types_rounding(tensors, dtype, m, k, n):
    rng = np.random.default_rng(m * 1000 + n)
    a, b = random_array(rng, (m, k), dtype), random_array(rng, (k, n), dtype)
    found = make(tensors, a, dtype) @ make(tensors, b, dtype)
    assert found.dtype == ("int32" if dtype == "int8" else dtype)
    check_product(found, a, b, dtype)


@property_test
@given(data=st.data())
def test_layouts_transposes_and_epilogues_give_the_same_product(tensors, data):
    size, layout = st.integers(1, 9), st.sampled_from(LAYOUTS)
    dtype = data.draw(st.sampled_from(FACTORS))
    m, k, n, batch = (data.draw(size) for _ in range(4))
    turn_a, turn_b, batched = (data.draw(st.booleans()) for _ in range(3))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    front = data.draw(st.sampled_from([(batch, batch), (batch, 1), (1, batch)])) if batched else (None, None)
    shapes = [(*(() if each is None else (each,)), *size) for each, size in zip(front, ((m, k), (k, n)), strict=True)]
    a, b = (random_array(rng, shape, dtype) for shape in shapes)
    options = {"transpose_a": turn_a, "transpose_b": turn_b}
    bias = activation = None
    if dtype != "int8":
        bias, activation = random_array(rng, (2 * n,), dtype)[::2], data.draw(st.sampled_from(["none", "relu", "gelu"]))
        options |= {"bias": make(tensors, np.repeat(bias, 2), dtype)[::2], "activation": activation}
    left = laid_out(tensors, a.swapaxes(-1, -2) if turn_a else a, dtype, data.draw(layout))
    right = laid_out(tensors, b.swapaxes(-1, -2) if turn_b else b, dtype, data.draw(layout))
    multiply = tensors.batched_matmul if batched else tensors.matmul
    found = multiply(left, right, **options)
    check_product(found, a, b, dtype, bias=bias, activation=activation or "none")
    out = laid_out(tensors, np.zeros(found.shape), found.dtype, data.draw(layout))
    multiply(left, right, out=out, **options)
    assert np.array_equal(values(out), values(found))


@pytest.mark.parametrize("dtype", FACTORS)
def test_sums_over_nothing_are_zeros_with_their_bias(tensors, dtype):
    left, right = tensors.zeros((2, 0), dtype), tensors.zeros((0, 3), dtype)
    assert np.array_equal(values(left @ right), np.zeros((2, 3)))
    assert (tensors.zeros((0, 4), dtype) @ tensors.zeros((4, 3), dtype)).shape == (0, 3)
    assert (tensors.zeros((0, 4, 5), dtype) @ tensors.zeros((0, 5, 6), dtype)).shape == (0, 4, 6)
    if dtype != "int8":
        bias = make(tensors, np.array([-1.0, 0.0, 2.0]), dtype)
        found = tensors.matmul(left, right, bias=bias, activation="relu")
        assert values(found).tolist() == [[0, 0, 2]] * 2


def test_half_floats_are_summed_in_float32(tensors):
    ones = tensors.ones((1, 5000), "float16")
    assert (ones @ ones.T).item() == 5000
    assert tensors.matmul(tensors.ones((1, 1000), "bfloat16"), tensors.ones((1000, 1), "bfloat16")).item() == 1000


def test_int8_sums_are_exact_at_the_ends_of_the_range(tensors):
    left = tensors.full((1, 4096), -128, "int8")
    assert (left @ left.T).item() == 4096 * 128 * 128


def test_nan_and_infinity_pass_through(tensors):
    wild = tensors.from_numpy(np.array([[np.nan, 1.0], [np.inf, 1.0]], np.float32))
    found = tensors.matmul(wild, tensors.ones((2, 1)), activation="relu").to_numpy()
    assert np.isnan(found[0, 0])
    assert np.isinf(found[1, 0])


def test_out_is_the_result_and_shares_no_memory(tensors):
    a, out = tensors.ones((2, 2)), tensors.empty((2, 2))
    assert tensors.matmul(a, a, out=out).data_ptr == out.data_ptr
    assert out.to_numpy().tolist() == [[2, 2], [2, 2]]
    with pytest.raises(ShapeError, match="shares memory"):
        tensors.matmul(a, out, out=out)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda t, a: t.matmul(a, a), ShapeError, "Incompatible dimensions.*3 columns meet 2 rows"),
        (lambda t, a: t.matmul(a, a[0]), ShapeError, "need 2 axes"),
        (lambda t, a: a[0] @ a[0], ShapeError, "need 2 axes"),
        (lambda t, a: t.batched_matmul(a, a), ShapeError, "need 3 axes"),
        (lambda t, a: t.batched_matmul(t.zeros((2, 1, 1)), t.zeros((3, 1, 1))), ShapeError, "batches are equal"),
        (lambda t, a: a @ t.zeros((3, 2), "float16"), DTypeError, "float32 and float16"),
        (lambda t, a: t.zeros((2, 2), "int32") @ t.zeros((2, 2), "int32"), DTypeError, "int32 and int32"),
        (lambda t, a: t.matmul(a, a.T, activation="swish"), NativeError, "'none', 'relu' or 'gelu'"),
        (lambda t, a: t.matmul(a, a.T, bias=t.zeros(3)), ShapeError, "each of 2 columns"),
        (lambda t, a: t.matmul(a, a.T, bias=t.zeros(2, "float16")), DTypeError, "bias of float16"),
        (lambda t, a: t.matmul(a, a.T, out=t.zeros((2, 3))), ShapeError, "out of shape"),
        (lambda t, a: t.matmul(a, a.T, out=t.zeros((2, 2), "int32")), DTypeError, "out of int32"),
        (lambda t, a: t.matmul(*[t.zeros((2, 2), "float16")] * 2, tf32=True), DTypeError, "tf32"),
        (lambda t, a: t.matmul(*[t.zeros((2, 2), "int8")] * 2, activation="relu"), DTypeError, "int8"),
        (lambda t, a: t.matmul(a), TypeError, "two factors"),
        (lambda t, a: t.matmul(a, a.T, nothing=1), TypeError, "'nothing'"),
        (lambda t, a: t.matmul(a, np.zeros((3, 2))), TypeError, "from_numpy"),
        (lambda t, a: t.matmul(a, a.T, stream="x"), TypeError, "int"),
        (lambda t, a: t.matmul(a, a.T, stream=-1), OverflowError, "negative"),
    ],
)
def test_bad_products_get_an_error_that_says_why(tensors, call, error, words):
    with pytest.raises(error, match=words):
        call(tensors, tensors.zeros((2, 3)))
