"""A LoRA adapter as llama.cpp loads it: what a GGUF file says of itself, and whether it is one for a given model.

Layout (llama.cpp's src/llama-adapter.cpp): `general.type` is adapter, `adapter.type` lora, and each matrix NAME of the
model that it changes has NAME.lora_a and NAME.lora_b. The model then computes W x + s b (a x) with
s = scale * alpha / rank, or s = scale where alpha is 0. The embedding's two are stored the other way round.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from lltm_ray.errors import ConfigError, ModelFormatError
from lltm_ray.models.gguf import GgufInfo, read_gguf
from lltm_ray.models.gguf_header import TensorInfo

EMBEDDING, OUTPUT = "token_embd.weight", "output.weight"
TIED = "this model's output is its embedding, and llama.cpp cannot change one without the other; train without it"
_INVOCATION = "adapter.alora.invocation_tokens"


@dataclass(frozen=True, slots=True)
class Pair:
    """The two factors for one matrix of the model."""

    a: TensorInfo
    b: TensorInfo

    @property
    def rank(self) -> int:
        """The size that both have in common."""
        return self.b.shape[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraFile:
    """An adapter's own description."""

    path: str
    file_bytes: int
    name: str
    architecture: str
    alpha: float
    """0: its factors are taken as they are."""
    is_activated: bool
    """Works only behind certain tokens (aLoRA)."""
    pairs: Mapping[str, Pair] = field(repr=False)
    """By the name of the model's matrix."""

    def factor(self, name: str) -> float:
        """What b a is multiplied by at scale 1."""
        return self.alpha / self.pairs[name].rank if self.alpha else 1.0


def read_lora(path: str | os.PathLike[str]) -> LoraFile:
    """Read an adapter's header.

    Raises:
        ModelNotFoundError: no such file.
        ModelFormatError: no GGUF, or damaged.
        ConfigError: a GGUF that is no LoRA adapter.
    """
    info = read_gguf(path)
    kind = info.metadata.get("general.type"), info.metadata.get("adapter.type")
    if kind != ("adapter", "lora"):
        why = "is no LoRA adapter; make one of a PEFT folder with `lltm-ray models lora convert`"
        raise ConfigError("adapter", info.path, why)
    alpha = info.metadata.get("adapter.lora.alpha", 0.0)
    if not isinstance(alpha, float) or not math.isfinite(alpha):
        raise ModelFormatError(info.path, 0, f"adapter.lora.alpha is {alpha!r}, not a number")
    return LoraFile(
        path=info.path,
        file_bytes=info.file_bytes,
        name=info.name,
        architecture=info.architecture,
        alpha=alpha,
        is_activated=_INVOCATION in info.metadata,
        pairs=_pairs(info),
    )


def check_fits(lora: LoraFile, model: GgufInfo) -> None:
    """Whether llama.cpp would load the adapter with this model.

    Args:
        lora: the adapter.
        model: all its shards, as `read_model` gives it.

    Raises:
        ConfigError: it is another model's, by its architecture, a tensor's name or a shape.
    """
    if lora.architecture != model.architecture:
        why = f"is for {lora.architecture}, the model is {model.architecture}; give the adapter's own base"
        raise ConfigError("adapter", lora.path, why)
    shapes = {each.name: each.shape for each in model.tensors}
    for name, pair in lora.pairs.items():
        shape = shapes.get(name)
        if shape is None:
            why = TIED if name == OUTPUT else f"changes {name}, which the model does not have"
            raise ConfigError("adapter", lora.path, why)
        if name == EMBEDDING and OUTPUT not in shapes and not model.is_encoder:
            raise ConfigError("adapter", lora.path, TIED)
        if shape != shape_of(name, pair):
            why = f"changes {name} of {shape_of(name, pair)}, the model's is {shape}; is it another base's?"
            raise ConfigError("adapter", lora.path, why)


def shape_of(name: str, pair: Pair) -> tuple[int, ...]:
    """Shape of the matrix that a pair is made for, the fastest dimension first."""
    return (pair.b.shape[1], pair.a.shape[1]) if name == EMBEDDING else (pair.a.shape[0], pair.b.shape[1])


def _pairs(info: GgufInfo) -> dict[str, Pair]:
    halves: dict[str, dict[str, TensorInfo]] = {}
    for each in info.tensors:
        name, _, half = each.name.rpartition(".lora_")
        if half not in ("a", "b") or len(each.shape) != 2:
            raise ModelFormatError(info.path, each.offset_bytes, f"{each.name[:80]!r} is no factor of a matrix")
        halves.setdefault(name, {})[half] = each
    pairs = {}
    for name, found in halves.items():
        if found.keys() != {"a", "b"}:
            raise ModelFormatError(info.path, 0, f"{name[:80]!r} has one factor of two")
        pairs[name] = Pair(found["a"], found["b"])
        rank_of_a = found["a"].shape[0 if name == EMBEDDING else 1]
        if rank_of_a != pairs[name].rank:
            raise ModelFormatError(info.path, 0, f"{name[:80]!r}: ranks {rank_of_a} and {pairs[name].rank}")
    if not pairs:
        raise ModelFormatError(info.path, 0, "changes nothing: it has no tensors")
    return pairs
