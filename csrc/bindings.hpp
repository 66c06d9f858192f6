// The parts of the module, and what they share.
#pragma once
#include <pybind11/pybind11.h>

namespace lltm_ray {

void bind_tensor(pybind11::module_ &module);
void bind_matmul(pybind11::module_ &module);
void set_error(const class Error &error) noexcept;  // as the class of lltm_ray.errors that it stands for

// Only C++ makes objects of the class: `Class.__new__(Class)` of pybind11 is one of uninitialised memory.
inline void forbid_new(const pybind11::handle &type) {
  auto *made = reinterpret_cast<PyTypeObject *>(type.ptr());
  made->tp_new = nullptr;
  PyType_Modified(made);
}

}  // namespace lltm_ray
