#include "dlpack.hpp"

#include "error.hpp"

namespace py = pybind11;

namespace lltm_ray {
namespace {

constexpr const char *kPlain = "dltensor", *kVersioned = "dltensor_versioned";
constexpr DLDataType kTypes[] = {{kDLFloat, 32, 1}, {kDLFloat, 16, 1}, {kDLBfloat, 16, 1},
                                 {kDLInt, 32, 1},   {kDLInt, 8, 1},    {kDLUInt, 8, 1}};

// What a consumer holds until it calls the deleter.
template <class Managed>
struct Export {
  Tensor tensor;
  Managed managed{};
};

template <class Managed>
void release_export(Managed *managed) {
  delete static_cast<Export<Managed> *>(managed->context);
}

template <class Managed>
void drop_unused(PyObject *capsule, const char *name) {
  if (!PyCapsule_IsValid(capsule, name)) return;  // a consumer has renamed it, and will call the deleter
  auto *managed = static_cast<Managed *>(PyCapsule_GetPointer(capsule, name));
  if (managed->deleter) managed->deleter(managed);
}

template <class Managed>
py::object make_capsule(const Tensor &tensor, Managed header, const char *name, PyCapsule_Destructor drop) {
  auto made = std::make_unique<Export<Managed>>();
  made->tensor = tensor;
  made->managed = header;
  Tensor &held = made->tensor;
  const Place place = held.place();
  made->managed.context = made.get();
  made->managed.deleter = release_export<Managed>;
  made->managed.tensor = {held.data,
                          {place.on_cpu() ? kDLCPU : kDLCUDA, place.on_cpu() ? 0 : place.cuda},
                          held.shape.rank,
                          kTypes[static_cast<int>(held.dtype)],
                          held.shape.at,
                          held.strides.at,
                          0};
  auto capsule = py::reinterpret_steal<py::object>(PyCapsule_New(&made->managed, name, drop));
  if (!capsule) throw py::error_already_set();
  made.release();
  return capsule;
}

// Lets the consumer's stream wait for what is queued on the tensor.
void hand_over(const Tensor &tensor, const py::object &stream) {
  if (tensor.place().on_cpu()) {
    if (!stream.is_none()) fail(ErrorKind::device, "stream: memory of the CPU has none; pass None");
    return;
  }
  const auto number = stream.is_none() ? std::int64_t(1) : stream.cast<std::int64_t>();
  if (number < -1) {
    fail(ErrorKind::device, "stream=" + std::to_string(number) + ": use 1 for the default stream, -1 for no waiting");
  }
  const Stream consumer = number == 1 ? 0 : static_cast<Stream>(number);  // 0 is ambiguous, and taken for the default
  if (number != -1 && consumer == tensor.storage->home) return;
  tensor.storage->share();
  if (number != -1) order_streams(tensor.place(), tensor.storage->home, tensor.place(), consumer);
}

bool wants_version_1(const py::object &max_version) {
  return !max_version.is_none() && max_version.cast<py::tuple>()[0].cast<int>() >= 1;
}

DType dtype_of(DLDataType found) {
  for (int each = 0; each < 6; ++each) {
    if (!std::memcmp(&kTypes[each], &found, sizeof(found))) return static_cast<DType>(each);
  }
  fail(ErrorKind::dtype, "DLPack type (code " + std::to_string(found.code) + ", " + std::to_string(found.bits) +
                             " bits): use float32, float16, bfloat16, int32, int8 or uint8");
}

Place place_of_device(DLDevice device) {
  if (device.type == kDLCPU || device.type == kDLCUDAHost) return {};
  if (device.type == kDLCUDA || device.type == kDLCUDAManaged) return parse_place("cuda:" + std::to_string(device.id));
  fail(ErrorKind::device, "DLPack device type " + std::to_string(device.type) + ": use memory of the CPU or of CUDA");
}

template <class Managed>
Tensor take(const py::object &capsule, const char *name, const char *used, Stream stream) {
  auto *managed = static_cast<Managed *>(PyCapsule_GetPointer(capsule.ptr(), name));
  if (!managed) throw py::error_already_set();
  const DLTensor &found = managed->tensor;
  if (found.ndim < 0 || found.ndim > kMaxRank) {
    fail(ErrorKind::shape, "the array has " + std::to_string(found.ndim) + " axes; at most 8 are supported");
  }
  Tensor tensor;
  tensor.dtype = dtype_of(found.dtype);
  for (int axis = 0; axis < found.ndim; ++axis) tensor.shape.push(found.shape[axis]);
  tensor.data = static_cast<char *>(found.data) + (found.data ? found.byte_offset : 0);
  require_aligned(tensor);
  tensor.strides = packed_strides(tensor.shape);
  for (int axis = 0; axis < found.ndim && found.strides; ++axis) tensor.strides[axis] = found.strides[axis];
  if constexpr (std::is_same_v<Managed, DLManagedTensorVersioned>) tensor.readonly = managed->flags & kDLReadOnly;
  const Place place = place_of_device(found.device);
  if (PyCapsule_SetName(capsule.ptr(), used)) throw py::error_already_set();  // the deleter is ours to call now
  tensor.storage = Storage::wrap(place, found.data, stream, [managed] {
    if (managed->deleter && Py_IsInitialized()) managed->deleter(managed);
  });
  return tensor;
}

}  // namespace

py::object to_dlpack(Tensor tensor, const py::object &stream, const py::object &max_version,
                     const py::object &dl_device, const py::object &copy) {
  const bool must_copy = !copy.is_none() && copy.cast<bool>(), may_copy = copy.is_none() || must_copy;
  Place place = tensor.place();
  if (!dl_device.is_none()) {
    const auto wanted = dl_device.cast<std::pair<int, int>>();
    place = place_of_device({wanted.first, wanted.second});
  }
  const bool copied = place != tensor.place() || must_copy;
  if (copied && !may_copy) throw py::buffer_error("dl_device: the tensor is elsewhere, and copy=False");
  if (copied) {
    const py::gil_scoped_release work;
    Tensor made = make_tensor(tensor.shape, tensor.dtype, place, 0);
    lltm_ray::copy(made, tensor, 0);
    tensor = made;
  }
  // A copy to the CPU is whole already, whatever stream was named for the device.
  hand_over(tensor, copied && place.on_cpu() ? py::none() : stream);
  if (wants_version_1(max_version)) {
    DLManagedTensorVersioned header{};
    header.major = 1;
    header.flags = (tensor.readonly ? kDLReadOnly : 0) | (copied ? kDLCopied : 0);
    return make_capsule(tensor, header, kVersioned,
                        [](PyObject *capsule) { drop_unused<DLManagedTensorVersioned>(capsule, kVersioned); });
  }
  if (tensor.readonly) throw py::buffer_error("the tensor is read-only, which DLPack says from version 1.0 on");
  return make_capsule(tensor, DLManagedTensor{}, kPlain,
                      [](PyObject *capsule) { drop_unused<DLManagedTensor>(capsule, kPlain); });
}

Tensor from_dlpack(const py::object &source, Stream stream) {
  if (!py::hasattr(source, "__dlpack__") || !py::hasattr(source, "__dlpack_device__")) {
    throw py::type_error("from_dlpack needs an object with __dlpack__ and __dlpack_device__");
  }
  const auto device = source.attr("__dlpack_device__")().cast<std::pair<int, int>>();
  const Place place = place_of_device({device.first, device.second});
  py::dict wanted;
  if (!place.on_cpu()) wanted["stream"] = stream == 0 ? Stream(1) : stream;
  const py::object make = source.attr("__dlpack__");
  py::object capsule;
  try {
    py::dict newest = wanted.attr("copy")();
    newest["max_version"] = py::make_tuple(1, 0);
    capsule = make(**newest);
  } catch (py::error_already_set &error) {  // producers older than 1.0 do not know the argument
    if (!error.matches(PyExc_TypeError)) throw;
    capsule = make(**wanted);
  }
  if (PyCapsule_IsValid(capsule.ptr(), kVersioned)) {
    const auto *managed = static_cast<DLManagedTensorVersioned *>(PyCapsule_GetPointer(capsule.ptr(), kVersioned));
    if (managed->major != 1) fail(ErrorKind::native, "DLPack version " + std::to_string(managed->major) + " is not 1");
    return take<DLManagedTensorVersioned>(capsule, kVersioned, "used_dltensor_versioned", stream);
  }
  return take<DLManagedTensor>(capsule, kPlain, "used_dltensor", stream);
}

}  // namespace lltm_ray
