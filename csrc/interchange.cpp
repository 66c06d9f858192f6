#include "interchange.hpp"

#include <pybind11/numpy.h>

#include "error.hpp"

namespace py = pybind11;

namespace lltm_ray {
namespace {

constexpr const char *kTypeStrings[] = {"<f4", "<f2", "", "<i4", "|i1", "|u1"};
constexpr const char *kNumpyNames[] = {"float32", "float16", "uint16", "int32", "int8", "uint8"};

// Keeps a Python object until the last tensor of its memory is gone, on whatever thread that is.
std::function<void()> keep(py::object owner) {
  PyObject *held = owner.release().ptr();
  return [held] {
    if (!Py_IsInitialized()) return;
    const py::gil_scoped_acquire gil;
    Py_DECREF(held);
  };
}

Tensor view_of(const py::array &array, DType dtype) {
  Tensor tensor;
  tensor.dtype = dtype;
  for (py::ssize_t axis = 0; axis < array.ndim(); ++axis) tensor.shape.push(array.shape(axis));
  tensor.strides = packed_strides(tensor.shape);
  tensor.data = static_cast<char *>(const_cast<void *>(array.data()));
  tensor.storage = Storage::wrap({}, tensor.data, 0, [] {});  // the caller holds the array
  return tensor;
}

DType find_type(const std::string &text, const char *const *names) {
  for (int each = 0; each < 6; ++each) {
    if (text == names[each]) return static_cast<DType>(each);
  }
  fail(ErrorKind::dtype, "type '" + text + "': use float32, float16, bfloat16, int32, int8 or uint8");
}

// bfloat16 of the package ml_dtypes where that is installed; the bits as uint16 where not.
py::object with_bfloat16(const py::array &bits) {
  try {
    return bits.attr("view")(py::module_::import("ml_dtypes").attr("bfloat16"));
  } catch (py::error_already_set &error) {
    if (!error.matches(PyExc_ModuleNotFoundError)) throw;
    return bits;
  }
}

// Lets `stream` wait for the producer, as far as its interface says what to wait for.
void wait_for_producer(const py::dict &interface, Place place, Stream stream) {
  if (interface["version"].cast<int>() < 3) {  // it does not: on all of the device
    const py::gil_scoped_release work;
    return synchronize(place.cuda);
  }
  if (!interface.contains("stream") || interface["stream"].is_none()) return;
  const auto producer = interface["stream"].cast<Stream>();
  if (producer == 0) fail(ErrorKind::device, "stream=0 of the CUDA array interface is ambiguous: use 1 or 2");
  const Stream before = producer == 1 ? 0 : producer;
  if (before != stream) order_streams(place, before, place, stream);
}

}  // namespace

DType parse_dtype(const py::handle &given) {
  std::string text;
  if (!py::isinstance<py::str>(given) && py::hasattr(given, "name")) {
    text = py::str(given.attr("name"));
  } else if (py::hasattr(given, "__name__")) {
    text = py::str(given.attr("__name__"));
  } else {
    text = py::str(given);
  }
  if (text.compare(0, 6, "torch.") == 0) text.erase(0, 6);
  for (int each = 0; each < 6; ++each) {
    if (text == name(static_cast<DType>(each))) return static_cast<DType>(each);
  }
  fail(ErrorKind::dtype, "dtype='" + text + "': use float32, float16, bfloat16, int32, int8 or uint8");
}

Place parse_device(const py::handle &given) { return parse_place(py::str(given)); }

std::int64_t parse_index(const py::handle &given, PyObject *too_large) {
  const Py_ssize_t found = PyNumber_AsSsize_t(given.ptr(), too_large);
  if (found == -1 && PyErr_Occurred()) throw py::error_already_set();
  return found;
}

Dims parse_dims(const py::handle &given) {
  Dims dims;
  if (PyIndex_Check(given.ptr())) {
    dims.push(parse_index(given, PyExc_OverflowError));
    return dims;
  }
  for (const py::handle size : py::reinterpret_borrow<py::object>(given)) {
    if (dims.rank == kMaxRank) fail(ErrorKind::shape, "more than 8 axes are not supported");
    dims.push(parse_index(size, PyExc_OverflowError));
  }
  return dims;
}

Stream parse_stream(Stream given) {
  if (given == 2) {  // tensors outlive the thread's view of it
    fail(ErrorKind::device,
         "stream=2: the thread's own default stream means another one on each thread; make a stream");
  }
  return given == 1 ? 0 : given;
}

py::tuple as_tuple(const Dims &dims) {
  py::tuple found(dims.rank);
  for (int axis = 0; axis < dims.rank; ++axis) found[axis] = py::int_(dims[axis]);
  return found;
}

Tensor from_numpy(const py::object &given, const py::object &device, const py::object &dtype, Stream stream) {
  if (!py::isinstance<py::array>(given)) throw py::type_error("from_numpy needs a numpy.ndarray");
  py::object array = given;
  if (!array.attr("dtype").attr("isnative").cast<bool>()) {
    array = array.attr("astype")(array.attr("dtype").attr("newbyteorder")("="));
  }
  array = py::module_::import("numpy").attr("asarray")(array, py::arg("order") = "C");
  if (!array.attr("flags").attr("aligned").cast<bool>()) array = array.attr("copy")();
  const std::string found = py::str(array.attr("dtype").attr("name"));
  const Place place = parse_device(device);
  const bool bits = found == "uint16" && !dtype.is_none() && parse_dtype(dtype) == DType::bfloat16;
  if (found == "uint16" && !bits)
    fail(ErrorKind::dtype, "type 'uint16': pass dtype='bfloat16' when these are its bits");
  const DType source = bits || found == "bfloat16" ? DType::bfloat16 : find_type(found, kNumpyNames);
  const DType target = dtype.is_none() ? source : parse_dtype(dtype);
  const auto held = array.cast<py::array>();
  if (held.ndim() > kMaxRank) fail(ErrorKind::shape, "more than 8 axes are not supported");
  const Tensor view = view_of(held, source);
  const py::gil_scoped_release work;
  Tensor made = make_tensor(view.shape, target, place, stream);
  copy(made, view, stream);
  return made;
}

py::object to_numpy(const Tensor &tensor, Stream stream) {
  const py::array made(py::dtype(kNumpyNames[static_cast<int>(tensor.dtype)]),
                       std::vector<py::ssize_t>(tensor.shape.at, tensor.shape.at + tensor.shape.rank));
  Tensor view = view_of(made, tensor.dtype);
  {
    const py::gil_scoped_release work;
    copy(view, tensor, stream);
  }
  return tensor.dtype == DType::bfloat16 ? with_bfloat16(made) : py::object(made);
}

Tensor from_cuda_array(const py::object &source, Stream stream) {
  const auto found = source.attr("__cuda_array_interface__").cast<py::dict>();
  if (found.contains("mask") && !found["mask"].is_none()) {
    fail(ErrorKind::dtype, "arrays with a mask are not supported");
  }
  const auto data = found["data"].cast<std::pair<std::uintptr_t, bool>>();
  Tensor tensor;
  tensor.dtype = find_type(found["typestr"].cast<std::string>(), kTypeStrings);
  tensor.shape = parse_dims(found["shape"]);
  tensor.data = reinterpret_cast<char *>(data.first);
  tensor.readonly = data.second;
  const std::int64_t count = tensor.count();
  require_aligned(tensor);
  tensor.strides = packed_strides(tensor.shape);
  if (found.contains("strides") && !found["strides"].is_none()) {
    tensor.strides = parse_dims(found["strides"]);
    if (tensor.strides.rank != tensor.shape.rank) fail(ErrorKind::shape, "strides and shape differ in their length");
    for (int axis = 0; axis < tensor.shape.rank; ++axis) {
      if (tensor.strides[axis] % itemsize(tensor.dtype)) {
        fail(ErrorKind::shape, "strides that are no multiples of the element's size are not supported");
      }
      tensor.strides[axis] /= itemsize(tensor.dtype);
    }
  }
  const Place place = count == 0 ? parse_place("cuda") : place_of(tensor.data);
  if (count != 0) wait_for_producer(found, place, stream);
  tensor.storage = Storage::wrap(place, tensor.data, stream, keep(source));
  return tensor;
}

py::dict cuda_array_interface(const Tensor &tensor) {
  const char *type = kTypeStrings[static_cast<int>(tensor.dtype)];
  if (tensor.place().on_cpu()) throw py::attribute_error("__cuda_array_interface__: the tensor is on the CPU");
  if (!*type) throw py::attribute_error("__cuda_array_interface__ has no bfloat16: use from_dlpack");
  tensor.storage->share();
  py::dict found;
  found["version"] = 3;
  found["typestr"] = type;
  found["shape"] = as_tuple(tensor.shape);
  found["data"] = py::make_tuple(tensor.count() ? reinterpret_cast<std::uintptr_t>(tensor.data) : 0, tensor.readonly);
  found["strides"] = py::none();
  found["stream"] = tensor.storage->home == 0 ? Stream(1) : tensor.storage->home;
  if (tensor.packed()) return found;
  Dims bytes = tensor.strides;
  for (int axis = 0; axis < bytes.rank; ++axis) bytes[axis] *= itemsize(tensor.dtype);
  found["strides"] = as_tuple(bytes);
  return found;
}

}  // namespace lltm_ray
