#include "device.hpp"

#include "error.hpp"

#ifdef LLTM_RAY_CUDA
#include <atomic>

#include "cuda.hpp"
#endif

namespace lltm_ray {

Place parse_place(const std::string &text) {
  if (text == "cpu") return {};
  const bool any = text == "cuda";
  if (!any && (text.compare(0, 5, "cuda:") != 0 || text.size() == 5 || text.size() > 8 ||
               text.find_first_not_of("0123456789", 5) != std::string::npos)) {
    fail(ErrorKind::device, "device='" + text + "': use 'cpu', 'cuda' or 'cuda:0'");
  }
#ifndef LLTM_RAY_CUDA
  fail(ErrorKind::device, "device='" + text +
                              "': this build of the native module has no CUDA; install a CUDA toolkit "
                              "and build it again with LLTM_RAY_NATIVE=1 pip install .");
#else
  const int count = device_count();
  const int index = any && count ? current_device() : any ? 0 : std::stoi(text.substr(5));
  if (index >= count) {
    fail(ErrorKind::device,
         "device='" + text + "': CUDA shows " + std::to_string(count) + " device(s) to this process");
  }
  return {index};
#endif
}

#ifdef LLTM_RAY_CUDA

namespace {

Device read(int index) {
  cudaDeviceProp found;
  check(cudaGetDeviceProperties(&found, index), "cudaGetDeviceProperties");
  CurrentDevice current({index});
  std::size_t free_bytes = 0, total_bytes = 0;
  check(cudaMemGetInfo(&free_bytes, &total_bytes), "cudaMemGetInfo");
  return {index,
          found.name,
          found.major,
          found.minor,
          found.multiProcessorCount,
          found.maxThreadsPerBlock,
          found.maxThreadsPerMultiProcessor,
          found.warpSize,
          found.sharedMemPerBlock,
          static_cast<std::uint64_t>(found.l2CacheSize),
          total_bytes,
          free_bytes};
}

cudaMemPool_t pool_of(int index) {
  cudaMemPool_t pool = nullptr;
  check(cudaDeviceGetDefaultMemPool(&pool, index), "cudaDeviceGetDefaultMemPool");
  return pool;
}

std::uint64_t attribute(cudaMemPool_t pool, cudaMemPoolAttr which) {
  std::uint64_t value = 0;
  check(cudaMemPoolGetAttribute(pool, which, &value), "cudaMemPoolGetAttribute");
  return value;
}

}  // namespace

int cuda_version() {
  int version = 0;
  check(cudaRuntimeGetVersion(&version), "cudaRuntimeGetVersion");
  return version;
}

int device_count() {
  static std::atomic<int> known{-1};
  if (known >= 0) return known;
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status == cudaErrorNoDevice || status == cudaErrorInsufficientDriver) {
    (void)cudaGetLastError();
    return 0;
  }
  check(status, "cudaGetDeviceCount");
  return known = count;
}

std::vector<Device> devices() {
  std::vector<Device> found;
  for (int index = 0, count = device_count(); index < count; ++index) found.push_back(read(index));
  return found;
}

int current_device() {
  int index = 0;
  check(cudaGetDevice(&index), "cudaGetDevice");
  return index;
}

void set_current_device(int index) { check(cudaSetDevice(index), "cudaSetDevice"); }

Place place_of(const void *data) {
  cudaPointerAttributes found;
  check(cudaPointerGetAttributes(&found, data), "cudaPointerGetAttributes");
  if (found.type != cudaMemoryTypeDevice && found.type != cudaMemoryTypeManaged) {
    fail(ErrorKind::device, "the address is not in a GPU's memory");
  }
  return {found.device};
}

void synchronize(int index) {
  CurrentDevice current({index});
  check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
}

void synchronize_stream(int index, Stream stream) {
  CurrentDevice current({index});
  check(cudaStreamSynchronize(handle(stream)), "cudaStreamSynchronize");
}

PoolUse pool_use(int index) {
  const auto pool = pool_of(index);
  return {attribute(pool, cudaMemPoolAttrUsedMemCurrent), attribute(pool, cudaMemPoolAttrUsedMemHigh),
          attribute(pool, cudaMemPoolAttrReservedMemCurrent), attribute(pool, cudaMemPoolAttrReservedMemHigh)};
}

void trim_pool(int index) {
  synchronize(index);
  check(cudaMemPoolTrimTo(pool_of(index), 0), "cudaMemPoolTrimTo");
}

CurrentDevice::CurrentDevice(Place place) {
  if (place.on_cpu()) return;
  int before = 0;
  check(cudaGetDevice(&before), "cudaGetDevice");
  if (before == place.cuda) return;
  check(cudaSetDevice(place.cuda), "cudaSetDevice");
  before_ = before;
}

CurrentDevice::~CurrentDevice() {
  if (before_ >= 0) (void)cudaSetDevice(before_);
}

void order_streams(Place here, Stream before, Place there, Stream after) {
  cudaEvent_t event = nullptr;
  {
    CurrentDevice current(here);
    check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "cudaEventCreateWithFlags");
  }
  cudaError_t status = cudaSuccess;
  try {
    CurrentDevice current(here);
    status = cudaEventRecord(event, handle(before));
    if (status == cudaSuccess) {
      CurrentDevice other(there);
      status = cudaStreamWaitEvent(handle(after), event, 0);
    }
  } catch (...) {
    (void)cudaEventDestroy(event);
    throw;
  }
  (void)cudaEventDestroy(event);  // CUDA keeps it until the wait is over
  check(status, "cudaEventRecord, cudaStreamWaitEvent");
}

#else

namespace {

[[noreturn]] void no_cuda(int index) {
  fail(ErrorKind::device, "device " + std::to_string(index) + ": this build of the native module has no CUDA");
}

}  // namespace

int cuda_version() { return 0; }
int device_count() { return 0; }
std::vector<Device> devices() { return {}; }
int current_device() { no_cuda(0); }
void set_current_device(int index) { no_cuda(index); }
Place place_of(const void *) { no_cuda(0); }
void synchronize(int index) { no_cuda(index); }
void synchronize_stream(int index, Stream) { no_cuda(index); }
PoolUse pool_use(int index) { no_cuda(index); }
void trim_pool(int index) { no_cuda(index); }
CurrentDevice::CurrentDevice(Place) {}
CurrentDevice::~CurrentDevice() = default;
void order_streams(Place, Stream, Place, Stream) {}

#endif

}  // namespace lltm_ray
