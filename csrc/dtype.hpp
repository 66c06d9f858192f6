// The six element types, and conversions between them that are the same on CPU and GPU.
#pragma once
#include <cstdint>
#include <cstring>
#include <string>

#ifdef __CUDACC__
#define LLTM_RAY_HD __host__ __device__
#else
#define LLTM_RAY_HD
#endif

namespace lltm_ray {

enum class DType : std::uint8_t { float32, float16, bfloat16, int32, int8, uint8 };

struct Half {
  std::uint16_t bits;
};
struct BFloat16 {
  std::uint16_t bits;
};

constexpr int itemsize(DType dtype) {
  return dtype == DType::float32 || dtype == DType::int32 ? 4 : dtype == DType::int8 || dtype == DType::uint8 ? 1 : 2;
}
constexpr bool is_float(DType dtype) { return dtype <= DType::bfloat16; }
constexpr const char *name(DType dtype) {
  constexpr const char *names[] = {"float32", "float16", "bfloat16", "int32", "int8", "uint8"};
  return names[static_cast<int>(dtype)];
}

template <class To, class From>
LLTM_RAY_HD inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "sizes differ");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

// `widen` gives float for the float types and int32 for the integer types: both hold every value exactly.
LLTM_RAY_HD inline float widen(float value) { return value; }
LLTM_RAY_HD inline float widen(BFloat16 value) { return bit_cast<float>(std::uint32_t(value.bits) << 16); }
LLTM_RAY_HD inline float widen(Half value) {
  const std::uint32_t sign = std::uint32_t(value.bits & 0x8000u) << 16, exponent = (value.bits >> 10) & 31u,
                      fraction = value.bits & 0x3ffu;
  if (exponent == 0) {  // zero and what is below 2^-14: fraction * 2^-24
    return bit_cast<float>(sign | bit_cast<std::uint32_t>(float(fraction) * 5.9604644775390625e-8f));
  }
  const std::uint32_t wide = exponent == 31 ? 0x7f800000u : (exponent + 112u) << 23;
  return bit_cast<float>(sign | wide | fraction << 13);
}
LLTM_RAY_HD inline std::int32_t widen(std::int32_t value) { return value; }
LLTM_RAY_HD inline std::int32_t widen(std::int8_t value) { return value; }
LLTM_RAY_HD inline std::int32_t widen(std::uint8_t value) { return value; }

// `narrow` rounds to nearest even between floats, cuts off fractions and stops at the ends of the range from floats to
// integers (NaN is 0), and wraps between integers.
LLTM_RAY_HD inline void narrow(float value, float &to) { to = value; }
LLTM_RAY_HD inline void narrow(float value, BFloat16 &to) {
  const auto bits = bit_cast<std::uint32_t>(value);
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  to.bits = std::uint16_t(nan ? (bits >> 16 | 0x40u) : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}
LLTM_RAY_HD inline void narrow(float value, Half &to) {
  const auto bits = bit_cast<std::uint32_t>(value), size = bits & 0x7fffffffu;
  std::uint32_t half;
  if (size >= 0x47800000u) {  // 2^16 and over, infinity, NaN
    half = size > 0x7f800000u ? 0x7e00u : 0x7c00u;
  } else if (size < 0x38800000u) {  // below 2^-14: adding 0.5 moves the fraction to where float's rounding cuts it
    half = bit_cast<std::uint32_t>(bit_cast<float>(size) + 0.5f) - 0x3f000000u;
  } else {
    half = (size + 0xfffu + (size >> 13 & 1u) - 0x38000000u) >> 13;
  }
  to.bits = std::uint16_t((bits >> 16 & 0x8000u) | half);
}
LLTM_RAY_HD inline std::int32_t cut(float value, float low, float high, std::int32_t least, std::int32_t most) {
  return value != value ? 0 : value <= low ? least : value >= high ? most : std::int32_t(value);
}
LLTM_RAY_HD inline void narrow(float value, std::int32_t &to) {
  to = cut(value, -2147483648.f, 2147483648.f, INT32_MIN, INT32_MAX);
}
LLTM_RAY_HD inline void narrow(float value, std::int8_t &to) { to = std::int8_t(cut(value, -128.f, 127.f, -128, 127)); }
LLTM_RAY_HD inline void narrow(float value, std::uint8_t &to) { to = std::uint8_t(cut(value, 0.f, 255.f, 0, 255)); }
LLTM_RAY_HD inline void narrow(std::int32_t value, float &to) { to = float(value); }
LLTM_RAY_HD inline void narrow(std::int32_t value, BFloat16 &to) { narrow(float(value), to); }
LLTM_RAY_HD inline void narrow(std::int32_t value, Half &to) { narrow(float(value), to); }
LLTM_RAY_HD inline void narrow(std::int32_t value, std::int32_t &to) { to = value; }
LLTM_RAY_HD inline void narrow(std::int32_t value, std::int8_t &to) { to = std::int8_t(value); }
LLTM_RAY_HD inline void narrow(std::int32_t value, std::uint8_t &to) { to = std::uint8_t(value); }

// Writes `value` as element `index` of an array of `dtype`.
template <class Wide>
LLTM_RAY_HD inline void store(void *array, DType dtype, std::int64_t index, Wide value) {
  switch (dtype) {
    case DType::float32: return narrow(value, static_cast<float *>(array)[index]);
    case DType::float16: return narrow(value, static_cast<Half *>(array)[index]);
    case DType::bfloat16: return narrow(value, static_cast<BFloat16 *>(array)[index]);
    case DType::int32: return narrow(value, static_cast<std::int32_t *>(array)[index]);
    case DType::int8: return narrow(value, static_cast<std::int8_t *>(array)[index]);
    case DType::uint8: return narrow(value, static_cast<std::uint8_t *>(array)[index]);
  }
}

// Calls `work` with a null pointer of the type that `dtype` stands for.
template <class Work>
void with_type(DType dtype, Work &&work) {
  switch (dtype) {
    case DType::float32: return work(static_cast<float *>(nullptr));
    case DType::float16: return work(static_cast<Half *>(nullptr));
    case DType::bfloat16: return work(static_cast<BFloat16 *>(nullptr));
    case DType::int32: return work(static_cast<std::int32_t *>(nullptr));
    case DType::int8: return work(static_cast<std::int8_t *>(nullptr));
    case DType::uint8: return work(static_cast<std::uint8_t *>(nullptr));
  }
}

}  // namespace lltm_ray
