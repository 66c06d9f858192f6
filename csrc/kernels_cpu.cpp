#include "kernels.hpp"

namespace lltm_ray::cpu {
namespace {

// Calls `work(to, from, count, to step, from step)` for each run of the last axis; offsets are in elements.
template <class Work>
void for_runs(const Walk &walk, Work &&work) {
  if (walk.count == 0) return;
  if (walk.rank == 0) return work(std::int64_t(0), std::int64_t(0), std::int64_t(1), std::int64_t(1), std::int64_t(1));
  const int last = walk.rank - 1;
  std::int64_t index[kMaxRank] = {}, to = 0, from = 0;
  for (;;) {
    work(to, from, walk.shape[last], walk.to[last], walk.from[last]);
    int axis = last - 1;
    for (; axis >= 0; --axis) {
      to += walk.to[axis];
      from += walk.from[axis];
      if (++index[axis] < walk.shape[axis]) break;
      to -= walk.to[axis] * walk.shape[axis];
      from -= walk.from[axis] * walk.shape[axis];
      index[axis] = 0;
    }
    if (axis < 0) return;
  }
}

template <class T>
void copy_as(const Walk &walk, T *to, const T *from) {
  for_runs(walk, [=](auto at, auto start, auto count, auto step, auto stride) {
    if (step == 1 && stride == 1) {
      std::memcpy(to + at, from + start, count * sizeof(T));
      return;
    }
    for (std::int64_t i = 0; i < count; ++i) to[at + i * step] = from[start + i * stride];
  });
}

template <class T>
void fill_as(const Walk &walk, T *to, std::uint32_t bits) {
  for_runs(walk, [=](auto at, auto, auto count, auto step, auto) {
    for (std::int64_t i = 0; i < count; ++i) to[at + i * step] = static_cast<T>(bits);
  });
}

}  // namespace

void copy(const Walk &walk, void *to, const void *from, int itemsize) {
  if (itemsize == 4) return copy_as(walk, static_cast<std::uint32_t *>(to), static_cast<const std::uint32_t *>(from));
  if (itemsize == 2) return copy_as(walk, static_cast<std::uint16_t *>(to), static_cast<const std::uint16_t *>(from));
  copy_as(walk, static_cast<std::uint8_t *>(to), static_cast<const std::uint8_t *>(from));
}

void cast(const Walk &walk, void *to, DType to_type, const void *from, DType from_type) {
  with_type(from_type, [&](auto *type) {
    const auto *source = static_cast<decltype(type)>(const_cast<void *>(from));
    for_runs(walk, [=](auto at, auto start, auto count, auto step, auto stride) {
      for (std::int64_t i = 0; i < count; ++i) store(to, to_type, at + i * step, widen(source[start + i * stride]));
    });
  });
}

void fill(const Walk &walk, void *to, Value value) {
  if (value.itemsize == 4) return fill_as(walk, static_cast<std::uint32_t *>(to), value.bits);
  if (value.itemsize == 2) return fill_as(walk, static_cast<std::uint16_t *>(to), value.bits);
  fill_as(walk, static_cast<std::uint8_t *>(to), value.bits);
}

}  // namespace lltm_ray::cpu
