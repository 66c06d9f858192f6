#include "tensor.hpp"

#include <algorithm>
#include <cmath>

#include "error.hpp"

#ifdef LLTM_RAY_CUDA
#include "cuda.hpp"
#endif

namespace lltm_ray {
namespace {

// [first byte, byte after the last) of a tensor that is not empty.
std::pair<const char *, const char *> range(const Tensor &tensor) {
  std::int64_t low = 0, high = 0;
  for (int axis = 0; axis < tensor.shape.rank; ++axis) {
    const std::int64_t reach = (tensor.shape[axis] - 1) * tensor.strides[axis];
    (reach < 0 ? low : high) += reach;
  }
  const int size = itemsize(tensor.dtype);
  return {tensor.data + low * size, tensor.data + (high + 1) * size};
}

#ifdef LLTM_RAY_CUDA

// Both are without gaps, and at least one is on a GPU. `stream` is of the GPU that is written, or else read.
void transfer(Tensor &to, const Tensor &from, Stream stream) {
  const Place place = to.place().on_cpu() ? from.place() : to.place();
  StreamScope scope(place, stream, {to.storage.get(), from.storage.get()});
  if (!to.place().on_cpu() && !from.place().on_cpu() && to.place() != from.place()) {
    check(cudaMemcpyPeerAsync(to.data, to.place().cuda, from.data, from.place().cuda, to.nbytes(), handle(stream)),
          "cudaMemcpyPeerAsync");
  } else {
    check(cudaMemcpyAsync(to.data, from.data, to.nbytes(), cudaMemcpyDefault, handle(stream)), "cudaMemcpyAsync");
  }
  if (to.place().on_cpu() || from.place().on_cpu())
    check(cudaStreamSynchronize(handle(stream)), "cudaStreamSynchronize");
  scope.done();
}

void copy_on_cuda(Tensor &to, const Tensor &from, Stream stream) {
  StreamScope scope(to.place(), stream, {to.storage.get(), from.storage.get()});
  const Walk walk = make_walk(to.shape, to.strides, from.strides);
  if (to.dtype == from.dtype) {
    cuda::copy(walk, to.data, from.data, itemsize(to.dtype), stream);
  } else {
    cuda::cast(walk, to.data, to.dtype, from.data, from.dtype, stream);
  }
  scope.done();
}

#endif

void copy_on_cpu(Tensor &to, const Tensor &from) {
  const Walk walk = make_walk(to.shape, to.strides, from.strides);
  if (to.dtype == from.dtype) return cpu::copy(walk, to.data, from.data, itemsize(to.dtype));
  cpu::cast(walk, to.data, to.dtype, from.data, from.dtype);
}

void copy_within(Tensor &to, const Tensor &from, Stream stream) {
  if (to.place().on_cpu()) return copy_on_cpu(to, from);
#ifdef LLTM_RAY_CUDA
  if (to.dtype == from.dtype && to.packed() && from.packed()) return transfer(to, from, stream);
  copy_on_cuda(to, from, stream);
#else
  (void)stream;
#endif
}

void copy_across(Tensor &to, const Tensor &from, Stream stream) {
#ifdef LLTM_RAY_CUDA
  // `stream` is of the device that is written, or of the one that is read when that is the CPU; see converted().
  const Stream there = to.place().on_cpu() ? stream : from.storage->home;
  const Tensor source = packed_copy(converted(from, from.place(), to.dtype, there), there);
  if (to.packed()) return transfer(to, source, stream);
  Tensor landed = make_tensor(to.shape, to.dtype, to.place(), stream);
  transfer(landed, source, stream);
  copy_within(to, landed, stream);
#else
  (void)to, (void)from, (void)stream;
  fail(ErrorKind::device, "this build of the native module has no CUDA");
#endif
}

}  // namespace

Tensor make_tensor(const Dims &shape, DType dtype, Place place, Stream stream) {
  Tensor made;
  made.storage = Storage::allocate(place, count_elements(shape, itemsize(dtype)) * itemsize(dtype), stream);
  made.data = made.storage->data;
  made.shape = shape;
  made.strides = packed_strides(shape);
  made.dtype = dtype;
  return made;
}

Tensor reshaped(const Tensor &tensor, Dims shape) {
  const std::int64_t count = tensor.count();
  std::int64_t known = 1;
  int open = -1;
  for (int axis = 0; axis < shape.rank; ++axis) {
    if (shape[axis] == -1 && open < 0) {
      open = axis;
    } else if (shape[axis] < 0 || __builtin_mul_overflow(known, shape[axis], &known)) {
      fail(ErrorKind::shape, "shape=" + shape.text() + ": sizes are 0 or more, and one may be -1");
    }
  }
  if (open >= 0 && known > 0 && count % known == 0) shape[open] = count / known;
  if (open >= 0 ? known == 0 || count % known != 0 : known != count) {
    fail(ErrorKind::shape, "shape=" + shape.text() + ": the tensor of shape " + tensor.shape.text() + " has " +
                               std::to_string(count) + " elements");
  }
  count_elements(shape, itemsize(tensor.dtype));  // an empty one may have sizes whose strides do not fit
  Tensor view = tensor;
  view.shape = shape;
  if (!reshape_strides(tensor.shape, tensor.strides, shape, view.strides)) {
    fail(ErrorKind::shape, "shape=" + shape.text() + ": the elements of this view lie with strides " +
                               tensor.strides.text() + " and cannot be seen so; call contiguous() first");
  }
  return view;
}

Tensor permuted(const Tensor &tensor, const Dims &axes) {
  bool seen[kMaxRank] = {};
  Tensor view = tensor;
  for (int to = 0; to < axes.rank && axes.rank == tensor.shape.rank; ++to) {
    const int axis = wrap_axis(axes[to], tensor.shape.rank);
    if (seen[axis]) break;
    seen[axis] = true;
    view.shape[to] = tensor.shape[axis];
    view.strides[to] = tensor.strides[axis];
  }
  if (axes.rank != tensor.shape.rank || std::count(seen, seen + kMaxRank, true) != axes.rank) {
    fail(ErrorKind::shape,
         "axes=" + axes.text() + ": name each of the " + std::to_string(tensor.shape.rank) + " axes once");
  }
  return view;
}

Tensor sliced(const Tensor &tensor, const Slice *slices, int count) {
  Tensor view = tensor;
  view.shape.rank = view.strides.rank = 0;
  for (int axis = 0; axis < tensor.shape.rank; ++axis) {
    const Slice whole{false, 0, 1, tensor.shape[axis]};
    const Slice &slice = axis < count ? slices[axis] : whole;
    if (slice.integer || slice.count > 0) view.data += slice.start * tensor.strides[axis] * itemsize(tensor.dtype);
    if (slice.integer) continue;
    view.shape.push(slice.count);
    view.strides.push(slice.count > 1 ? tensor.strides[axis] * slice.step : tensor.strides[axis]);
  }
  return view;
}

void fill(Tensor &to, Value value, Stream stream) {
  require_writable(to);
  const Walk walk = make_walk(to.shape, to.strides, to.strides);
  if (to.place().on_cpu()) return cpu::fill(walk, to.data, value);
#ifdef LLTM_RAY_CUDA
  StreamScope scope(to.place(), stream, {to.storage.get()});
  if (value.bits == 0 && to.packed()) {
    check(cudaMemsetAsync(to.data, 0, to.nbytes(), handle(stream)), "cudaMemsetAsync");
  } else {
    cuda::fill(walk, to.data, value, stream);
  }
  scope.done();
#else
  (void)stream;
#endif
}

void copy(Tensor &to, const Tensor &from, Stream stream) {
  require_writable(to);
  if (to.shape != from.shape) {
    fail(ErrorKind::shape, "shape=" + from.shape.text() + ": the target has shape " + to.shape.text());
  }
  if (to.count() == 0) return;
  if (to.place() != from.place()) return copy_across(to, from, stream);
  if (!overlap(to, from)) return copy_within(to, from, stream);
  Tensor apart = make_tensor(from.shape, from.dtype, from.place(), stream);
  copy_within(apart, from, stream);
  copy_within(to, apart, stream);
}

Tensor packed_copy(const Tensor &tensor, Stream stream) {
  if (tensor.packed()) return tensor;
  Tensor made = make_tensor(tensor.shape, tensor.dtype, tensor.place(), stream);
  copy(made, tensor, stream);
  return made;
}

Tensor converted(const Tensor &tensor, Place place, DType dtype, Stream stream) {
  if (tensor.place() == place && tensor.dtype == dtype) return tensor;
  Tensor made = make_tensor(tensor.shape, dtype, place, stream);
  copy(made, tensor, stream);
  return made;
}

Value value_of(double number, DType dtype) {
  Value value{0, itemsize(dtype)};
  if (is_float(dtype)) {
    store(&value.bits, dtype, 0, static_cast<float>(number));
    return value;
  }
  const double low = dtype == DType::uint8 ? 0 : dtype == DType::int8 ? -128 : -2147483648.0;
  const double high = dtype == DType::uint8 ? 255 : dtype == DType::int8 ? 127 : 2147483647.0;
  if (!(number >= low && number <= high) || number != std::floor(number)) {
    fail(ErrorKind::dtype, "value=" + std::to_string(number) + ": " + name(dtype) + " holds whole numbers from " +
                               std::to_string(std::int64_t(low)) + " to " + std::to_string(std::int64_t(high)));
  }
  store(&value.bits, dtype, 0, static_cast<std::int32_t>(number));
  return value;
}

bool overlap(const Tensor &left, const Tensor &right) {
  if (left.place() != right.place() || left.count() == 0 || right.count() == 0) return false;
  const auto a = range(left), b = range(right);
  return a.first < b.second && b.first < a.second;
}

void require_aligned(const Tensor &tensor) {
  if (tensor.count() && reinterpret_cast<std::uintptr_t>(tensor.data) % itemsize(tensor.dtype)) {
    fail(ErrorKind::native, "the memory does not start at a multiple of the element's size: share a copy of it");
  }
}

void require_writable(const Tensor &to) {
  if (to.readonly) fail(ErrorKind::native, "the tensor is a read-only view of somebody else's memory; write to a copy");
}

}  // namespace lltm_ray
