// Devices as the CUDA runtime shows them, and which one a thread works on.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace lltm_ray {

// A CUDA stream as a number: 0 is the legacy default stream.
using Stream = std::uintptr_t;

// Where memory lies: "cpu", or "cuda:<index>".
struct Place {
  int cuda = -1;
  bool on_cpu() const { return cuda < 0; }
  bool operator==(Place other) const { return cuda == other.cuda; }
  bool operator!=(Place other) const { return cuda != other.cuda; }
  std::string text() const { return on_cpu() ? "cpu" : "cuda:" + std::to_string(cuda); }
};

// Memory is as it is at the time of the call.
struct Device {
  int index;
  std::string name;
  int compute_capability_major;
  int compute_capability_minor;
  int multiprocessors;
  int max_threads_per_block;
  int max_threads_per_multiprocessor;
  int warp_size;
  std::uint64_t shared_bytes_per_block;
  std::uint64_t l2_bytes;
  std::uint64_t total_bytes;
  std::uint64_t free_bytes;
};

// The default pool of stream-ordered memory: bytes that tensors hold, and bytes the pool keeps of the device.
struct PoolUse {
  std::uint64_t used_bytes, used_high_bytes, reserved_bytes, reserved_high_bytes;
};

int cuda_version();                  // 13000 is 13.0; 0 when built without CUDA
std::vector<Device> devices();       // in CUDA's order; empty without CUDA or without a device
int device_count();                  // as devices().size(), without asking the devices
int current_device();                // of this thread
void set_current_device(int index);  // of this thread
void synchronize(int index);         // waits for all work of a device
void synchronize_stream(int index, Stream stream);
PoolUse pool_use(int index);
void trim_pool(int index);  // gives what the pool keeps and no tensor holds back to the device

// Reads "cpu", "cuda" (the thread's current device) or "cuda:<index>"; the device exists.
Place parse_place(const std::string &text);

// The device that `data` lies on; DeviceError when CUDA does not know the address.
Place place_of(const void *data);

// Makes a device the thread's current one for a while; nothing for the CPU.
class CurrentDevice {
 public:
  explicit CurrentDevice(Place place);
  ~CurrentDevice();
  CurrentDevice(const CurrentDevice &) = delete;
  CurrentDevice &operator=(const CurrentDevice &) = delete;

 private:
  int before_ = -1;
};

// Work queued on `after` of `there` later than this call waits for what `before` of `here` has queued until now.
void order_streams(Place here, Stream before, Place there, Stream after);

}  // namespace lltm_ray
