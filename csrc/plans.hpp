// How cuBLASLt solves a problem: found once for each kind of problem, and kept.
#pragma once
#include "device.hpp"

namespace lltm_ray::cuda {

// A problem d[m, n] = op(a) op(b) by columns. Without padding between the fields: keys are compared as bytes.
struct PlanKey {
  std::int64_t m, n, k, batch;
  std::int64_t lead_a, lead_b, lead_d;
  std::int64_t step_a, step_b, step_d;  // from one of a batch to the next; 0 is the same for all
  std::uint8_t dtype, transpose_a, transpose_b, activation;
  std::uint8_t bias, tf32, tune;
  std::uint8_t align_a, align_b, align_d, align_bias;  // of the addresses, as powers of two up to 256
  std::uint8_t unused[5];
};
static_assert(sizeof(PlanKey) == 96, "a hole in the key");

struct Operands {
  const void *a, *b;
  void *d;
  const void *bias;
};

// Queues the product on `stream` of the current device, `place`; false when the bias and the activation are still to be
// put to it. NativeError when cuBLASLt cannot solve the problem.
bool run_planned(const PlanKey &key, const Operands &operands, Place place, Stream stream);

}  // namespace lltm_ray::cuda
