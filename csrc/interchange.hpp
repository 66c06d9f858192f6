// NumPy, the CUDA array interface, and how Python names types and devices.
#pragma once
#include <pybind11/pybind11.h>

#include "tensor.hpp"

namespace lltm_ray {

DType parse_dtype(const pybind11::handle &given);   // "float32", numpy.float32, numpy's, CuPy's and PyTorch's dtypes
Place parse_device(const pybind11::handle &given);  // "cpu", "cuda:0", torch.device
Dims parse_dims(const pybind11::handle &given);     // a sequence of integers, or one
// TypeError for what is no integer, `too_large` for one of more than 64 bits.
std::int64_t parse_index(const pybind11::handle &given, PyObject *too_large);
Stream parse_stream(Stream given);  // 1 is another name of 0; the thread's own default stream, 2, is refused
pybind11::tuple as_tuple(const Dims &dims);

Tensor from_numpy(const pybind11::object &array, const pybind11::object &device, const pybind11::object &dtype,
                  Stream stream);
pybind11::object to_numpy(const Tensor &tensor, Stream stream);

Tensor from_cuda_array(const pybind11::object &source, Stream stream);
pybind11::dict cuda_array_interface(const Tensor &tensor);

}  // namespace lltm_ray
