#include "shape.hpp"

#include <algorithm>

#include "error.hpp"

namespace lltm_ray {

bool Dims::operator==(const Dims &other) const { return rank == other.rank && std::equal(at, at + rank, other.at); }

std::string Dims::text() const {
  std::string found = "(";
  for (int axis = 0; axis < rank; ++axis) found += (axis ? ", " : "") + std::to_string(at[axis]);
  return found + (rank == 1 ? ",)" : ")");
}

std::int64_t count_elements(const Dims &shape, int itemsize) {
  std::int64_t bytes = itemsize, count = 1;
  for (int axis = 0; axis < shape.rank; ++axis) {
    if (shape[axis] < 0) fail(ErrorKind::shape, "shape=" + shape.text() + ": sizes cannot be negative");
    // a size of 0 counts as 1 here, so that the strides of empty tensors fit too
    if (__builtin_mul_overflow(bytes, std::max<std::int64_t>(shape[axis], 1), &bytes)) {
      fail(ErrorKind::shape, "shape=" + shape.text() + ": has more bytes than 2^63");
    }
    count *= shape[axis];
  }
  return count;
}

Dims packed_strides(const Dims &shape) {
  Dims strides;
  strides.rank = shape.rank;
  std::int64_t step = 1;
  for (int axis = shape.rank - 1; axis >= 0; --axis) {
    strides[axis] = step;
    step *= std::max<std::int64_t>(shape[axis], 1);
  }
  return strides;
}

bool is_packed(const Dims &shape, const Dims &strides) {
  if (std::find(shape.at, shape.at + shape.rank, 0) != shape.at + shape.rank) return true;
  std::int64_t step = 1;
  for (int axis = shape.rank - 1; axis >= 0; --axis) {
    if (shape[axis] != 1 && strides[axis] != step) return false;
    step *= shape[axis];
  }
  return true;
}

int wrap_axis(std::int64_t axis, int rank) {
  if (axis < -rank || axis >= rank) {
    fail(ErrorKind::shape, "axis=" + std::to_string(axis) + ": the tensor has " + std::to_string(rank) + " axes");
  }
  return static_cast<int>(axis < 0 ? axis + rank : axis);
}

bool reshape_strides(const Dims &shape, const Dims &strides, const Dims &to, Dims &found) {
  found = packed_strides(to);
  if (is_packed(shape, strides)) return true;
  int axis = shape.rank - 1, wanted = to.rank - 1;
  while (axis >= 0) {  // one run of axes that lie without gaps after the other, from the last
    std::int64_t run = shape[axis];
    const std::int64_t step = strides[axis];
    while (axis > 0 && (shape[axis - 1] == 1 || strides[axis - 1] == step * run)) run *= shape[--axis];
    --axis;
    std::int64_t filled = 1;
    while (wanted >= 0 && (filled < run || to[wanted] == 1)) {
      found[wanted] = step * filled;
      filled *= to[wanted--];
    }
    if (filled != run) return false;
  }
  return true;
}

Walk make_walk(const Dims &shape, const Dims &to, const Dims &from) {
  Walk walk;
  for (int axis = 0; axis < shape.rank; ++axis) {
    walk.count *= shape[axis];
    if (shape[axis] == 1) continue;
    const int last = walk.rank - 1;
    if (last >= 0 && walk.to[last] == to[axis] * shape[axis] && walk.from[last] == from[axis] * shape[axis]) {
      walk.shape[last] *= shape[axis];
      walk.to[last] = to[axis];
      walk.from[last] = from[axis];
      continue;
    }
    walk.shape[walk.rank] = shape[axis];
    walk.to[walk.rank] = to[axis];
    walk.from[walk.rank++] = from[axis];
  }
  return walk;
}

}  // namespace lltm_ray
