"""Tensors of the native module against NumPy: makers, views, slices, copies and casts."""

import sys

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lltm_ray.errors import DeviceError, DeviceMemoryError, DTypeError, NativeError, ShapeError
from tests.unit.kernels.tensor_cases import DTYPES, FLOATS, make, random_array, round_to, values

pytestmark = pytest.mark.timeout(600)  # the first test of a run waits for the compiler

SHAPES = hnp.array_shapes(min_dims=0, max_dims=5, min_side=0, max_side=5)
property_test = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


def counted(shape):
    return np.arange(int(np.prod(shape)), dtype=np.int32).reshape(shape)


def numpy_strides(array):
    return tuple(stride // array.itemsize for stride in array.strides)


@pytest.mark.parametrize("dtype", DTYPES)
def test_makers_give_shape_dtype_and_values(tensors, dtype):
    made = tensors.full((2, 3), 7, dtype)
    assert (made.shape, made.strides, made.dtype, made.device) == ((2, 3), (3, 1), dtype, "cpu")
    assert (made.ndim, made.size, made.nbytes) == (2, 6, 6 * made.itemsize)
    assert np.array_equal(values(made), np.full((2, 3), 7))
    assert np.array_equal(values(tensors.zeros(4, dtype)), np.zeros(4))
    assert np.array_equal(values(tensors.ones((), dtype)), np.ones(()))
    assert tensors.empty((0, 5), dtype).nbytes == 0
    assert repr(made) == f"Tensor(shape=(2, 3), dtype='{dtype}', device='cpu')"


@pytest.mark.parametrize("given_dtype", [np.float16, np.dtype("float16"), "float16", "torch.float16"])
def test_dtypes_are_known_by_all_their_names(tensors, given_dtype):
    assert tensors.zeros(1, given_dtype).dtype == "float16"


@property_test
@given(data=st.data(), shape=SHAPES)
def test_any_index_gives_the_view_that_numpy_gives(tensors, data, shape):
    array = counted(shape)
    index = data.draw(hnp.basic_indices(shape, allow_newaxis=False))
    tensor, wanted = tensors.from_numpy(array), array[index]
    found = tensor[index]
    assert found.shape == np.shape(wanted)
    assert np.array_equal(found.to_numpy(), wanted)
    if np.size(wanted) > 1:
        moved = [stride for stride, size in zip(found.strides, found.shape, strict=True) if size > 1]
        assert moved == [s for s, size in zip(numpy_strides(wanted), wanted.shape, strict=True) if size > 1]


@property_test
@given(data=st.data(), shape=SHAPES)
def test_permuted_views_and_their_copies_are_numpys(tensors, data, shape):
    axes = data.draw(st.permutations(range(len(shape))))
    array = counted(shape)
    view, wanted = tensors.from_numpy(array).permute(axes), array.transpose(axes)
    assert np.array_equal(view.to_numpy(), wanted)
    copied = view.contiguous()
    assert copied.is_contiguous
    assert np.array_equal(copied.to_numpy(), wanted)
    assert np.array_equal(view.T.to_numpy(), wanted.T)


@property_test
@given(data=st.data(), shape=hnp.array_shapes(max_dims=4, max_side=6))
def test_view_is_reshape_wherever_numpy_needs_no_copy(tensors, data, shape):
    array = counted(shape)
    index = data.draw(hnp.basic_indices(shape, allow_newaxis=False, allow_ellipsis=False))
    source = np.asarray(array[index])
    sizes = data.draw(st.sampled_from([(-1,), (1, -1), (source.size,), source.shape, source.shape[::-1], (2, -1)]))
    view = tensors.from_numpy(array)[index]
    try:
        wanted = source.reshape(sizes)
    except ValueError:
        with pytest.raises(ShapeError):
            view.view(sizes)
        return
    if np.shares_memory(source, wanted) or source.size == 0:
        assert np.array_equal(view.view(sizes).to_numpy(), wanted)
    else:
        with pytest.raises(ShapeError, match="contiguous"):
            view.view(sizes)


@property_test
@given(data=st.data(), shape=SHAPES)
def test_writing_to_a_view_changes_what_it_shows_and_nothing_else(tensors, data, shape):
    array = counted(shape)
    index = data.draw(hnp.basic_indices(shape, allow_newaxis=False))
    tensor = tensors.from_numpy(array)
    tensor[index].fill(-1)
    array[index] = -1
    assert np.array_equal(tensor.to_numpy(), array)
    source = np.asarray(-2 - counted(np.shape(array[index])))
    tensor[index].copy_from(tensors.from_numpy(source))
    array[index] = source
    assert np.array_equal(tensor.to_numpy(), array)


def test_steps_beyond_an_axis_leave_its_first_element(tensors):
    tensor = tensors.from_numpy(counted((4, 5)))
    assert tensor[:: sys.maxsize, :: -sys.maxsize].to_numpy().tolist() == [[4]]
    assert tensor[:: sys.maxsize].strides == tensor.strides


def test_copies_between_views_that_overlap_are_whole(tensors):
    tensor = tensors.from_numpy(counted(10))
    tensor[1:].copy_from(tensor[:-1])
    assert tensor.to_numpy().tolist() == [0, 0, 1, 2, 3, 4, 5, 6, 7, 8]
    tensor.copy_from(tensor[::-1])
    assert tensor.to_numpy().tolist() == [8, 7, 6, 5, 4, 3, 2, 1, 0, 0]


@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("target", DTYPES)
def test_casts_keep_what_fits_and_round_what_does_not(tensors, source, target):
    array = random_array(np.random.default_rng(3), (5, 70), source)
    found = values(make(tensors, array, source)[:, ::-1].to(dtype=target))
    wanted = array[:, ::-1]
    if target in FLOATS:
        wanted = round_to(wanted, target)
    elif source in FLOATS:
        limits = np.iinfo(target)
        wanted = np.clip(np.trunc(wanted), limits.min, limits.max)
    else:
        wanted = wanted.astype(np.int64).astype(target)
    assert np.array_equal(found, wanted)


@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")
def test_every_float16_is_read_and_written_as_numpy_does(tensors):
    every = np.arange(2**16, dtype=np.uint16).view(np.float16)
    wide = tensors.from_numpy(every).to(dtype="float32")
    assert np.array_equal(wide.to_numpy(), every.astype(np.float32), equal_nan=True)
    assert np.array_equal(wide.to(dtype="float16").to_numpy(), every, equal_nan=True)
    rng = np.random.default_rng(4)
    some = rng.integers(0, 2**32, 200_000, dtype=np.uint32).view(np.float32)
    near = (every.astype(np.float32).view(np.uint32)[:, None] + np.array([0xFFF, 0x1000, 0x1001], np.uint32)).ravel()
    for array in (some, near.view(np.float32)):
        assert np.array_equal(
            tensors.from_numpy(array).to(dtype="float16").to_numpy(), array.astype("f2"), equal_nan=True
        )


def test_bfloat16_goes_in_and_out_as_bits(tensors):
    bits = np.arange(2**16, dtype=np.uint16)
    tensor = tensors.from_numpy(bits, dtype="bfloat16")
    wide = (bits.astype(np.uint32) << 16).view(np.float32)
    assert np.array_equal(tensor.to(dtype="float32").to_numpy(), wide, equal_nan=True)
    assert np.array_equal(tensor.to_numpy().view(np.uint16), bits)
    finite = ~np.isnan(wide)
    again = tensors.from_numpy(wide).to(dtype="bfloat16").to_numpy().view(np.uint16)
    assert np.array_equal(again[finite], bits[finite])


def test_floats_stop_at_the_ends_of_an_integers_range(tensors):
    wild = tensors.from_numpy(np.array([np.nan, np.inf, -np.inf, 3e9, -3e9, 2.9, -2.9, 127.9, -128.9], np.float32))
    most, least = 2**31 - 1, -(2**31)
    assert wild.to(dtype="int32").to_numpy().tolist() == [0, most, least, most, least, 2, -2, 127, -128]
    assert wild.to(dtype="int8").to_numpy().tolist() == [0, 127, -128, 127, -128, 2, -2, 127, -128]
    assert wild.to(dtype="uint8").to_numpy().tolist() == [0, 255, 0, 255, 0, 2, 0, 127, 0]


def test_item_iteration_and_length(tensors):
    tensor = tensors.from_numpy(np.array([[1.5, -2.0]], np.float16))
    assert [row.item() for row in tensor[0]] == [1.5, -2.0]
    assert len(tensor) == 1
    assert tensors.full((), 200, "uint8").item() == 200
    with pytest.raises(ShapeError, match="one element"):
        tensor.item()


def test_nothing_is_copied_where_nothing_changes(tensors):
    tensor = tensors.zeros((2, 3))
    same = [tensor.contiguous(), tensor.to("cpu"), tensor.to(dtype="float32"), tensor.view(3, 2), tensor.T]
    assert {each.data_ptr for each in same} == {tensor.data_ptr}
    assert tensor.to(dtype="int8").data_ptr != tensor.data_ptr


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda t: t.zeros((2, -1)), ShapeError, "negative"),
        (lambda t: t.zeros((1,) * 9), ShapeError, "8 axes"),
        (lambda t: t.empty((2**40, 2**40)), ShapeError, "2\\^63"),
        (lambda t: t.empty((0, 2**40, 2**40)), ShapeError, "2\\^63"),
        (lambda t: t.empty((0, 5)).view(0, 2**40, 2**40), ShapeError, "2\\^63"),
        (lambda t: t.zeros((2.5,)), TypeError, "integer"),
        (lambda t: t.zeros(2**70), OverflowError, "index"),
        (lambda t: t.Tensor.__new__(t.Tensor), TypeError, "Tensor"),
        (lambda t: t.empty(2**60), DeviceMemoryError, "no room for"),
        (lambda t: t.zeros(2, "float64"), DTypeError, "dtype='float64'"),
        (lambda t: t.zeros(2, "int8").fill(128), DTypeError, "-128 to 127"),
        (lambda t: t.full(2, 0.5, "uint8"), DTypeError, "whole numbers"),
        (lambda t: t.zeros(2, device="cuda"), DeviceError, "no CUDA"),
        (lambda t: t.zeros(2, device="cuda:0x"), DeviceError, "use 'cpu'"),
        (lambda t: t.zeros(2, device="gpu"), DeviceError, "use 'cpu'"),
        (lambda t: t.zeros(2).to("cuda:3"), DeviceError, "no CUDA"),
        (lambda t: t.zeros((2, 3)).view(4), ShapeError, "6 elements"),
        (lambda t: t.zeros((2, 3)).view(-1, -1), ShapeError, "one may be -1"),
        (lambda t: t.zeros((2, 3)).permute(0, 0), ShapeError, "each of the 2 axes once"),
        (lambda t: t.zeros((2, 3)).transpose(0, 2), ShapeError, "axis=2"),
        (lambda t: t.zeros((2, 3)).copy_from(t.zeros((3, 2))), ShapeError, "target has shape"),
        (lambda t: t.zeros(2)[2], IndexError, "axis 0 has 2"),
        (lambda t: t.zeros(2)[2**70], IndexError, "index"),
        (lambda t: t.zeros(2)[np.arange(2)], TypeError, "integer"),
        (lambda t: t.zeros(2)[0, 0], IndexError, "1 axes"),
        (lambda t: t.zeros((2, 2))[..., ...], IndexError, "at most one"),
        (lambda t: t.zeros(2)["x"], TypeError, "integers, slices"),
        (lambda t: t.from_numpy([1.0]), TypeError, "ndarray"),
        (lambda t: t.from_numpy(np.zeros(2)), DTypeError, "float64"),
        (lambda t: t.from_numpy(np.zeros(2, np.uint16)), DTypeError, "bfloat16"),
    ],
)
def test_bad_input_gets_an_error_that_says_what_to_do(tensors, call, error, words):
    with pytest.raises(error, match=words):
        call(tensors)


def test_native_errors_are_one_family_and_pickle(tensors):
    import pickle

    with pytest.raises(NativeError) as caught:
        tensors.zeros(2, "float64")
    again = pickle.loads(pickle.dumps(caught.value))
    assert (type(again), str(again), again.http_status) == (DTypeError, str(caught.value), 400)


def test_a_cpu_build_has_no_devices_and_says_so(native):
    assert (native.devices(), native.device_count(), native.cuda_version()) == ([], 0, 0)
    for call in (native.synchronize, native.set_current_device, native.pool_use, native.trim_pool):
        with pytest.raises(DeviceError, match="no CUDA"):
            call(0)
