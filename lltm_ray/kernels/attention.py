"""Attention by the fastest of PyTorch's kernels that can take the input, with the name of the one that ran: `attend`.

`scaled_dot_product_attention` has three traps that this closes. Its `is_causal` aligns at the upper left, wrong for new
tokens behind a cache; here the last query always sees the last key. Grouped heads make it fall back to the slow `math`
where only `efficient` could run; here heads are repeated for it. And it does not tell which kernel ran.
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass
from typing import Any

from lltm_ray._optional import load
from lltm_ray.errors import ConfigError

BACKENDS = ("flash", "efficient", "math")
"""Best first. On a CPU `flash` is PyTorch's own fused kernel."""
_CHOSEN = {0: "math", 1: "flash", 2: "efficient", 3: "cudnn"}
"""`torch.nn.attention.SDPBackend` by number."""
_SWITCH = threading.Lock()
"""PyTorch's switches between its kernels are the process's."""


@dataclass(frozen=True, slots=True)
class Attended:
    """What `attend` gives."""

    output: Any
    """[batch, heads, queries, head size] of the query's type."""
    backend: str
    """One of `BACKENDS`; or cudnn, where PyTorch prefers it to flash."""


def attend(
    query: Any, key: Any, value: Any, *, causal: bool = False, scale: float | None = None, backend: str = "auto"
) -> Attended:
    """Attention of queries over keys; query heads share key heads in order (GQA).

    Args:
        query: [batch, heads, queries, head size], float16, bfloat16, float32 or float64.
        key: [batch, KV heads, keys, head size]; heads must be a multiple of KV heads.
        value: the same.
        causal: query i of m sees keys 0 .. n - m + i of n: the last sees all, as it must behind a cache.
        scale: of the scores; None: 1 / sqrt(head size).
        backend: "auto", or one of `BACKENDS`. A named one is switched on for the whole process while it is launched,
            so other threads' attention may be refused meanwhile; "auto" touches no switch.

    Raises:
        ConfigError: shapes, types or devices do not fit, or the named backend cannot take them.
        MissingExtraError: PyTorch is not installed.
    """
    _check(query, key, value, causal=causal)
    if backend not in ("auto", *BACKENDS):
        raise ConfigError("backend", backend, f"must be auto or one of {', '.join(BACKENDS)}")
    if not query.numel() or not key.numel():
        return Attended(query.new_zeros(query.shape), "math")
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    usable = usable_backends(query, key, value, causal=causal)
    if backend == "auto":
        return _run(query, key, value, causal, scale, usable[0])
    if backend not in usable:
        what = f"{query.dtype} [{', '.join(map(str, query.shape))}] on {query.device.type}"
        raise ConfigError("backend", backend, f"cannot take {what}; take auto, or {', '.join(usable)}")
    with _SWITCH, _only(backend):
        return _run(query, key, value, causal, scale, backend)


def usable_backends(query: Any, key: Any, value: Any, *, causal: bool = False) -> tuple[str, ...]:
    """Which of `BACKENDS` can take the input as this machine is, best first; never empty. Runs nothing.

    Arguments as `attend`.
    """
    if not query.is_cuda:
        return ("flash", "math") if query.device.type == "cpu" and _cpu_fuses(query, key, value) else ("math",)
    cuda = load("torch.backends.cuda", extra="torch")
    grouped = _is_grouped(query, key)
    plain = causal and query.shape[2] == key.shape[2] > 1
    own = cuda.SDPAParams(query, key, value, None, 0.0, plain, grouped)
    # Efficient takes no groups; whether it takes the repeated heads is seen from views that stand for them.
    heads = query.shape[1]
    views = (each[:, :1].expand(-1, heads, -1, -1) for each in (key, value))
    wide = cuda.SDPAParams(query, *views, None, 0.0, plain, False) if grouped else own
    found = {
        "flash": cuda.can_use_flash_attention(own),
        "efficient": cuda.can_use_efficient_attention(wide),
        "math": True,
    }
    return tuple(name for name in BACKENDS if found[name])


def _run(query: Any, key: Any, value: Any, causal: bool, scale: float, backend: str) -> Attended:
    torch = load("torch", extra="torch")
    grouped = _is_grouped(query, key)
    if grouped and backend == "efficient":
        (key, value), grouped = _repeated(query, key, value), False
    attention = torch.nn.functional.scaled_dot_product_attention
    options = {"scale": scale, "enable_gqa": grouped}
    if _is_aligned(query, key, causal=causal):
        options["is_causal"] = causal and query.shape[2] > 1
    elif query.is_cuda and backend in ("flash", "efficient"):
        bias = load("torch.nn.attention.bias:causal_lower_right", extra="torch")(query.shape[2], key.shape[2])
        return Attended(attention(query, key, value, attn_mask=bias, **options), backend)
    else:
        seen = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
        options["attn_mask"] = seen.tril(key.shape[2] - query.shape[2])
    output = attention(query, key, value, **options)
    return Attended(output, _CHOSEN[torch._fused_sdp_choice(query, key, value, **options)])


def _only(backend: str) -> Any:
    attention = load("torch.nn.attention", extra="torch")
    names = {"flash": "FLASH_ATTENTION", "efficient": "EFFICIENT_ATTENTION", "math": "MATH"}
    return attention.sdpa_kernel(getattr(attention.SDPBackend, names[backend]))


def _is_aligned(query: Any, key: Any, *, causal: bool) -> bool:
    """Whether upper left and lower right are the same, or nothing is hidden."""
    return not causal or query.shape[2] in (1, key.shape[2])


def _is_grouped(query: Any, key: Any) -> bool:
    return bool(query.shape[1] != key.shape[1])


def _repeated(query: Any, key: Any, value: Any) -> tuple[Any, Any]:
    times = query.shape[1] // key.shape[1]
    return key.repeat_interleave(times, 1), value.repeat_interleave(times, 1)


def _cpu_fuses(query: Any, key: Any, value: Any) -> bool:
    torch = load("torch", extra="torch")
    options = {"enable_gqa": _is_grouped(query, key)}
    return bool(_CHOSEN[torch._fused_sdp_choice(query, key, value, **options)] == "flash")


def _check(query: Any, key: Any, value: Any, *, causal: bool) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.ndim != 4:
            raise ConfigError(name, tuple(tensor.shape), "must be [batch, heads, tokens, head size]")
        if tensor.dtype != query.dtype or not tensor.dtype.is_floating_point:
            raise ConfigError(name, tensor.dtype, "must be a float type, the same for query, key and value")
        if tensor.device != query.device:
            raise ConfigError(name, str(tensor.device), f"must lie on {query.device}, as the query")
    if key.shape != value.shape or key.shape[0] != query.shape[0] or key.shape[3] != query.shape[3]:
        raise ConfigError("key", tuple(key.shape), "must fit query in batch and head size, and be shaped as value")
    if not key.shape[1] or query.shape[1] % key.shape[1]:
        raise ConfigError("query", tuple(query.shape), f"its heads must be a multiple of the {key.shape[1]} KV heads")
    if causal and query.shape[2] > key.shape[2]:
        raise ConfigError("query", tuple(query.shape), f"has more tokens than the {key.shape[2]} keys it is the end of")
