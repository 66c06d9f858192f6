"""What a GPU's tensor cores can multiply, and precision policies that put back every switch they touch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lltm_ray._optional import load
from lltm_ray.errors import ConfigError

TENSOR_CORE_TYPES = {"fp16": (7, 0), "int8": (7, 2), "bf16": (8, 0), "tf32": (8, 0), "fp8": (8, 9), "fp4": (10, 0)}
"""Lowest compute capability whose tensor cores multiply a type (CUDA C++ Programming Guide, "Compute Capabilities")."""
_AUTOCAST = ("float16", "bfloat16")
_MATMUL = ("allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction")


@dataclass(frozen=True, slots=True, kw_only=True)
class PrecisionPolicy:
    """How matrices are multiplied inside a scope.

    Attributes:
        tf32: float32 products and convolutions may round their inputs to TF32 (10 bits of fraction).
        reduced_sums: float16 and bfloat16 products may add partial sums in their own type.
        autocast: element type that PyTorch's autocast takes for products (`float16`, `bfloat16`); None turns it off.
    """

    tf32: bool = False
    reduced_sums: bool = False
    autocast: str | None = None


FLOAT32 = PrecisionPolicy()
"""float32 stays float32, all sums in float32."""
TF32 = PrecisionPolicy(tf32=True)
FLOAT16 = PrecisionPolicy(tf32=True, autocast="float16")
BFLOAT16 = PrecisionPolicy(tf32=True, autocast="bfloat16")


def compute_capability(device: int = 0) -> tuple[int, int]:
    """Of a CUDA device, as numbers: (9, 0), which compares rightly with (10, 0).

    Raises:
        ConfigError: there is no such device.
    """
    cuda = load("torch", extra="torch").cuda
    count = cuda.device_count()
    if not 0 <= device < count:
        raise ConfigError("device", device, f"this process sees {count} CUDA devices")
    major, minor = cuda.get_device_capability(device)
    return int(major), int(minor)


def tensor_core_types(capability: tuple[int, int]) -> frozenset[str]:
    """Which of `TENSOR_CORE_TYPES` a device of this compute capability multiplies in tensor cores."""
    return frozenset(name for name, least in TENSOR_CORE_TYPES.items() if tuple(capability) >= least)


def best_policy(capability: tuple[int, int]) -> PrecisionPolicy:
    """The fastest policy whose results stay close to float32's: bfloat16 where tensor cores take it, else float16."""
    types = tensor_core_types(capability)
    return BFLOAT16 if "bf16" in types else FLOAT16 if "fp16" in types else FLOAT32


@contextlib.contextmanager
def precision(policy: PrecisionPolicy, *, device: str = "cuda") -> Iterator[None]:
    """Multiply under `policy` inside the scope; every switch is put back, also after an error. Scopes nest.

    The switches are PyTorch's own and hold for the whole process (autocast: for the thread), so scopes of two threads
    must not overlap.

    Args:
        policy: what to allow.
        device: device type that autocast is for: `cuda` or `cpu`.

    Raises:
        ConfigError: an unknown autocast type or device.
    """
    if policy.autocast is not None and policy.autocast not in _AUTOCAST:
        raise ConfigError("autocast", policy.autocast, f"must be one of {', '.join(_AUTOCAST)}, or None")
    if device not in {"cuda", "cpu"}:
        raise ConfigError("device", device, "must be cuda or cpu")
    torch = load("torch", extra="torch")
    with contextlib.ExitStack() as scope:
        for holder, name, value in _switches(torch, policy):
            scope.callback(setattr, holder, name, getattr(holder, name))
            setattr(holder, name, value)
        wanted = getattr(torch, policy.autocast or "bfloat16")
        scope.enter_context(torch.autocast(device, dtype=wanted, enabled=policy.autocast is not None))
        yield


def _switches(torch: Any, policy: PrecisionPolicy) -> list[tuple[Any, str, Any]]:
    """Holder, attribute and wanted value; PyTorch 2.9 renamed those of TF32, and reading both spellings is an error."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    float32: list[tuple[Any, str, Any]]
    if hasattr(cudnn, "conv"):
        word = "tf32" if policy.tf32 else "ieee"
        float32 = [(holder, "fp32_precision", word) for holder in (matmul, cudnn.conv, cudnn.rnn)]
    else:
        float32 = [(matmul, "allow_tf32", policy.tf32), (cudnn, "allow_tf32", policy.tf32)]
    return [*float32, *((matmul, name, policy.reduced_sums) for name in _MATMUL)]
