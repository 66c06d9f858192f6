"""Memory-bound steps of a transformer in one pass over their data, with a registry of them.

Each of `KERNELS` is callable: on CUDA tensors it launches its Triton kernel, elsewhere it computes the PyTorch
reference. All compute in float32 inside and round once. They are for inference: a tensor that needs a gradient is
refused.

=========  =================================================================================================
add        a + b
swiglu     silu(gate) * up
softmax    over the last dimension
layernorm  (x - mean) / sqrt(variance + eps) * weight + bias, over the last dimension
rmsnorm    x / sqrt(mean(x**2) + eps) * weight, over the last dimension (Zhang and Sennrich, 2019)
rope       rotary positions (Su et al., 2021): each pair of a head is turned by its token's angle
=========  =================================================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from lltm_ray._optional import load
from lltm_ray.errors import ConfigError
from lltm_ray.kernels._arrays import dtype_name, require_array, torch_of, triton_module
from lltm_ray.kernels.tuning import Tuner

STYLES = ("halves", "pairs")
"""Which numbers of a head make a pair: i and i + dim/2 (GPT-NeoX), or 2i and 2i + 1 (GPT-J, llama.cpp's `norm`)."""
WIDEST_ROW = 32768
"""Longer rows do not fit the registers of one program: PyTorch's own kernels take them."""
_ROUNDING = MappingProxyType({"float32": 1e-5, "float16": 2.0**-10, "bfloat16": 2.0**-7})


@dataclass(frozen=True, slots=True, kw_only=True)
class FusedKernel:
    """One registered operation.

    Attributes:
        name: in `KERNELS`, and of its launcher in `_fused_triton`.
        check: refuses shapes that do not go together.
        reference: the same in PyTorch; in float64 where it gets float64.
        tolerance: for each supported type, the largest |error| / max(1, |reference in float64|).
        by_row: whether one program holds a whole row.
    """

    name: str
    check: Callable[..., None]
    reference: Callable[..., Any]
    tolerance: Mapping[str, float]
    by_row: bool = False

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Element types that it supports."""
        return tuple(self.tolerance)

    def __call__(self, *tensors: Any, tuner: Tuner | None = None, **options: Any) -> Any:
        """Compute; a new tensor of the first one's shape and type.

        Args:
            tensors: of one device and type (`cos` and `sin` are float32), as `reference` takes them.
            tuner: finds and keeps the fastest launch settings of the GPU; fixed ones without.
            options: as `reference` takes them.

        Raises:
            ConfigError: tensors that are of no supported type, do not go together, or need a gradient.
        """
        self._check_tensors(tensors)
        self.check(*tensors, **options)
        first = tensors[0]
        if not first.is_cuda or not first.numel() or (self.by_row and first.shape[-1] > WIDEST_ROW):
            return self.reference(*tensors, **options)
        return getattr(triton_module("_fused_triton"), self.name)(*tensors, tuner=tuner, **options)

    def _check_tensors(self, tensors: tuple[Any, ...]) -> None:
        for tensor in tensors:
            require_array(self.name, tensor)
            torch = torch_of(tensor)
            if torch is None:
                raise ConfigError(self.name, type(tensor).__name__, "takes PyTorch tensors")
            if tensor.device != tensors[0].device:
                raise ConfigError(self.name, str(tensor.device), f"all tensors must be on {tensors[0].device}")
            if tensor.requires_grad and torch.is_grad_enabled():
                raise ConfigError(self.name, "requires_grad", "has no gradient; call it under torch.no_grad()")
        if not tensors or dtype_name(tensors[0]) not in self.tolerance:
            found = dtype_name(tensors[0]) if tensors else "nothing"
            raise ConfigError(self.name, found, f"supported types are {', '.join(self.tolerance)}")


def get_kernel(name: str) -> FusedKernel:
    """The registered kernel of this name.

    Raises:
        ConfigError: there is none.
    """
    if name not in KERNELS:
        raise ConfigError("kernel", name, f"is not registered; there are {', '.join(KERNELS)}")
    return KERNELS[name]


def _check_same(first: Any, second: Any) -> None:
    if first.shape != second.shape or first.dtype != second.dtype:
        found = (tuple(first.shape), tuple(second.shape), dtype_name(first), dtype_name(second))
        raise ConfigError("tensors", found, "must have the same shape and type")


def _check_row(x: Any, *vectors: Any, eps: float = 0.0) -> None:
    if x.ndim < 1:
        raise ConfigError("x", tuple(x.shape), "needs at least one dimension")
    for vector in vectors:
        if vector.shape != x.shape[-1:] or vector.dtype != x.dtype:
            found = (tuple(vector.shape), dtype_name(vector))
            raise ConfigError("weight", found, f"must be [{x.shape[-1]}] of {dtype_name(x)}, as x's last dimension")
    if eps < 0:
        raise ConfigError("eps", eps, "must not be negative")


def _check_rope(x: Any, cos: Any, sin: Any, *, style: str) -> None:
    if style not in STYLES:
        raise ConfigError("style", style, f"must be one of {', '.join(STYLES)}")
    if x.ndim < 3 or x.shape[-1] % 2:
        raise ConfigError("x", tuple(x.shape), "must be [..., tokens, heads, dim] with an even dim")
    for name, angles in (("cos", cos), ("sin", sin)):
        if tuple(angles.shape) != (x.shape[-3], x.shape[-1] // 2) or dtype_name(angles) not in {"float32", "float64"}:
            found = (tuple(angles.shape), dtype_name(angles))
            raise ConfigError(name, found, f"must be float32 [{x.shape[-3]}, {x.shape[-1] // 2}]: [tokens, dim / 2]")


def _wide(x: Any) -> Any:
    """Values in the type that sums are made in."""
    return x if dtype_name(x) == "float64" else x.float()


def _add(a: Any, b: Any) -> Any:
    return a + b


def _swiglu(gate: Any, up: Any) -> Any:
    wide = _wide(gate)
    return (wide * wide.sigmoid() * _wide(up)).to(gate.dtype)


def _softmax(x: Any) -> Any:
    return _wide(x).softmax(-1).to(x.dtype)


def _layernorm(x: Any, weight: Any, bias: Any, *, eps: float = 1e-5) -> Any:
    wide = _wide(x)
    centred = wide - wide.mean(-1, keepdim=True)
    scale = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    return (centred * scale * _wide(weight) + _wide(bias)).to(x.dtype)


def _rmsnorm(x: Any, weight: Any, *, eps: float = 1e-6) -> Any:
    wide = _wide(x)
    return (wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt() * _wide(weight)).to(x.dtype)


def _rope(x: Any, cos: Any, sin: Any, *, style: str) -> Any:
    torch = load("torch", extra="torch")
    wide, half = _wide(x), x.shape[-1] // 2
    first, second = (wide[..., :half], wide[..., half:]) if style == "halves" else (wide[..., ::2], wide[..., 1::2])
    cos, sin = cos[:, None, :], sin[:, None, :]
    turned = (first * cos - second * sin, second * cos + first * sin)
    joined = torch.cat(turned, -1) if style == "halves" else torch.stack(turned, -1).flatten(-2)
    return joined.to(x.dtype)


add = FusedKernel(name="add", check=_check_same, reference=_add, tolerance=_ROUNDING)
swiglu = FusedKernel(name="swiglu", check=_check_same, reference=_swiglu, tolerance=_ROUNDING)
softmax = FusedKernel(name="softmax", check=_check_row, reference=_softmax, tolerance=_ROUNDING, by_row=True)
layernorm = FusedKernel(name="layernorm", check=_check_row, reference=_layernorm, tolerance=_ROUNDING, by_row=True)
rmsnorm = FusedKernel(name="rmsnorm", check=_check_row, reference=_rmsnorm, tolerance=_ROUNDING, by_row=True)
rope = FusedKernel(name="rope", check=_check_rope, reference=_rope, tolerance=_ROUNDING)

KERNELS: Mapping[str, FusedKernel] = MappingProxyType(
    {kernel.name: kernel for kernel in (add, swiglu, softmax, layernorm, rmsnorm, rope)}
)
"""All of them by name."""
