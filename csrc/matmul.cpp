#include "matmul.hpp"

#include <algorithm>

#include "error.hpp"

namespace lltm_ray {
namespace {

Tensor swapped(const Tensor &tensor) {
  Tensor view = tensor;
  const int last = tensor.shape.rank - 1;
  std::swap(view.shape[last], view.shape[last - 1]);
  std::swap(view.strides[last], view.strides[last - 1]);
  return view;
}

void check_factors(const Tensor &a, const Tensor &b, int rank) {
  if (a.shape.rank != rank || b.shape.rank != rank) {
    fail(ErrorKind::shape, "shapes " + a.shape.text() + " and " + b.shape.text() + ": both factors need " +
                               std::to_string(rank) + " axes; matmul takes 2, batched_matmul 3");
  }
  if (a.place() != b.place()) {
    fail(ErrorKind::device, "a is on " + a.place().text() + " and b on " + b.place().text() +
                                ": both must be on the same device; use to(device)");
  }
  if (a.dtype != b.dtype || a.dtype == DType::int32 || a.dtype == DType::uint8) {
    fail(ErrorKind::dtype, std::string("dtypes ") + name(a.dtype) + " and " + name(b.dtype) +
                               ": factors are both float32, float16, bfloat16 or int8; use to(dtype=...)");
  }
  if (a.shape[rank - 1] != b.shape[rank - 2]) {
    fail(ErrorKind::shape, "Incompatible dimensions: " + a.shape.text() + " @ " + b.shape.text() + ": " +
                               std::to_string(a.shape[rank - 1]) + " columns meet " +
                               std::to_string(b.shape[rank - 2]) + " rows");
  }
}

void check_epilogue(const Tensor &a, std::int64_t n, DType result, const MatmulOptions &options) {
  if (options.tf32 && a.dtype != DType::float32) {
    fail(ErrorKind::dtype, std::string("tf32=True: is for float32, not ") + name(a.dtype));
  }
  if (result == DType::int32 && (options.bias || options.activation != Activation::none)) {
    fail(ErrorKind::dtype, "int8 products are exact int32 sums: bias and activation are for float types");
  }
  const Tensor *bias = options.bias;
  if (!bias) return;
  if (bias->shape.rank != 1 || bias->shape[0] != n) {
    fail(ErrorKind::shape,
         "bias of shape " + bias->shape.text() + ": needs one value for each of " + std::to_string(n) + " columns");
  }
  if (bias->dtype != result) {
    fail(ErrorKind::dtype, std::string("bias of ") + name(bias->dtype) + ": the product is " + name(result));
  }
  if (bias->place() != a.place()) {
    fail(ErrorKind::device, "bias is on " + bias->place().text() + ", the factors on " + a.place().text());
  }
}

void check_out(const Tensor &out, const Tensor &a, const Tensor &b, const Dims &shape, DType result,
               const Tensor *bias) {
  require_writable(out);
  if (out.shape != shape)
    fail(ErrorKind::shape, "out of shape " + out.shape.text() + ": the product has " + shape.text());
  if (out.dtype != result)
    fail(ErrorKind::dtype, std::string("out of ") + name(out.dtype) + ": the product is " + name(result));
  if (out.place() != a.place()) {
    fail(ErrorKind::device, "out is on " + out.place().text() + ", the factors on " + a.place().text());
  }
  if (overlap(out, a) || overlap(out, b) || (bias && overlap(out, *bias))) {
    fail(ErrorKind::shape, "out shares memory with a factor or the bias: use a tensor of its own");
  }
}

// The sum over nothing is 0, and so is its activation; a bias comes with the product of one column of zeros.
void multiply_nothing(const Product &product) {
  if (!product.bias) return fill(product.out, {0, itemsize(product.out.dtype)}, product.stream);
  Dims left = product.a.shape, right = product.b.shape;
  left[left.rank - 1] = right[right.rank - 2] = 1;
  Tensor a = make_tensor(left, product.a.dtype, product.a.place(), product.stream);
  Tensor b = make_tensor(right, product.a.dtype, product.a.place(), product.stream);
  fill(a, {0, itemsize(a.dtype)}, product.stream);
  fill(b, {0, itemsize(b.dtype)}, product.stream);
  const Product one{a,
                    b,
                    product.out,
                    product.bias,
                    product.activation,
                    product.tf32,
                    false,
                    product.stream,
                    product.batch,
                    product.m,
                    product.n,
                    1};
  if (a.place().on_cpu()) return cpu::multiply(one);
#ifdef LLTM_RAY_CUDA
  cuda::multiply(one);
#endif
}

Tensor multiply(const Tensor &a, const Tensor &b, const Dims &shape, const MatmulOptions &options) {
  const DType result = a.dtype == DType::int8 ? DType::int32 : a.dtype;
  const int rank = shape.rank;
  check_epilogue(a, shape[rank - 1], result, options);
  if (options.out) check_out(*options.out, a, b, shape, result, options.bias);
  Tensor out = options.out ? *options.out : make_tensor(shape, result, a.place(), options.stream);
  if (out.count() == 0) return out;
  const Product product{a,
                        b,
                        out,
                        options.bias,
                        options.activation,
                        options.tf32,
                        options.tune,
                        options.stream,
                        rank == 3 ? shape[0] : 1,
                        shape[rank - 2],
                        shape[rank - 1],
                        a.shape[rank - 1]};
  if (product.k == 0) {
    multiply_nothing(product);
  } else if (a.place().on_cpu()) {
    cpu::multiply(product);
  } else {
#ifdef LLTM_RAY_CUDA
    cuda::multiply(product);
#endif
  }
  return out;
}

Tensor multiply_checked(const Tensor &a, const Tensor &b, int rank, const MatmulOptions &options) {
  check_factors(a, b, rank);
  Dims shape;
  if (rank == 3) {
    if (a.shape[0] != b.shape[0] && a.shape[0] != 1 && b.shape[0] != 1) {
      fail(ErrorKind::shape, "Incompatible dimensions: " + a.shape.text() + " @ " + b.shape.text() +
                                 ": batches are equal, or one of them is 1");
    }
    shape.push(a.shape[0] == 1 ? b.shape[0] : a.shape[0]);
  }
  shape.push(a.shape[rank - 2]);
  shape.push(b.shape[rank - 1]);
  return multiply(a, b, shape, options);
}

Tensor multiply_any(const Tensor &a, const Tensor &b, int rank, const MatmulOptions &options) {
  if (!options.transpose_a && !options.transpose_b) return multiply_checked(a, b, rank, options);
  if (a.shape.rank != rank || b.shape.rank != rank) check_factors(a, b, rank);
  return multiply_checked(options.transpose_a ? swapped(a) : a, options.transpose_b ? swapped(b) : b, rank, options);
}

}  // namespace

Tensor matmul(const Tensor &a, const Tensor &b, const MatmulOptions &options) { return multiply_any(a, b, 2, options); }

Tensor batched_matmul(const Tensor &a, const Tensor &b, const MatmulOptions &options) {
  return multiply_any(a, b, 3, options);
}

#ifndef LLTM_RAY_CUDA
bool cublaslt_loaded() { return true; }
void load_cublaslt(const std::vector<std::string> &) {}
#endif

}  // namespace lltm_ray
