// Products on a GPU through cuBLASLt. It counts by columns: the row-major product is asked for as out^T = b^T a^T.
#include <algorithm>
#include <cmath>

#include "cuda.hpp"
#include "matmul.hpp"
#include "plans.hpp"

namespace lltm_ray::cuda {
namespace {

constexpr std::int64_t kInt8Step = 16;

std::int64_t round_up(std::int64_t size) { return (size + kInt8Step - 1) / kInt8Step * kInt8Step; }

// A matrix as cuBLASLt may read it: rows (or columns) without gaps, one `lead` elements after the other.
struct Lines {
  bool found = false;
  std::int64_t lead = 0, step = 0;
};

Lines lines(const Tensor &tensor, bool by_row) {
  const int last = tensor.shape.rank - 1, along = by_row ? last : last - 1, across = by_row ? last - 1 : last;
  const std::int64_t length = tensor.shape[along], count = tensor.shape[across];
  const std::int64_t lead = count == 1 ? length : tensor.strides[across];
  const std::int64_t step = last == 2 && tensor.shape[0] != 1 ? tensor.strides[0] : 0;
  return {(length == 1 || tensor.strides[along] == 1) && lead >= length && step >= 0, lead, step};
}

std::uint8_t alignment(const void *data) {  // as a power of two, up to 256 bytes
  const auto address = reinterpret_cast<std::uintptr_t>(data);
  return address == 0 ? 8 : static_cast<std::uint8_t>(std::min(8, __builtin_ctzll(address)));
}

struct Factor {
  const Tensor &tensor;
  bool by_row;
  Lines lines;
};

void launch(const Product &product, const Factor &a, const Factor &b, const Tensor &out, const Lines &rows) {
  PlanKey key{};
  key.m = out.shape[out.shape.rank - 1];
  key.n = out.shape[out.shape.rank - 2];
  key.k = a.tensor.shape[a.tensor.shape.rank - 1];
  key.batch = product.batch;
  key.lead_a = b.lines.lead, key.step_a = b.lines.step;
  key.lead_b = a.lines.lead, key.step_b = a.lines.step;
  key.lead_d = rows.lead, key.step_d = rows.step;
  key.dtype = static_cast<std::uint8_t>(a.tensor.dtype);
  key.transpose_a = !b.by_row, key.transpose_b = !a.by_row;
  key.activation = static_cast<std::uint8_t>(product.activation);
  key.bias = product.bias != nullptr;
  key.tf32 = product.tf32;
  key.tune = product.tune;
  key.align_a = alignment(b.tensor.data), key.align_b = alignment(a.tensor.data), key.align_d = alignment(out.data);
  key.align_bias = product.bias ? alignment(product.bias->data) : 0;
  const Operands operands{b.tensor.data, a.tensor.data, out.data, product.bias ? product.bias->data : nullptr};
  if (run_planned(key, operands, out.place(), product.stream)) return;
  for (std::int64_t each = 0; each < product.batch; ++each) {  // no algorithm puts the bias or the activation to it
    finish({out.data + each * rows.step * itemsize(out.dtype), out.dtype, key.n, key.m, rows.lead}, operands.bias,
           product.activation, product.stream);
  }
}

void multiply_float(const Product &product) {
  const auto factor = [&](const Tensor &tensor, Tensor &packed) -> Factor {
    const Lines rows = lines(tensor, true), columns = lines(tensor, false);
    if (rows.found || columns.found) return {tensor, rows.found, rows.found ? rows : columns};
    packed = packed_copy(tensor, product.stream);
    return {packed, true, lines(packed, true)};
  };
  Tensor packed_a, packed_b;
  const Factor a = factor(product.a, packed_a), b = factor(product.b, packed_b);
  const Lines rows = lines(product.out, true);
  const bool direct = rows.found && (product.batch == 1 || rows.step > 0);
  if (direct) return launch(product, a, b, product.out, rows);
  const Tensor made = make_tensor(product.out.shape, product.out.dtype, product.out.place(), product.stream);
  launch(product, a, b, made, lines(made, true));
  copy(product.out, made, product.stream);
}

Tensor head(const Tensor &tensor, const Dims &shape) {  // the first corner of `shape`
  Tensor view = tensor;
  view.shape = shape;
  return view;
}

Dims resized(Dims shape, std::int64_t rows, std::int64_t columns) {
  shape[shape.rank - 2] = rows;
  shape[shape.rank - 1] = columns;
  return shape;
}

// `tensor` in rows of `columns`, of which there are `rows`; what it does not fill is 0.
Tensor padded(const Tensor &tensor, std::int64_t rows, std::int64_t columns, Stream stream) {
  Tensor made = make_tensor(resized(tensor.shape, rows, columns), tensor.dtype, tensor.place(), stream);
  if (made.shape != tensor.shape) fill(made, {0, itemsize(made.dtype)}, stream);
  Tensor corner = head(made, tensor.shape);
  copy(corner, tensor, stream);
  return made;
}

// cuBLASLt multiplies int8 when both factors run along k, and m, k and the distances are multiples of 4 (16 is fast).
void multiply_int8(const Product &product) {
  const std::int64_t k = round_up(product.k), n = round_up(product.n);
  const auto fits = [](const Tensor &tensor, const Lines &found, int bytes) {
    return found.found && found.lead * bytes % kInt8Step == 0 && found.step * bytes % kInt8Step == 0 &&
           alignment(tensor.data) >= 4;
  };
  Tensor a = product.a, turned = product.b, out = product.out;
  std::swap(turned.shape[turned.shape.rank - 1], turned.shape[turned.shape.rank - 2]);
  std::swap(turned.strides[turned.strides.rank - 1], turned.strides[turned.strides.rank - 2]);
  if (k != product.k || !fits(a, lines(a, true), 1)) a = padded(a, product.m, k, product.stream);
  if (k != product.k || n != product.n || !fits(turned, lines(turned, true), 1)) {
    turned = padded(turned, n, k, product.stream);
  }
  const Lines rows = lines(out, true);
  const bool direct = n == product.n && fits(out, rows, 4) && (product.batch == 1 || rows.step > 0);
  if (!direct) out = make_tensor(resized(out.shape, product.m, n), out.dtype, out.place(), product.stream);
  launch(product, {a, true, lines(a, true)}, {turned, false, lines(turned, true)}, out, lines(out, true));
  if (!direct) copy(product.out, head(out, product.out.shape), product.stream);
}

}  // namespace

void multiply(const Product &given) {
  Product product = given;
  StreamScope scope(given.out.place(), given.stream,
                    {given.a.storage.get(), given.b.storage.get(), given.out.storage.get(),
                     given.bias ? given.bias->storage.get() : nullptr});
  Tensor bias;
  if (given.bias && given.bias->strides[0] != 1) {
    bias = packed_copy(*given.bias, given.stream);
    product.bias = &bias;
  }
  product.a.dtype == DType::int8 ? multiply_int8(product) : multiply_float(product);
  scope.done();
}

}  // namespace lltm_ray::cuda
