#include "bindings.hpp"

#include <pybind11/stl.h>

#include "error.hpp"
#include "interchange.hpp"
#include "matmul.hpp"

namespace py = pybind11;

namespace lltm_ray {

void set_error(const Error &error) noexcept try {
  static constexpr const char *kNames[] = {"NativeError", "DeviceError", "DeviceMemoryError", "ShapeError",
                                           "DTypeError"};
  const py::object kind = py::module_::import("lltm_ray.errors").attr(kNames[static_cast<int>(error.kind)]);
  PyErr_SetObject(kind.ptr(), kind(error.what()).ptr());
} catch (const std::exception &) {  // while the interpreter ends, modules are no longer there
  PyErr_SetString(PyExc_RuntimeError, error.what());
}

namespace {

// `with device:` makes it the thread's current one; uses may nest.
struct Entered : Device {
  std::vector<int> before;
};

void bind_device(py::module_ &module) {
  py::class_<Entered> made(module, "Device",
                           "One GPU as the CUDA runtime shows it; `with device:` makes it the current one.");
  forbid_new(made);
  made.def_readonly("index", &Entered::index)
      .def_readonly("name", &Entered::name)
      .def_readonly("multiprocessors", &Entered::multiprocessors)
      .def_readonly("max_threads_per_block", &Entered::max_threads_per_block)
      .def_readonly("max_threads_per_multiprocessor", &Entered::max_threads_per_multiprocessor)
      .def_readonly("warp_size", &Entered::warp_size)
      .def_readonly("shared_bytes_per_block", &Entered::shared_bytes_per_block)
      .def_readonly("l2_bytes", &Entered::l2_bytes)
      .def_readonly("total_bytes", &Entered::total_bytes)
      .def_readonly("free_bytes", &Entered::free_bytes)
      .def_property_readonly("compute_capability",
                             [](const Entered &self) {
                               return py::make_tuple(self.compute_capability_major, self.compute_capability_minor);
                             })
      .def("__enter__",
           [](py::object self) {
             auto &entered = self.cast<Entered &>();
             entered.before.push_back(current_device());
             set_current_device(entered.index);
             return self;
           })
      .def("__exit__",
           [](Entered &self, const py::args &) {
             if (self.before.empty()) return;
             const int before = self.before.back();
             self.before.pop_back();
             set_current_device(before);
           })
      .def("__repr__", [](const Entered &self) {
        return "Device(index=" + std::to_string(self.index) + ", name='" + self.name + "')";
      });
  module.def("devices", [] {
    std::vector<Device> found;
    {
      const py::gil_scoped_release work;
      found = devices();
    }
    std::vector<Entered> made;
    for (const Device &device : found) made.push_back({device, {}});
    return made;
  });
}

int check_index(int index) {
  parse_place("cuda:" + std::to_string(index));
  return index;
}

void bind_memory(py::module_ &module) {
  const auto free_gil = py::call_guard<py::gil_scoped_release>();
  module.def("cuda_version", &cuda_version);
  module.def("device_count", &device_count, free_gil);
  module.def("current_device", &current_device);
  module.def("set_current_device", [](int index) { set_current_device(check_index(index)); }, py::arg("index"));
  module.def("synchronize", [](int index) { synchronize(check_index(index)); }, py::arg("index"), free_gil);
  module.def(
      "synchronize_stream",
      [](int index, Stream stream) { synchronize_stream(check_index(index), parse_stream(stream)); }, py::arg("index"),
      py::arg("stream"), free_gil);
  module.def(
      "pool_use",
      [](int index) {
        const PoolUse found = pool_use(check_index(index));
        py::dict use;
        use["used_bytes"] = found.used_bytes;
        use["used_high_bytes"] = found.used_high_bytes;
        use["reserved_bytes"] = found.reserved_bytes;
        use["reserved_high_bytes"] = found.reserved_high_bytes;
        return use;
      },
      py::arg("index"));
  module.def("trim_pool", [](int index) { trim_pool(check_index(index)); }, py::arg("index"), free_gil);
}

}  // namespace
}  // namespace lltm_ray

PYBIND11_MODULE(_native, module) {
  module.doc() = "Native part of lltm_ray: devices, tensors and products; on the CPU, and with CUDA where built so.";
  py::register_local_exception_translator([](std::exception_ptr caught) {
    try {
      std::rethrow_exception(caught);
    } catch (const lltm_ray::Error &error) {
      lltm_ray::set_error(error);
    }
  });
  lltm_ray::bind_device(module);
  lltm_ray::bind_memory(module);
  lltm_ray::bind_tensor(module);
  lltm_ray::bind_matmul(module);
}
