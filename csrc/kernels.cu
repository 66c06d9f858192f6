#include <algorithm>

#include "cuda.hpp"
#include "kernels.hpp"

namespace lltm_ray::cuda {
namespace {

constexpr int kThreads = 256, kTile = 32, kWidest = 16, kAhead = 4;
constexpr std::int64_t kMostBlocks = 1 << 16, kMostInGrid = 65535;

template <class T, int size>
struct alignas(sizeof(T) * size) Pack {
  T at[size];
};
template <class T, class U>
constexpr int kAtOnce = kWidest / (sizeof(T) > sizeof(U) ? sizeof(T) : sizeof(U));

unsigned blocks_for(std::int64_t count) {
  return static_cast<unsigned>(std::min((count + kThreads - 1) / kThreads, kMostBlocks));
}

// Where element `linear` lies in both memories; `Index` is 32 bits wide where the count allows it.
template <class Index>
__device__ void locate(const Walk &walk, Index linear, std::int64_t &to, std::int64_t &from) {
  to = from = 0;
  for (int axis = walk.rank - 1; axis > 0; --axis) {
    const Index size = static_cast<Index>(walk.shape[axis]), rest = linear / size, at = linear - rest * size;
    to += at * walk.to[axis];
    from += at * walk.from[axis];
    linear = rest;
  }
  if (walk.rank > 0) {
    to += linear * walk.to[0];
    from += linear * walk.from[0];
  }
}

template <class Index, class Work>
__device__ void for_all(const Walk &walk, Work &&work) {
  const Index count = static_cast<Index>(walk.count), step = static_cast<Index>(gridDim.x) * kThreads;
  for (Index linear = static_cast<Index>(blockIdx.x) * kThreads + threadIdx.x; linear < count; linear += step) {
    std::int64_t to, from;
    locate(walk, linear, to, from);
    work(to, from);
  }
}

template <class Index, class T>
__global__ void __launch_bounds__(kThreads) copy_kernel(const __grid_constant__ Walk walk, T *to, const T *from) {
  for_all<Index>(walk, [=](std::int64_t at, std::int64_t start) { to[at] = from[start]; });
}

template <class Index, class T>
__global__ void __launch_bounds__(kThreads)
    cast_kernel(const __grid_constant__ Walk walk, void *to, DType to_type, const T *from) {
  for_all<Index>(walk, [=](std::int64_t at, std::int64_t start) { store(to, to_type, at, widen(from[start])); });
}

// `count` values that lie one after another in both memories: `kWide` at a time by the widest access of the larger type,
// and `kAhead` such reads before the first write.
template <class T, class U>
__global__ void __launch_bounds__(kThreads) cast_packed_kernel(std::int64_t count, U *to, const T *from) {
  constexpr int kWide = kAtOnce<T, U>;
  const std::int64_t whole = count / kWide, step = std::int64_t(gridDim.x) * kThreads * kAhead;
  for (std::int64_t start = std::int64_t(blockIdx.x) * kThreads * kAhead + threadIdx.x; start < whole; start += step) {
    Pack<T, kWide> read[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const std::int64_t at = start + i * kThreads;
      if (at < whole) read[i] = reinterpret_cast<const Pack<T, kWide> *>(from)[at];
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const std::int64_t at = start + i * kThreads;
      Pack<U, kWide> written;
#pragma unroll
      for (int j = 0; j < kWide; ++j) narrow(widen(read[i].at[j]), written.at[j]);
      if (at < whole) reinterpret_cast<Pack<U, kWide> *>(to)[at] = written;
    }
  }
  const std::int64_t last = whole * kWide + threadIdx.x;
  if (blockIdx.x == 0 && last < count) narrow(widen(from[last]), to[last]);
}

template <class Index, class T>
__global__ void __launch_bounds__(kThreads) fill_kernel(const __grid_constant__ Walk walk, T *to, T value) {
  for_all<Index>(walk, [=](std::int64_t at, std::int64_t) { to[at] = value; });
}

// Turns matrices by way of tiles: both memories are read and written along their lines.
template <class T>
__global__ void __launch_bounds__(kThreads) turn_kernel(const __grid_constant__ Walk walk, T *to, const T *from) {
  __shared__ T tile[kTile][kTile + 1];
  const int down = walk.rank - 2, along = walk.rank - 1;
  if (walk.rank == 3) {
    to += blockIdx.z * walk.to[0];
    from += blockIdx.z * walk.from[0];
  }
  const std::int64_t row = std::int64_t(blockIdx.y) * kTile, column = std::int64_t(blockIdx.x) * kTile;
  const int lane = threadIdx.x % kTile, start = threadIdx.x / kTile, step = kThreads / kTile;
  for (int line = start; line < kTile; line += step) {
    if (row + lane < walk.shape[down] && column + line < walk.shape[along]) {
      tile[line][lane] = from[row + lane + (column + line) * walk.from[along]];
    }
  }
  __syncthreads();
  for (int line = start; line < kTile; line += step) {
    if (row + line < walk.shape[down] && column + lane < walk.shape[along]) {
      to[(row + line) * walk.to[down] + column + lane] = tile[lane][line];
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) finish_kernel(T *data, Rows rows, const T *bias, Activation activation) {
  const std::int64_t count = rows.rows * rows.columns, step = std::int64_t(gridDim.x) * kThreads;
  for (std::int64_t linear = std::int64_t(blockIdx.x) * kThreads + threadIdx.x; linear < count; linear += step) {
    const std::int64_t row = linear / rows.columns, column = linear - row * rows.columns;
    T &place = data[row * rows.pitch + column];
    narrow(activate(widen(place) + (bias ? widen(bias[column]) : 0.f), activation), place);
  }
}

template <class Launch>
void with_index(const Walk &walk, Launch &&launch) {
  if (walk.count < (std::int64_t(1) << 31)) {
    launch(std::uint32_t(0));
  } else {
    launch(std::uint64_t(0));
  }
  check(cudaGetLastError(), "launch of a kernel");
}

bool is_turned(const Walk &walk) {
  const int down = walk.rank - 2;
  return (walk.rank == 2 || (walk.rank == 3 && walk.shape[0] <= kMostInGrid)) && walk.to[down + 1] == 1 &&
         walk.from[down] == 1 && walk.shape[down] >= kTile && walk.shape[down + 1] >= kTile &&
         walk.shape[down] / kTile < kMostInGrid;
}

template <class T>
void copy_as(const Walk &walk, void *to, const void *from, Stream stream) {
  if (is_turned(walk)) {
    const int down = walk.rank - 2;
    const dim3 grid(static_cast<unsigned>((walk.shape[down + 1] + kTile - 1) / kTile),
                    static_cast<unsigned>((walk.shape[down] + kTile - 1) / kTile),
                    walk.rank == 3 ? static_cast<unsigned>(walk.shape[0]) : 1);
    turn_kernel<<<grid, kThreads, 0, handle(stream)>>>(walk, static_cast<T *>(to), static_cast<const T *>(from));
    return check(cudaGetLastError(), "launch of a kernel");
  }
  with_index(walk, [&](auto index) {
    copy_kernel<decltype(index), T><<<blocks_for(walk.count), kThreads, 0, handle(stream)>>>(
        walk, static_cast<T *>(to), static_cast<const T *>(from));
  });
}

template <class T>
void fill_as(const Walk &walk, void *to, std::uint32_t bits, Stream stream) {
  with_index(walk, [&](auto index) {
    fill_kernel<decltype(index), T>
        <<<blocks_for(walk.count), kThreads, 0, handle(stream)>>>(walk, static_cast<T *>(to), static_cast<T>(bits));
  });
}

// Whether a cast may take `kWidest` bytes of the larger type at a time.
bool is_dense(const Walk &walk, const void *to, DType to_type, const void *from, DType from_type) {
  const std::uintptr_t wide = kWidest / std::max(itemsize(to_type), itemsize(from_type));
  return walk.rank == 1 && walk.to[0] == 1 && walk.from[0] == 1 &&
         reinterpret_cast<std::uintptr_t>(to) % (wide * itemsize(to_type)) == 0 &&
         reinterpret_cast<std::uintptr_t>(from) % (wide * itemsize(from_type)) == 0;
}

template <class T, class U>
void cast_packed(std::int64_t count, U *to, const T *from, Stream stream) {
  constexpr std::int64_t kEach = kAhead * kAtOnce<T, U>;
  cast_packed_kernel<<<blocks_for((count + kEach - 1) / kEach), kThreads, 0, handle(stream)>>>(count, to, from);
  check(cudaGetLastError(), "launch of a kernel");
}

// Takes two neighbours for one element of twice the size while both memories allow it.
bool widen_elements(Walk &walk, const void *to, const void *from, int &itemsize) {
  const int last = walk.rank - 1;
  const auto addresses = reinterpret_cast<std::uintptr_t>(to) | reinterpret_cast<std::uintptr_t>(from);
  if (last < 0 || itemsize == 16 || walk.to[last] != 1 || walk.from[last] != 1) return false;
  if (addresses % (2 * itemsize) || walk.shape[last] % 2) return false;
  for (int axis = 0; axis < last; ++axis) {
    if (walk.to[axis] % 2 || walk.from[axis] % 2) return false;
  }
  for (int axis = 0; axis < last; ++axis) {
    walk.to[axis] /= 2;
    walk.from[axis] /= 2;
  }
  walk.shape[last] /= 2;
  walk.count /= 2;
  itemsize *= 2;
  return true;
}

}  // namespace

void copy(const Walk &wanted, void *to, const void *from, int itemsize, Stream stream) {
  Walk walk = wanted;
  if (walk.count == 0) return;
  while (widen_elements(walk, to, from, itemsize)) continue;
  switch (itemsize) {
    case 1: return copy_as<std::uint8_t>(walk, to, from, stream);
    case 2: return copy_as<std::uint16_t>(walk, to, from, stream);
    case 4: return copy_as<std::uint32_t>(walk, to, from, stream);
    case 8: return copy_as<uint2>(walk, to, from, stream);
    default: return copy_as<uint4>(walk, to, from, stream);
  }
}

void cast(const Walk &walk, void *to, DType to_type, const void *from, DType from_type, Stream stream) {
  if (walk.count == 0) return;
  with_type(from_type, [&](auto *type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if (is_dense(walk, to, to_type, from, from_type)) {
      return with_type(to_type, [&](auto *other) {
        cast_packed(walk.count, static_cast<decltype(other)>(to), static_cast<const T *>(from), stream);
      });
    }
    with_index(walk, [&](auto index) {
      cast_kernel<decltype(index), T>
          <<<blocks_for(walk.count), kThreads, 0, handle(stream)>>>(walk, to, to_type, static_cast<const T *>(from));
    });
  });
}

void fill(const Walk &walk, void *to, Value value, Stream stream) {
  if (walk.count == 0) return;
  if (value.itemsize == 4) return fill_as<std::uint32_t>(walk, to, value.bits, stream);
  if (value.itemsize == 2) return fill_as<std::uint16_t>(walk, to, value.bits, stream);
  fill_as<std::uint8_t>(walk, to, value.bits, stream);
}

void finish(const Rows &rows, const void *bias, Activation activation, Stream stream) {
  const std::int64_t count = rows.rows * rows.columns;
  if (count == 0) return;
  const auto launch = [&](auto *data) {
    finish_kernel<<<blocks_for(count), kThreads, 0, handle(stream)>>>(
        data, rows, static_cast<decltype(data)>(const_cast<void *>(bias)), activation);
  };
  if (rows.dtype == DType::float32) launch(static_cast<float *>(rows.data));
  if (rows.dtype == DType::float16) launch(static_cast<Half *>(rows.data));
  if (rows.dtype == DType::bfloat16) launch(static_cast<BFloat16 *>(rows.data));
  check(cudaGetLastError(), "launch of a kernel");
}

}  // namespace lltm_ray::cuda
