"""What a quantized file will hold, before a byte of it is written: every tensor's type and size."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from lltm_ray.errors import ConfigError, ModelFormatError
from lltm_ray.models.gguf import GgufInfo, read_gguf, read_model, shard_paths
from lltm_ray.models.gguf_header import TensorInfo
from lltm_ray.models.quantize import mixtures
from lltm_ray.models.quantize.imatrix import Floats, Imatrix, read_imatrix
from lltm_ray.models.quantize.kinds import KINDS, PLAIN, find_kind, is_quantized, row_bytes

_70B = {"llama": 80, "llama-embed": 80, "qwen2": 80, "deci": 80, "olmo": 80, "jais2": 68}
"""Architecture -> layers of what llama.cpp calls 70B (src/models/*.cpp, `load_arch_hparams`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How to quantize; as llama-quantize's own options."""

    kind: str
    """`Q4_K_M`, ...: see `kinds.KINDS`."""
    imatrix: str | None = None
    """Path of an importance matrix."""
    threads: int = 0
    """0: one a core that this process may use."""
    allow_requantize: bool = False
    leave_output: bool = False
    """Keep output.weight as it is."""
    pure: bool = False
    """One type for all, no mixture."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "kind", find_kind(self.kind))
        if not 0 <= self.threads <= 1024:
            raise ConfigError("threads", self.threads, "must be from 0 to 1024")

    @property
    def n_threads(self) -> int:
        """How many to start."""
        return self.threads or len(os.sched_getaffinity(0))


@dataclass(frozen=True, slots=True)
class Planned:
    """One tensor of the file to come."""

    source: TensorInfo
    path: str
    """File that holds it."""
    shape: tuple[int, ...]
    """The fastest dimension first, no trailing ones."""
    type: str
    weights: Floats | None = field(repr=False)
    """Its importance: float32, a value a column and expert."""

    @property
    def nbytes(self) -> int:
        """Of the data, without padding."""
        return row_bytes(self.type, self.source.n_elements)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A whole file; `tensors` in the order in which they are written."""

    source: str
    options: Options
    tensors: tuple[Planned, ...]
    imatrix: Imatrix | None

    @property
    def nbytes(self) -> int:
        """Of the file to come, with an upper bound for what lies before the tensors."""
        first = min((each.source.offset_bytes for each in self.tensors if each.path == self.source), default=0)
        return first + 4096 + 64 * len(self.tensors) + sum(each.nbytes + 32 for each in self.tensors)


def make_plan(source: str | os.PathLike[str], options: Options) -> Plan:
    """Choose each tensor's type, as `llama_model_quantize_impl` of llama.cpp's src/llama-quant.cpp does.

    Args:
        source: the model; of a split one the first shard. The result is one file.
        options: the kind, and what else llama-quantize can be told.

    Raises:
        ModelNotFoundError, ModelFormatError: source or matrix are not there, or damaged.
        ConfigError: the source is quantized already, or the kind needs an importance matrix and has none.
    """
    path = os.fspath(source)
    info = read_model(path)
    imatrix = read_imatrix(options.imatrix) if options.imatrix else None
    files = shard_paths(Path(path)) if info.split_count > 1 else (path,)
    held = {tensor.name: (os.fspath(each), tensor) for each in files for tensor in read_gguf(each).tensors}
    if len(held) != len(info.tensors) or not held:
        raise ModelFormatError(path, 0, "has no tensors, or one name twice in its shards")
    kinds = choose_types(info, options, has_imatrix=imatrix is not None)
    planned = [Planned(held[name][1], held[name][0], _shape(held[name][1]), kinds[name], None) for name in kinds]
    for each in planned:
        _check(each, path, options, has_imatrix=imatrix is not None)
    weights = imatrix.weights if imatrix else {}
    tensors = tuple(replace(each, weights=_weights(each, weights, options)) for each in planned)
    return Plan(source=path, options=options, tensors=tensors, imatrix=imatrix)


def order(names: list[str]) -> list[str]:
    """By layer, then by name; what is of no layer first: `weight_name_comparer` of src/llama-model-loader.h."""
    return sorted(names, key=lambda name: (mixtures.layer_of(name), name.encode()))


def _shape(tensor: TensorInfo) -> tuple[int, ...]:
    shape = tensor.shape or (1,)
    while len(shape) > 1 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def choose_types(info: GgufInfo, options: Options, *, has_imatrix: bool) -> dict[str, str]:
    """Tensor name -> type, in the file's order: `llama_tensor_get_type`."""
    tensors = {tensor.name: tensor for tensor in info.tensors}
    default = KINDS[options.kind][1]
    mixture = _mixture(info, options.kind, list(tensors), has_imatrix=has_imatrix)
    kinds = {}
    for name in order(list(tensors)):
        tensor, shape = tensors[name], _shape(tensors[name])
        kind = tensor.type
        if mixtures.allows(name, shape, info.architecture, leave_output=options.leave_output):
            kind = default
            if is_quantized(default):
                wanted = default if options.pure else mixture.choose(name, shape[0])
                kind = mixtures.fit(wanted, shape[0])
        kinds[name] = kind
    return kinds


def _mixture(info: GgufInfo, kind: str, names: list[str], *, has_imatrix: bool) -> mixtures.Mixture:
    parts = [mixtures.category(name) for name in names]
    heads, kv_heads = _first(info.n_head), _first(info.n_head_kv)
    n_layer = info.n_layer - info.number("nextn_predict_layers")
    is_70b = _70B.get(info.architecture) == n_layer
    if info.architecture.startswith("llama"):
        is_70b = is_70b and heads != kv_heads and info.n_expert != 8
    return mixtures.Mixture(
        kind=kind,
        arch=info.architecture,
        n_layer=info.n_layer,
        n_gqa=heads // kv_heads if kv_heads else 0,
        n_expert=info.n_expert,
        is_70b=is_70b,
        has_imatrix=has_imatrix,
        is_tied="output" not in parts,
        n_values=sum(part in mixtures.VALUES for part in parts),
    )


def _first(count: int | tuple[int, ...]) -> int:
    return count if isinstance(count, int) else count[0]


def _check(each: Planned, path: str, options: Options, *, has_imatrix: bool) -> None:
    name, have = each.source.name, each.source.type
    if not has_imatrix and mixtures.needs_imatrix(name, each.type, options.kind) and each.type != have:
        why = f"{name} would be garbage in {each.type} without an importance matrix; give one (lltm-ray models imatrix)"
        raise ConfigError("type", options.kind, why)
    if each.type == have:
        return
    if is_quantized(have) and not options.allow_requantize:
        why = (
            f"its {name} is {have}, quantized already, and what was lost stays lost: take an F16, BF16 or F32 file, or "
            "allow it (--allow-requantize)"
        )
        raise ConfigError("source", path, why)
    if not is_quantized(have) and have not in PLAIN:
        raise ConfigError("source", path, f"its {name} is {have}, which cannot be quantized")


def _weights(each: Planned, known: Mapping[str, Floats], options: Options) -> Floats | None:
    """The tensor's importance; a matrix of another model is refused."""
    name, found = each.source.name, known.get(each.source.name)
    if each.type == each.source.type:
        return None
    size = each.shape[0] * (each.shape[2] if len(each.shape) > 2 else 1)
    if found is not None and found.size == size:
        return found
    if found is not None and mixtures.category(name) != "embedding":
        why = f"has {found.size} values for {name}, which has {size}: it was computed with another model"
        raise ConfigError("imatrix", options.imatrix, why)
    if mixtures.needs_imatrix(name, each.type, options.kind):
        raise ConfigError(
            "imatrix", options.imatrix, f"has nothing for {name}, which would be garbage in {each.type} without"
        )
    return None
