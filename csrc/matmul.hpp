// Matrix products of two tensors: checks and dispatch; the work is in matmul_cpu.cpp and matmul_cuda.cpp.
#pragma once
#include <string>
#include <vector>

#include "tensor.hpp"

namespace lltm_ray {

struct MatmulOptions {
  const Tensor *bias = nullptr;  // one value a column, of the result's type
  Activation activation = Activation::none;
  Tensor *out = nullptr;
  bool tf32 = false;  // float32 on tensor cores, with 10 bits of fraction in the factors
  bool tune = false;  // times the algorithms that cuBLASLt proposes when a problem is new, instead of taking the first
  bool transpose_a = false;
  bool transpose_b = false;
  Stream stream = 0;
};

// [m, k] @ [k, n] -> [m, n]. float16 and bfloat16 are summed in float32, int8 in int32, which is the result's type.
Tensor matmul(const Tensor &a, const Tensor &b, const MatmulOptions &options);
// [batch, m, k] @ [batch, k, n] -> [batch, m, n]; a factor of batch 1 serves all.
Tensor batched_matmul(const Tensor &a, const Tensor &b, const MatmulOptions &options);

// One checked problem, all of it on one device: `out` has its memory, and no size is 0.
struct Product {
  const Tensor &a, &b;  // [m, k] and [k, n], or with a batch in front
  Tensor &out;
  const Tensor *bias;
  Activation activation;
  bool tf32, tune;
  Stream stream;
  std::int64_t batch, m, n, k;
};

namespace cpu {
void multiply(const Product &product);
}
namespace cuda {
void multiply(const Product &product);
void release_matmul();  // frees handles, workspaces and plans; they come back with the next product
std::size_t plans(int index);
}  // namespace cuda

// Where cuBLASLt's library may lie besides the loader's own places; the first call that needs it looks once.
bool cublaslt_loaded();
void load_cublaslt(const std::vector<std::string> &folders);

}  // namespace lltm_ray
