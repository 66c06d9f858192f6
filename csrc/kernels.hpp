// Element by element work, once for the CPU and once for a GPU. Device calls are queued on the current device.
#pragma once
#include <cmath>

#include "device.hpp"
#include "dtype.hpp"
#include "shape.hpp"

namespace lltm_ray {

enum class Activation : std::uint8_t { none, relu, gelu };

// 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), as cuBLASLt computes GELU.
LLTM_RAY_HD inline float activate(float x, Activation activation) {
  if (activation == Activation::relu) return x > 0.f || x != x ? x : 0.f;
  if (activation == Activation::gelu)
    return 0.5f * x * (1.f + tanhf(0.7978845608028654f * (x + 0.044715f * x * x * x)));
  return x;
}

// One value of any type, as its bytes.
struct Value {
  std::uint32_t bits;
  int itemsize;
};

// A matrix with rows `pitch` elements apart, to which a bias of `columns` values (or null) and an activation are put.
struct Rows {
  void *data;
  DType dtype;
  std::int64_t rows, columns, pitch;
};

namespace cpu {
void copy(const Walk &walk, void *to, const void *from, int itemsize);
void cast(const Walk &walk, void *to, DType to_type, const void *from, DType from_type);
void fill(const Walk &walk, void *to, Value value);
}  // namespace cpu

namespace cuda {
void copy(const Walk &walk, void *to, const void *from, int itemsize, Stream stream);
void cast(const Walk &walk, void *to, DType to_type, const void *from, DType from_type, Stream stream);
void fill(const Walk &walk, void *to, Value value, Stream stream);
void finish(const Rows &rows, const void *bias, Activation activation, Stream stream);
}  // namespace cuda

}  // namespace lltm_ray
