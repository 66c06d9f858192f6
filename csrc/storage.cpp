#include "storage.hpp"

#include <new>

#include "error.hpp"

#ifdef LLTM_RAY_CUDA
#include <mutex>

#include "cuda.hpp"
#endif

namespace lltm_ray {
namespace {

constexpr std::align_val_t kAlignment{64};

[[noreturn]] void no_room(Place place, std::int64_t bytes) {
  fail(ErrorKind::memory,
       "no room for " + std::to_string(bytes) + " bytes on " + place.text() + ": free tensors, or use a smaller shape");
}

#ifdef LLTM_RAY_CUDA

// The pool keeps freed memory for the next tensor; `trim_pool` gives it back.
void keep_freed_memory(int index) {
  constexpr int kDevices = 64;
  static std::once_flag once[kDevices];
  if (index >= kDevices) return;
  std::call_once(once[index], [index] {
    cudaMemPool_t pool = nullptr;
    check(cudaDeviceGetDefaultMemPool(&pool, index), "cudaDeviceGetDefaultMemPool");
    std::uint64_t all = UINT64_MAX;
    check(cudaMemPoolSetAttribute(pool, cudaMemPoolAttrReleaseThreshold, &all), "cudaMemPoolSetAttribute");
  });
}

void *allocate_cuda(Place place, std::int64_t bytes, Stream stream) {
  CurrentDevice current(place);
  keep_freed_memory(place.cuda);
  void *data = nullptr;
  cudaError_t status = cudaMallocAsync(&data, bytes, handle(stream));
  if (status == cudaErrorMemoryAllocation) {  // what other streams have freed may be free only after their work
    (void)cudaGetLastError();
    trim_pool(place.cuda);
    status = cudaMallocAsync(&data, bytes, handle(stream));
  }
  if (status == cudaErrorMemoryAllocation) {
    (void)cudaGetLastError();
    no_room(place, bytes);
  }
  check(status, "cudaMallocAsync");
  return data;
}

// Errors stay: a broken device fails the next checked call too. At exit the driver has freed everything already.
void free_cuda(Place place, void *data, Stream stream, bool shared) noexcept {
  try {
    CurrentDevice current(place);
    if (shared) (void)cudaDeviceSynchronize();
    (void)cudaFreeAsync(data, handle(stream));
  } catch (const std::exception &) {
  }
  (void)cudaGetLastError();  // or the next launch would be blamed
}

#endif

}  // namespace

std::shared_ptr<Storage> Storage::allocate(Place place, std::int64_t bytes, Stream stream) {
  void *data = nullptr;
  if (bytes > 0) {
#ifdef LLTM_RAY_CUDA
    if (!place.on_cpu()) data = allocate_cuda(place, bytes, stream);
#endif
    if (place.on_cpu()) data = ::operator new(static_cast<std::size_t>(bytes), kAlignment, std::nothrow);
    if (!data) no_room(place, bytes);
  }
  return std::shared_ptr<Storage>(new Storage(place, data, place.on_cpu() ? 0 : stream));
}

std::shared_ptr<Storage> Storage::wrap(Place place, void *data, Stream stream, std::function<void()> release) {
  return std::shared_ptr<Storage>(new Storage(place, data, place.on_cpu() ? 0 : stream, std::move(release)));
}

Storage::~Storage() {
  if (release_) {
    release_();
  } else if (!data) {
    return;
  } else if (place.on_cpu()) {
    ::operator delete(data, kAlignment);
  } else {
#ifdef LLTM_RAY_CUDA
    free_cuda(place, data, home, shared_);
#endif
  }
}

StreamScope::StreamScope(Place place, Stream stream, std::initializer_list<const Storage *> storages)
    : current_(place), place_(place), stream_(stream) {
  for (const Storage *storage : storages) {
    if (!storage || storage->place.on_cpu() || (storage->place == place && storage->home == stream)) continue;
    order_streams(storage->place, storage->home, place, stream);
    others_[count_++] = storage;
  }
}

void StreamScope::done() {
  while (count_ > 0) {
    const Storage *storage = others_[--count_];
    order_streams(place_, stream_, storage->place, storage->home);
  }
}

StreamScope::~StreamScope() {
  try {
    done();
  } catch (const Error &) {
    count_ = 0;  // an error is on its way already; a broken device fails the next call too
  }
}

}  // namespace lltm_ray
