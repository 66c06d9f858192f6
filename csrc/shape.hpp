// Shapes and strides, in elements, without allocation.
#pragma once
#include <cstdint>
#include <string>

namespace lltm_ray {

constexpr int kMaxRank = 8;

struct Dims {
  std::int64_t at[kMaxRank] = {};
  int rank = 0;

  std::int64_t &operator[](int axis) { return at[axis]; }
  std::int64_t operator[](int axis) const { return at[axis]; }
  void push(std::int64_t size) { at[rank++] = size; }
  bool operator==(const Dims &other) const;
  bool operator!=(const Dims &other) const { return !(*this == other); }
  std::string text() const;  // "(2, 3)"
};

// One element after another of an array of up to eight axes in two memories; the axes are as few as they can be.
struct Walk {
  int rank = 0;
  std::int64_t shape[kMaxRank], to[kMaxRank], from[kMaxRank];
  std::int64_t count = 1;
};

// Elements of a shape. ShapeError for negative sizes, and for more bytes than 2^63 when each has `itemsize`.
std::int64_t count_elements(const Dims &shape, int itemsize);
Dims packed_strides(const Dims &shape);                  // of C order
bool is_packed(const Dims &shape, const Dims &strides);  // in C order without gaps
int wrap_axis(std::int64_t axis, int rank);              // -1 is the last one

// Strides of the same memory seen as `to`; false when that takes a copy. The counts are equal.
bool reshape_strides(const Dims &shape, const Dims &strides, const Dims &to, Dims &found);

Walk make_walk(const Dims &shape, const Dims &to, const Dims &from);

}  // namespace lltm_ray
