#include "device.hpp"

#ifdef LLTM_RAY_CUDA
#include <cuda_runtime_api.h>

#include <stdexcept>

namespace lltm_ray {
namespace {

void check(cudaError_t status, const char *call) {
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string(call) + ": " + cudaGetErrorString(status));
  }
}

// Asking for free memory needs the device to be current; the caller's choice is put back.
class CurrentDevice {
 public:
  explicit CurrentDevice(int index) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    check(cudaSetDevice(index), "cudaSetDevice");
  }
  ~CurrentDevice() { (void)cudaSetDevice(before_); }
  CurrentDevice(const CurrentDevice &) = delete;
  CurrentDevice &operator=(const CurrentDevice &) = delete;

 private:
  int before_ = 0;
};

Device read(int index) {
  cudaDeviceProp properties;
  check(cudaGetDeviceProperties(&properties, index), "cudaGetDeviceProperties");
  CurrentDevice current(index);
  std::size_t free_bytes = 0, total_bytes = 0;
  check(cudaMemGetInfo(&free_bytes, &total_bytes), "cudaMemGetInfo");
  return {index,      properties.name, properties.major, properties.minor, properties.multiProcessorCount,
          total_bytes, free_bytes};
}

}  // namespace

int cuda_version() {
  int version = 0;
  check(cudaRuntimeGetVersion(&version), "cudaRuntimeGetVersion");
  return version;
}

std::vector<Device> devices() {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status == cudaErrorNoDevice || status == cudaErrorInsufficientDriver) {
    return {};
  }
  check(status, "cudaGetDeviceCount");
  std::vector<Device> found;
  for (int index = 0; index < count; ++index) {
    found.push_back(read(index));
  }
  return found;
}

}  // namespace lltm_ray

#else

namespace lltm_ray {

int cuda_version() { return 0; }

std::vector<Device> devices() { return {}; }

}  // namespace lltm_ray

#endif
