// Products on the CPU: blocks of both factors are packed, then summed in registers of 4 x 16.
#include <algorithm>
#include <memory>

#include "matmul.hpp"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define LLTM_RAY_FASTEST __attribute__((target_clones("arch=haswell", "default")))  // AVX2 and FMA where there are
#else
#define LLTM_RAY_FASTEST
#endif

namespace lltm_ray::cpu {
namespace {

constexpr int kRows = 64, kColumns = 256, kDepth = 256, kStripRows = 4, kStripColumns = 16;

struct Matrix {
  const char *data;
  DType dtype;
  std::int64_t row_step, column_step;
};

template <class Sum>
struct Blocks {
  Sum a[kRows * kDepth], b[kDepth * kColumns], sums[kRows * kColumns];
};

// Copies `rows` x `columns` from (row, column) into strips of kStrip rows (or columns): [strip][depth][kStrip], with
// zeros up to the end of the last strip.
template <class T, class Sum>
void pack(const Matrix &matrix, std::int64_t across, std::int64_t depth_at, int wide, int deep, int strip, bool by_row,
          Sum *to) {
  const T *data = reinterpret_cast<const T *>(matrix.data);
  const std::int64_t step = by_row ? matrix.row_step : matrix.column_step;
  const std::int64_t inner = by_row ? matrix.column_step : matrix.row_step;
  for (int start = 0; start < wide; start += strip) {
    for (int depth = 0; depth < deep; ++depth) {
      const T *line = data + (across + start) * step + (depth_at + depth) * inner;
      for (int i = 0; i < strip; ++i) *to++ = start + i < wide ? Sum(widen(line[i * step])) : Sum(0);
    }
  }
}

template <class Sum>
void pack_any(const Matrix &matrix, std::int64_t across, std::int64_t depth_at, int wide, int deep, int strip,
              bool by_row, Sum *to) {
  if constexpr (std::is_same_v<Sum, std::int32_t>) {
    pack<std::int8_t>(matrix, across, depth_at, wide, deep, strip, by_row, to);
  } else if (matrix.dtype == DType::float32) {
    pack<float>(matrix, across, depth_at, wide, deep, strip, by_row, to);
  } else if (matrix.dtype == DType::float16) {
    pack<Half>(matrix, across, depth_at, wide, deep, strip, by_row, to);
  } else {
    pack<BFloat16>(matrix, across, depth_at, wide, deep, strip, by_row, to);
  }
}

// One line of a strip; compilers of x86 and ARM split it into the registers that there are.
template <class Sum>
struct Line {
  typedef Sum Type __attribute__((vector_size(kStripColumns * sizeof(Sum))));
};

template <class Sum>
inline __attribute__((always_inline)) void add_block_as(const Sum *a, const Sum *b, Sum *sums, int rows, int columns,
                                                        int deep) {
  using Vector = typename Line<Sum>::Type;
  for (int row = 0; row < rows; row += kStripRows) {
    for (int column = 0; column < columns; column += kStripColumns) {
      const Sum *left = a + std::int64_t(row) * deep, *right = b + std::int64_t(column) * deep;
      Vector found[kStripRows] = {}, line;
      for (int depth = 0; depth < deep; ++depth, left += kStripRows, right += kStripColumns) {
        std::memcpy(&line, right, sizeof(line));
        for (int i = 0; i < kStripRows; ++i) found[i] += left[i] * line;
      }
      for (int i = 0; i < kStripRows; ++i) {
        Sum *target = sums + (row + i) * kColumns + column;
        std::memcpy(&line, target, sizeof(line));
        line += found[i];
        std::memcpy(target, &line, sizeof(line));
      }
    }
  }
}

LLTM_RAY_FASTEST void add_block(const float *a, const float *b, float *sums, int rows, int columns, int deep) {
  add_block_as(a, b, sums, rows, columns, deep);
}
LLTM_RAY_FASTEST void add_block(const std::uint32_t *a, const std::uint32_t *b, std::uint32_t *sums, int rows,
                                int columns, int deep) {
  add_block_as(a, b, sums, rows, columns, deep);
}

// int32 sums wrap like those of a GPU: they are formed without a sign, where C++ defines that.
void add_block(const std::int32_t *a, const std::int32_t *b, std::int32_t *sums, int rows, int columns, int deep) {
  add_block(reinterpret_cast<const std::uint32_t *>(a), reinterpret_cast<const std::uint32_t *>(b),
            reinterpret_cast<std::uint32_t *>(sums), rows, columns, deep);
}

struct Target {
  char *data;
  DType dtype;
  std::int64_t row_step, column_step;
};

template <class Sum>
void write_block(const Product &product, const Target &target, const Sum *sums, std::int64_t row_at,
                 std::int64_t column_at, int rows, int columns) {
  for (int row = 0; row < rows; ++row) {
    for (int column = 0; column < columns; ++column) {
      Sum sum = sums[row * kColumns + column];
      if constexpr (std::is_same_v<Sum, float>) {
        float bias = 0.f;
        if (product.bias) {
          const char *at =
              product.bias->data + (column_at + column) * product.bias->strides[0] * itemsize(target.dtype);
          with_type(target.dtype, [&](auto *type) { bias = float(widen(*static_cast<decltype(type)>((void *)at))); });
        }
        sum = activate(sum + bias, product.activation);
      }
      store(target.data, target.dtype, (row_at + row) * target.row_step + (column_at + column) * target.column_step,
            sum);
    }
  }
}

template <class Sum>
void multiply_one(const Product &product, const Matrix &a, const Matrix &b, const Target &target, Blocks<Sum> &blocks) {
  for (std::int64_t row = 0; row < product.m; row += kRows) {
    const int rows = int(std::min<std::int64_t>(kRows, product.m - row));
    for (std::int64_t column = 0; column < product.n; column += kColumns) {
      const int columns = int(std::min<std::int64_t>(kColumns, product.n - column));
      std::fill_n(blocks.sums, kRows * kColumns, Sum(0));
      for (std::int64_t depth = 0; depth < product.k; depth += kDepth) {
        const int deep = int(std::min<std::int64_t>(kDepth, product.k - depth));
        pack_any(a, row, depth, rows, deep, kStripRows, true, blocks.a);
        pack_any(b, column, depth, columns, deep, kStripColumns, false, blocks.b);
        add_block(blocks.a, blocks.b, blocks.sums, rows, columns, deep);
      }
      write_block(product, target, blocks.sums, row, column, rows, columns);
    }
  }
}

template <class Sum>
void multiply_as(const Product &product) {
  const std::unique_ptr<Blocks<Sum>> blocks(new Blocks<Sum>);  // not cleared: each part is written before it is read
  const int last = product.out.shape.rank - 1;
  const auto step = [&](const Tensor &tensor) {  // from one matrix to the next, in bytes
    return last == 2 && tensor.shape[0] != 1 ? tensor.strides[0] * itemsize(tensor.dtype) : std::int64_t(0);
  };
  const Tensor &a = product.a, &b = product.b, &out = product.out;
  for (std::int64_t each = 0; each < product.batch; ++each) {
    multiply_one(product, Matrix{a.data + each * step(a), a.dtype, a.strides[last - 1], a.strides[last]},
                 Matrix{b.data + each * step(b), b.dtype, b.strides[last - 1], b.strides[last]},
                 Target{out.data + each * step(out), out.dtype, out.strides[last - 1], out.strides[last]}, *blocks);
  }
}

}  // namespace

void multiply(const Product &product) {
  if (product.a.dtype == DType::int8) return multiply_as<std::int32_t>(product);
  multiply_as<float>(product);
}

}  // namespace lltm_ray::cpu
