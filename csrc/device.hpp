#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace lltm_ray {

// What the CUDA runtime says of one device; memory is as it is at the time of the call.
struct Device {
  int index;
  std::string name;
  int compute_capability_major;
  int compute_capability_minor;
  int multiprocessors;
  std::uint64_t total_bytes;
  std::uint64_t free_bytes;
};

// CUDA runtime version as major * 1000 + minor * 10; 0 when built without CUDA.
int cuda_version();

// All devices this process may use, in CUDA's order. Empty without CUDA or without a device.
// Throws std::runtime_error with CUDA's own words when the runtime or driver is broken.
std::vector<Device> devices();

}  // namespace lltm_ray
