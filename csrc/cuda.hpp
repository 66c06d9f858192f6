// Checked calls of the CUDA runtime; for files that are built with CUDA alone.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

#include "error.hpp"

namespace lltm_ray {

// Throws with CUDA's own words, and takes the error out of the runtime where it is not a lasting one.
inline void check(cudaError_t status, const char *call) {
  if (status == cudaSuccess) return;
  (void)cudaGetLastError();
  const auto kind = status == cudaErrorMemoryAllocation ? ErrorKind::memory
                    : status == cudaErrorInvalidDevice  ? ErrorKind::device
                                                        : ErrorKind::native;
  fail(kind, std::string(call) + ": " + cudaGetErrorString(status) + " (" + cudaGetErrorName(status) + ")");
}

inline cudaStream_t handle(std::uintptr_t stream) { return reinterpret_cast<cudaStream_t>(stream); }

}  // namespace lltm_ray
