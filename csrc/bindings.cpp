#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "device.hpp"

namespace py = pybind11;
using lltm_ray::Device;

PYBIND11_MODULE(_native, module) {
  module.doc() = "Native part of lltm_ray: device discovery through the CUDA runtime.";
  py::class_<Device>(module, "Device", "One GPU as the CUDA runtime shows it.")
      .def_readonly("index", &Device::index)
      .def_readonly("name", &Device::name)
      .def_property_readonly("compute_capability",
                             [](const Device &device) {
                               return py::make_tuple(device.compute_capability_major, device.compute_capability_minor);
                             })
      .def_readonly("multiprocessors", &Device::multiprocessors)
      .def_readonly("total_bytes", &Device::total_bytes)
      .def_readonly("free_bytes", &Device::free_bytes)
      .def("__repr__", [](const Device &device) {
        return "Device(index=" + std::to_string(device.index) + ", name='" + device.name + "')";
      });
  module.def("cuda_version", &lltm_ray::cuda_version, "CUDA runtime version, 13000 for 13.0; 0 when built without CUDA.");
  module.def("devices", &lltm_ray::devices, py::call_guard<py::gil_scoped_release>(),
             "All devices this process may use, in CUDA's order; raises RuntimeError with CUDA's own words.");
}
