// Memory of tensors, and the order of the streams that work on it.
#pragma once
#include <atomic>
#include <functional>
#include <initializer_list>
#include <memory>

#include "device.hpp"

namespace lltm_ray {

// A block of memory, freed with its last tensor. On a GPU it belongs to a stream, its home: it was made there and is
// freed there. Work of another stream waits for home's, and home then waits for that work (see `StreamScope`), so that
// home is always the last.
class Storage {
 public:
  // Uninitialised memory; on a GPU it may be used on `stream` at once, and elsewhere through `StreamScope`.
  static std::shared_ptr<Storage> allocate(Place place, std::int64_t bytes, Stream stream);
  // Memory of somebody else, ready for work on `stream`; `release` is called once, with the last tensor.
  static std::shared_ptr<Storage> wrap(Place place, void *data, Stream stream, std::function<void()> release);
  ~Storage();
  Storage(const Storage &) = delete;
  Storage &operator=(const Storage &) = delete;

  // Somebody outside uses the memory on streams that are not known here: the device is waited for before it is freed.
  void share() noexcept { shared_ = true; }

  char *const data;
  const Place place;
  const Stream home;

 private:
  Storage(Place place, void *data, Stream home, std::function<void()> release = {})
      : data(static_cast<char *>(data)), place(place), home(home), release_(std::move(release)) {}
  std::function<void()> release_;
  std::atomic<bool> shared_{false};
};

// Work of one stream on some storages, on the stream's device. Call `done` after the last launch.
class StreamScope {
 public:
  StreamScope(Place place, Stream stream, std::initializer_list<const Storage *> storages);
  void done();
  ~StreamScope();

 private:
  static constexpr int kMost = 4;
  CurrentDevice current_;
  const Place place_;
  const Stream stream_;
  const Storage *others_[kMost];
  int count_ = 0;
};

}  // namespace lltm_ray
