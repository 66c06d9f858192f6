// DLPack's ABI, version 1.0, in both directions.
#pragma once
#include <pybind11/pybind11.h>

#include "tensor.hpp"

namespace lltm_ray {

enum : std::int32_t { kDLCPU = 1, kDLCUDA = 2, kDLCUDAHost = 3, kDLCUDAManaged = 13 };
enum : std::uint8_t { kDLInt = 0, kDLUInt = 1, kDLFloat = 2, kDLBfloat = 4 };
constexpr std::uint64_t kDLReadOnly = 1, kDLCopied = 2;

struct DLDevice {
  std::int32_t type, id;
};
struct DLDataType {
  std::uint8_t code, bits;
  std::uint16_t lanes;
};
struct DLTensor {
  void *data;
  DLDevice device;
  std::int32_t ndim;
  DLDataType dtype;
  std::int64_t *shape, *strides;
  std::uint64_t byte_offset;
};
struct DLManagedTensor {
  DLTensor tensor;
  void *context;
  void (*deleter)(DLManagedTensor *);
};
struct DLManagedTensorVersioned {
  std::uint32_t major, minor;
  void *context;
  void (*deleter)(DLManagedTensorVersioned *);
  std::uint64_t flags;
  DLTensor tensor;
};

// The arguments of `__dlpack__` as the array API standard has them.
pybind11::object to_dlpack(Tensor tensor, const pybind11::object &stream, const pybind11::object &max_version,
                           const pybind11::object &dl_device, const pybind11::object &copy);
// Memory of any object with `__dlpack__`, without a copy, ready for work on `stream`.
Tensor from_dlpack(const pybind11::object &source, Stream stream);

}  // namespace lltm_ray
