#include "cublaslt.hpp"

#include <dlfcn.h>

#include <atomic>
#include <cstdlib>
#include <mutex>
#include <vector>

#include "matmul.hpp"

namespace lltm_ray {
namespace {

const std::string kLibrary = "libcublasLt.so." + std::to_string(CUDART_VERSION / 1000);
std::atomic<const CublasLt *> loaded{nullptr};
std::mutex loading;

// The one that PyTorch or CuPy has opened comes first, so that a process has one.
void *open_library(const std::vector<std::string> &folders) {
  if (void *found = dlopen(kLibrary.c_str(), RTLD_NOW | RTLD_NOLOAD)) return found;
  std::vector<std::string> places;
  for (const std::string &folder : folders) places.push_back(folder + "/" + kLibrary);
  places.push_back(kLibrary);
  for (const char *variable : {"CUDA_HOME", "CUDA_PATH"}) {
    if (const char *home = std::getenv(variable)) places.push_back(std::string(home) + "/lib64/" + kLibrary);
  }
  places.push_back("/usr/local/cuda/lib64/" + kLibrary);
  std::string tried, why;
  for (const std::string &place : places) {
    if (void *found = dlopen(place.c_str(), RTLD_NOW | RTLD_LOCAL)) return found;
    const char *reason = dlerror();
    why = reason ? reason : "";
    tried += (tried.empty() ? "" : ", ") + place;
  }
  fail(ErrorKind::native, kLibrary + " is not here: install the PyPI package nvidia-cublas" +
                              (CUDART_VERSION < 13000 ? "-cu12" : "") + " or a CUDA toolkit; looked for " + tried +
                              " (" + why + ")");
}

template <class Function>
void find(void *library, const char *symbol, Function &function) {
  function = reinterpret_cast<Function>(dlsym(library, symbol));
  if (!function) fail(ErrorKind::native, kLibrary + " has no " + symbol + ": it is too old for this build");
}

}  // namespace

bool cublaslt_loaded() { return loaded.load(std::memory_order_acquire) != nullptr; }

void load_cublaslt(const std::vector<std::string> &folders) {
  const std::lock_guard<std::mutex> lock(loading);
  if (cublaslt_loaded()) return;
  void *library = open_library(folders);
  CublasLt found;
  find(library, "cublasLtCreate", found.create);
  find(library, "cublasLtDestroy", found.destroy);
  find(library, "cublasLtGetStatusString", found.status_string);
  find(library, "cublasLtMatmul", found.matmul);
  find(library, "cublasLtMatmulAlgoGetHeuristic", found.heuristic);
  find(library, "cublasLtMatmulDescInit_internal", found.init_desc);
  find(library, "cublasLtMatmulDescSetAttribute", found.set_desc);
  find(library, "cublasLtMatrixLayoutInit_internal", found.init_layout);
  find(library, "cublasLtMatrixLayoutSetAttribute", found.set_layout);
  find(library, "cublasLtMatmulPreferenceInit_internal", found.init_preference);
  find(library, "cublasLtMatmulPreferenceSetAttribute", found.set_preference);
  static CublasLt kept;
  kept = found;
  loaded.store(&kept, std::memory_order_release);
}

const CublasLt &cublaslt() {
  if (!cublaslt_loaded()) load_cublaslt({});
  return *loaded.load(std::memory_order_acquire);
}

}  // namespace lltm_ray
