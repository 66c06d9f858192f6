#include "bindings.hpp"
#include "dlpack.hpp"
#include "error.hpp"
#include "interchange.hpp"

namespace py = pybind11;

namespace lltm_ray {
namespace {

Slice parse_slice(const py::handle &entry, std::int64_t size, int axis) {
  Slice slice;
  if (PyIndex_Check(entry.ptr())) {
    const std::int64_t at = parse_index(entry, PyExc_IndexError);
    if (at < -size || at >= size) {  // IndexError ends Python's iteration
      throw py::index_error("index " + std::to_string(at) + ": axis " + std::to_string(axis) + " has " +
                            std::to_string(size) + " elements");
    }
    slice.integer = true;
    slice.start = at < 0 ? at + size : at;
    return slice;
  }
  if (!PySlice_Check(entry.ptr())) throw py::type_error("an index is made of integers, slices and one '...'");
  py::ssize_t start, stop, step;
  if (PySlice_Unpack(entry.ptr(), &start, &stop, &step)) throw py::error_already_set();
  slice.count = PySlice_AdjustIndices(size, &start, &stop, step);
  slice.start = start;
  slice.step = step;
  return slice;
}

Tensor get_item(const Tensor &tensor, const py::object &index) {
  const auto entries = py::isinstance<py::tuple>(index) ? index.cast<py::tuple>() : py::make_tuple(index);
  int given = 0;
  for (const py::handle entry : entries) given += !py::isinstance<py::ellipsis>(entry);
  const int rank = tensor.shape.rank, hidden = rank - given;
  if (hidden < 0) {
    throw py::index_error("an index of " + std::to_string(given) + " entries: the tensor has " + std::to_string(rank) +
                          " axes");
  }
  if (static_cast<int>(entries.size()) > given + 1) throw py::index_error("an index has at most one '...'");
  Slice slices[kMaxRank];
  int axis = 0;
  for (const py::handle entry : entries) {
    if (py::isinstance<py::ellipsis>(entry)) {
      for (int skipped = 0; skipped < hidden; ++skipped, ++axis) slices[axis] = {false, 0, 1, tensor.shape[axis]};
    } else {
      slices[axis] = parse_slice(entry, tensor.shape[axis], axis);
      ++axis;
    }
  }
  return sliced(tensor, slices, axis);
}

Dims parse_sizes(const py::args &sizes) {
  return sizes.size() == 1 && !PyIndex_Check(py::handle(sizes[0]).ptr()) ? parse_dims(sizes[0]) : parse_dims(sizes);
}

Tensor turned(const Tensor &tensor) {
  Dims axes;
  for (int axis = tensor.shape.rank - 1; axis >= 0; --axis) axes.push(axis);
  return permuted(tensor, axes);
}

Tensor transposed(const Tensor &tensor, std::int64_t first, std::int64_t second) {
  Dims axes;
  for (int axis = 0; axis < tensor.shape.rank; ++axis) axes.push(axis);
  std::swap(axes[wrap_axis(first, axes.rank)], axes[wrap_axis(second, axes.rank)]);
  return permuted(tensor, axes);
}

Tensor to(const Tensor &tensor, const py::object &device, const py::object &dtype, Stream stream) {
  const Place place = device.is_none() ? tensor.place() : parse_device(device);
  const DType type = dtype.is_none() ? tensor.dtype : parse_dtype(dtype);
  const py::gil_scoped_release work;
  return converted(tensor, place, type, parse_stream(stream));
}

py::object item(const Tensor &tensor) {
  if (tensor.count() != 1) fail(ErrorKind::shape, "item() needs one element; shape " + tensor.shape.text());
  Tensor wide = tensor;
  {
    const py::gil_scoped_release work;
    wide = converted(tensor, {}, is_float(tensor.dtype) ? DType::float32 : DType::int32, tensor.storage->home);
  }
  if (is_float(tensor.dtype)) return py::float_(*reinterpret_cast<const float *>(wide.data));
  return py::int_(*reinterpret_cast<const std::int32_t *>(wide.data));
}

py::object as_array(const Tensor &tensor, const py::object &dtype, const py::object &copy) {
  if (!copy.is_none() && !copy.cast<bool>()) {
    throw py::value_error("numpy.asarray(tensor, copy=False) is numpy.from_dlpack(tensor)");
  }
  py::object made = to_numpy(tensor, tensor.storage->home);
  return dtype.is_none() ? made : made.attr("astype")(dtype);
}

std::string text(const Tensor &tensor) {
  return "Tensor(shape=" + tensor.shape.text() + ", dtype='" + name(tensor.dtype) + "', device='" +
         tensor.place().text() + "'" + (tensor.packed() ? "" : ", strides=" + tensor.strides.text()) + ")";
}

Tensor make_filled(const py::object &shape, double value, const py::object &dtype, const py::object &device,
                   Stream stream) {
  const Dims dims = parse_dims(shape);
  const DType type = parse_dtype(dtype);
  const Place place = parse_device(device);
  const Value bits = value_of(value, type);
  const py::gil_scoped_release work;
  Tensor made = make_tensor(dims, type, place, parse_stream(stream));
  fill(made, bits, parse_stream(stream));
  return made;
}

void bind_makers(py::module_ &module) {
  const auto shape = py::arg("shape"), source = py::arg("source");
  const auto dtype = py::arg("dtype") = "float32";
  const auto device = py::arg("device") = "cpu";
  const auto stream = py::arg("stream") = 0;
  const py::kw_only named;
  module.def(
      "empty",
      [](const py::object &shape, const py::object &dtype, const py::object &device, Stream stream) {
        const Dims dims = parse_dims(shape);
        const DType type = parse_dtype(dtype);
        const Place place = parse_device(device);
        const py::gil_scoped_release work;
        return make_tensor(dims, type, place, parse_stream(stream));
      },
      shape, dtype, device, named, stream);
  module.def(
      "zeros",
      [](const py::object &shape, const py::object &dtype, const py::object &device, Stream stream) {
        return make_filled(shape, 0, dtype, device, stream);
      },
      shape, dtype, device, named, stream);
  module.def(
      "ones",
      [](const py::object &shape, const py::object &dtype, const py::object &device, Stream stream) {
        return make_filled(shape, 1, dtype, device, stream);
      },
      shape, dtype, device, named, stream);
  module.def("full", &make_filled, shape, py::arg("value"), dtype, device, named, stream);
  module.def(
      "from_numpy",
      [](const py::object &array, const py::object &device, const py::object &dtype, Stream stream) {
        return from_numpy(array, device, dtype, parse_stream(stream));
      },
      py::arg("array"), device, py::arg("dtype") = py::none(), named, stream);
  module.def(
      "from_dlpack", [](const py::object &source, Stream stream) { return from_dlpack(source, parse_stream(stream)); },
      source, named, stream);
  module.def(
      "from_cuda_array",
      [](const py::object &source, Stream stream) { return from_cuda_array(source, parse_stream(stream)); }, source,
      named, stream);
}

}  // namespace

void bind_tensor(py::module_ &module) {
  const auto stream = py::arg("stream") = 0;
  const py::kw_only named;
  py::class_<Tensor> tensor(module, "Tensor", "A strided view of a block of memory on one device.");
  forbid_new(tensor);
  tensor.def_property_readonly("shape", [](const Tensor &self) { return as_tuple(self.shape); })
      .def_property_readonly("strides", [](const Tensor &self) { return as_tuple(self.strides); })
      .def_property_readonly("dtype", [](const Tensor &self) { return name(self.dtype); })
      .def_property_readonly("device", [](const Tensor &self) { return self.place().text(); })
      .def_property_readonly("ndim", [](const Tensor &self) { return self.shape.rank; })
      .def_property_readonly("size", &Tensor::count)
      .def_property_readonly("itemsize", [](const Tensor &self) { return itemsize(self.dtype); })
      .def_property_readonly("nbytes", &Tensor::nbytes)
      .def_property_readonly("data_ptr", [](const Tensor &self) { return reinterpret_cast<std::uintptr_t>(self.data); })
      .def_property_readonly("is_contiguous", &Tensor::packed)
      .def_property_readonly("is_readonly", [](const Tensor &self) { return self.readonly; })
      .def_property_readonly("T", &turned)
      .def("view", [](const Tensor &self, const py::args &sizes) { return reshaped(self, parse_sizes(sizes)); })
      .def("permute", [](const Tensor &self, const py::args &axes) { return permuted(self, parse_sizes(axes)); })
      .def("transpose", &transposed, py::arg("first"), py::arg("second"))
      .def(
          "contiguous",
          [](const Tensor &self, Stream stream) {
            const py::gil_scoped_release work;
            return packed_copy(self, parse_stream(stream));
          },
          named, stream)
      .def("to", &to, py::arg("device") = py::none(), py::arg("dtype") = py::none(), named, stream)
      .def(
          "copy_from",
          [](Tensor &self, const Tensor &source, Stream stream) {
            const py::gil_scoped_release work;
            copy(self, source, parse_stream(stream));
          },
          py::arg("source"), named, stream)
      .def(
          "fill",
          [](Tensor &self, double value, Stream stream) {
            const Value bits = value_of(value, self.dtype);
            const py::gil_scoped_release work;
            fill(self, bits, parse_stream(stream));
          },
          py::arg("value"), named, stream)
      .def(
          "to_numpy", [](const Tensor &self, Stream stream) { return to_numpy(self, parse_stream(stream)); }, named,
          stream)
      .def("item", &item)
      .def("__array__", &as_array, py::arg("dtype") = py::none(), py::arg("copy") = py::none())
      .def("__dlpack__", &to_dlpack, py::arg("stream") = py::none(), py::arg("max_version") = py::none(),
           py::arg("dl_device") = py::none(), py::arg("copy") = py::none())
      .def("__dlpack_device__",
           [](const Tensor &self) {
             const Place place = self.place();
             return py::make_tuple(place.on_cpu() ? +kDLCPU : +kDLCUDA, place.on_cpu() ? 0 : place.cuda);
           })
      .def_property_readonly("__cuda_array_interface__", &cuda_array_interface)
      .def("__getitem__", &get_item)
      .def("__len__",
           [](const Tensor &self) {
             if (self.shape.rank == 0) throw py::type_error("a tensor without axes has no length");
             return self.shape[0];
           })
      .def("__repr__", &text);
  bind_makers(module);
}

}  // namespace lltm_ray
