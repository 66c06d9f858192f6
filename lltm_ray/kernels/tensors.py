"""Tensors and matrix products on the CPU and on GPUs, without PyTorch: the face of `csrc/`.

Importing this module raises MissingExtraError where `_native` was not built. The functions are C++'s own.

A `Tensor` has a shape, strides (in elements), one of six dtypes (float32, float16, bfloat16, int32, int8, uint8; given
by name or as NumPy's or PyTorch's) and a device ("cpu", "cuda:0"; "cuda" is the thread's current one). Views (`T`,
`view`, `permute`, `transpose`, `t[::2, -1]`) share memory. Memory is freed with its last tensor.

Makers: `empty`, `zeros`, `ones`, `full`, `from_numpy` (a copy; uint16 with `dtype="bfloat16"` is taken for its bits).
Out again: `to_numpy` (a copy; bfloat16 as ml_dtypes' type where that is installed, or its bits as uint16), `item`.
Without a copy: `from_dlpack` and `__dlpack__` (`torch.from_dlpack(tensor)`, `numpy.from_dlpack(tensor)`), and
`from_cuda_array` and `__cuda_array_interface__` (`cupy.asarray(tensor)`).

Products: `matmul` of [m, k] and [k, n], `batched_matmul` of [batch, m, k] and [batch, k, n] (a batch of 1 serves all),
of float32, float16, bfloat16 (both summed in float32) and int8 (summed in int32, which the result is). Arguments:
`transpose_a`/`transpose_b`, `bias` [n] and `activation` ("relu", or "gelu" as 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715
x^3)))), `out`, `tf32` (float32 on tensor cores, with factors cut to 10 bits of fraction) and `tune` (times what
cuBLASLt proposes once for each new kind of problem, instead of taking its first). int8 is read in place where both
factors run along k in multiples of 16, as in `matmul(a, weights, transpose_b=True)`; else it is copied first.

Streams: `stream` is a CUDA stream as a number: 0 (the default) is the legacy default stream, and that of PyTorch is
`torch.cuda.current_stream().cuda_stream`. Work is queued, not awaited, except between host and device. A tensor
belongs to the stream it was made on, which must live as long as the tensor. Work on another stream waits for that one,
and that one then for the work: mixing streams is safe, but orders them. Memory of another library must not be freed
there before work on it is done, unless `stream` is the one that it was made on.

Errors are of `lltm_ray.errors`: ShapeError, DTypeError, DeviceError, DeviceMemoryError, and NativeError with CUDA's own
words for the rest. Casts round to nearest even between floats; from floats to integers they cut off the fraction and
stop at the ends of the range (NaN is 0); between integers they wrap.
"""

from __future__ import annotations

from lltm_ray.kernels.native import require_native

require_native()

from lltm_ray.kernels._native import (  # noqa: E402 - after the check, which says how to build it
    Tensor,
    batched_matmul,
    empty,
    from_cuda_array,
    from_dlpack,
    from_numpy,
    full,
    matmul,
    ones,
    zeros,
)

__all__ = [
    "Tensor",
    "batched_matmul",
    "empty",
    "from_cuda_array",
    "from_dlpack",
    "from_numpy",
    "full",
    "matmul",
    "ones",
    "zeros",
]
