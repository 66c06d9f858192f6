#include <string_view>

#include "bindings.hpp"
#include "error.hpp"
#include "interchange.hpp"
#include "matmul.hpp"

namespace py = pybind11;

namespace lltm_ray {
namespace {

Activation parse_activation(std::string_view text) {
  if (text == "none") return Activation::none;
  if (text == "relu") return Activation::relu;
  if (text == "gelu") return Activation::gelu;
  fail(ErrorKind::native, "activation='" + std::string(text) + "': use 'none', 'relu' or 'gelu'");
}

// Where pip's packages of NVIDIA put the library: nvidia/cu13/lib, nvidia/cublas/lib.
void find_cublaslt() {
  std::vector<std::string> folders;
  const py::object spec = py::module_::import("importlib.util").attr("find_spec")("nvidia");
  if (!spec.is_none() && !spec.attr("submodule_search_locations").is_none()) {
    for (const py::handle folder : spec.attr("submodule_search_locations")) {
      for (const char *inner : {"/cu13/lib", "/cublas/lib"}) folders.push_back(std::string(py::str(folder)) + inner);
    }
  }
  const py::gil_scoped_release work;
  load_cublaslt(folders);
}

using Multiply = Tensor (*)(const Tensor &, const Tensor &, const MatmulOptions &);

py::object multiply(Multiply function, const Tensor &a, const Tensor &b, const MatmulOptions &options) {
  if (!a.storage->place.on_cpu() && !cublaslt_loaded()) find_cublaslt();
  Tensor made;
  {
    const py::gil_scoped_release work;
    made = function(a, b, options);
  }
  return py::cast(std::move(made));
}

bool truth(PyObject *value) {
  const int found = PyObject_IsTrue(value);
  if (found < 0) throw py::error_already_set();
  return found != 0;
}

Tensor *optional_tensor(PyObject *value) { return value == Py_None ? nullptr : &py::cast<Tensor &>(py::handle(value)); }

std::string_view text(PyObject *value) {
  Py_ssize_t size = 0;
  const char *data = PyUnicode_Check(value) ? PyUnicode_AsUTF8AndSize(value, &size) : nullptr;
  if (!data) throw py::type_error("activation needs a string");
  return {data, static_cast<std::size_t>(size)};
}

void set_option(MatmulOptions &options, std::string_view name, PyObject *value) {
  if (name == "out") {
    options.out = optional_tensor(value);
  } else if (name == "bias") {
    options.bias = optional_tensor(value);
  } else if (name == "stream") {
    const std::size_t number = PyLong_AsSize_t(value);
    if (number == static_cast<std::size_t>(-1) && PyErr_Occurred()) throw py::error_already_set();
    options.stream = parse_stream(number);
  } else if (name == "activation") {
    options.activation = parse_activation(text(value));
  } else if (name == "tf32") {
    options.tf32 = truth(value);
  } else if (name == "tune") {
    options.tune = truth(value);
  } else if (name == "transpose_a") {
    options.transpose_a = truth(value);
  } else if (name == "transpose_b") {
    options.transpose_b = truth(value);
  } else {
    throw py::type_error("unexpected keyword argument '" + std::string(name) + "'");
  }
}

// Python's own calling convention instead of pybind11's: a small product takes less time on a GPU than pybind11 takes
// for ten arguments.
template <Multiply function>
PyObject *call(PyObject *, PyObject *const *given, Py_ssize_t count, PyObject *names) {
  try {
    if (count != 2) throw py::type_error("two factors are needed, a and b; the rest is given by name");
    MatmulOptions options;
    for (Py_ssize_t each = 0, end = names ? PyTuple_GET_SIZE(names) : 0; each < end; ++each) {
      set_option(options, text(PyTuple_GET_ITEM(names, each)), given[count + each]);
    }
    return multiply(function, py::cast<const Tensor &>(py::handle(given[0])),
                    py::cast<const Tensor &>(py::handle(given[1])), options)
        .release()
        .ptr();
  } catch (const Error &error) {
    set_error(error);
  } catch (py::error_already_set &error) {
    error.restore();
  } catch (const py::cast_error &) {
    PyErr_SetString(PyExc_TypeError,
                    "factors, bias and out are Tensors: use from_numpy, from_dlpack or from_cuda_array");
  } catch (const py::builtin_exception &error) {
    error.set_error();
  } catch (const std::exception &error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

template <Multiply function>
void bind(py::module_ &module, const char *name) {
  static PyMethodDef method{name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&call<function>)),
                            METH_FASTCALL | METH_KEYWORDS, nullptr};
  module.attr(name) =
      py::reinterpret_steal<py::object>(PyCFunction_NewEx(&method, nullptr, module.attr("__name__").ptr()));
}

}  // namespace

void bind_matmul(py::module_ &module) {
  bind<&matmul>(module, "matmul");
  bind<&batched_matmul>(module, "batched_matmul");
  module.attr("Tensor").attr("__matmul__") = py::cpp_function(
      [](const Tensor &a, const Tensor &b) {
        return multiply(a.shape.rank == 3 ? &batched_matmul : &matmul, a, b, {});
      },
      py::is_method(module.attr("Tensor")));
#ifdef LLTM_RAY_CUDA
  py::module_::import("atexit").attr("register")(py::cpp_function(&cuda::release_matmul));
  module.def(
      "plan_count", [](int index) { return cuda::plans(parse_place("cuda:" + std::to_string(index)).cuda); },
      py::arg("index"));
#else
  module.def("plan_count", [](int) { return std::size_t(0); }, py::arg("index"));
#endif
}

}  // namespace lltm_ray
