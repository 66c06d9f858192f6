"""Which library holds an array, and which device: NumPy's are told from PyTorch's without importing PyTorch."""

from __future__ import annotations

import contextlib
import sys
from typing import Any

import numpy as np

from lltm_ray._optional import load
from lltm_ray.errors import ConfigError


def torch_of(value: object) -> Any:
    """PyTorch's module if `value` is one of its tensors, else None."""
    torch = sys.modules.get("torch")
    tensor = getattr(torch, "Tensor", None)  # None also while another thread is still importing PyTorch
    return torch if tensor is not None and isinstance(value, tensor) else None


def is_cuda(value: Any) -> bool:
    """Whether `value` is a tensor in a GPU's memory."""
    return torch_of(value) is not None and bool(value.is_cuda)


def require_array(field: str, value: object) -> None:
    """Refuse what is neither a NumPy array nor a PyTorch tensor on the CPU or a CUDA device."""
    if isinstance(value, np.ndarray):
        return
    if torch_of(value) is None:
        raise ConfigError(field, type(value).__name__, "pass a NumPy array or a PyTorch tensor")
    device = value.device.type  # type: ignore[attr-defined]
    if device not in {"cpu", "cuda"}:
        raise ConfigError(field, device, "move the tensor to the CPU or a CUDA device")


def dtype_name(value: Any) -> str:
    """Name of an array's or tensor's element type in both libraries: `float16`, `bfloat16`, `uint8`..."""
    return str(value.dtype).removeprefix("torch.")


def triton_module(name: str) -> Any:
    """One of this package's modules of Triton kernels, imported on first use."""
    return load(f"lltm_ray.kernels.{name}", extra="torch", feature="Triton")


def on_device_of(tensor: Any) -> contextlib.AbstractContextManager[Any]:
    """Makes the tensor's GPU the current one, as Triton's launches need; free of charge where it is already."""
    torch = torch_of(tensor)
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    guard: contextlib.AbstractContextManager[Any] = torch.cuda.device(tensor.device)
    return guard
