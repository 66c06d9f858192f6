// A strided view of a block of memory on one device.
#pragma once
#include "dtype.hpp"
#include "kernels.hpp"
#include "storage.hpp"

namespace lltm_ray {

// One entry of an index: an integer takes its axis away, a slice keeps it.
struct Slice {
  bool integer = false;
  std::int64_t start = 0, step = 1, count = 0;
};

struct Tensor {
  std::shared_ptr<Storage> storage;
  char *data = nullptr;
  Dims shape, strides;
  DType dtype = DType::float32;
  bool readonly = false;

  Place place() const { return storage->place; }
  std::int64_t count() const { return count_elements(shape, itemsize(dtype)); }
  std::int64_t nbytes() const { return count() * itemsize(dtype); }
  bool packed() const { return is_packed(shape, strides); }
};

Tensor make_tensor(const Dims &shape, DType dtype, Place place, Stream stream);  // uninitialised

// Views: they share memory and cost nothing.
Tensor reshaped(const Tensor &tensor, Dims shape);  // one size may be -1; ShapeError where that takes a copy
Tensor permuted(const Tensor &tensor, const Dims &axes);
Tensor sliced(const Tensor &tensor, const Slice *slices, int count);  // the axes after the last slice are kept whole

// Work: it is queued on `stream` of the target's device, which waits for the source. Between host and device it is done
// when the call returns.
void fill(Tensor &to, Value value, Stream stream);
void copy(Tensor &to, const Tensor &from, Stream stream);  // of equal shapes; converts types
Tensor packed_copy(const Tensor &tensor, Stream stream);
Tensor converted(const Tensor &tensor, Place place, DType dtype, Stream stream);  // itself when nothing changes

Value value_of(double number, DType dtype);
bool overlap(const Tensor &left, const Tensor &right);  // of the bytes from the first to the last element
void require_aligned(const Tensor &tensor);  // as processors need it; checks the shape too
void require_writable(const Tensor &to);

}  // namespace lltm_ray
