"""Which file type of a model to take for some memory: `recommend`; which models of the catalogue, `recommend_models`.

Pure. For a file that is here the sizes are llama-quantize's own and the memory is `memory.estimate`'s. Of a catalogue
entry that is not here only the number of parameters is known: sizes are estimated from it (within 8 % from 3 B on, too
small for smaller models, whose embeddings weigh more), with room for a context of 4096 tokens.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lltm_ray.config import EngineConfig
from lltm_ray.errors import ConfigError, ModelDoesNotFitError
from lltm_ray.models.catalog import CatalogEntry
from lltm_ray.models.file_types import FILE_TYPES, FileType, file_type_of, quantized
from lltm_ray.models.footprint import CUDA_CONTEXT_BYTES, MARGIN_BYTES, MARGIN_RATIO
from lltm_ray.models.gguf import GgufInfo
from lltm_ray.models.memory import estimate, plan_fit
from lltm_ray.models.quantize.kinds import PLAIN

COMFORTABLE_TOKENS = 4096
"""Context of a slot that a recommendation wants, if none is asked for: a conversation of some turns."""
_ROOM_BYTES = 2**30
_ROOM_BYTES_A_WEIGHT = 0.6
"""KV cache of 4096 tokens and buffers where only a catalogue entry is known: this much a weight, at most a GiB. Llamas
of 0.6, 3, 8 and 70 B take 0.3, 0.8, 0.8 and 1.6 GiB."""
_GIB = 2**30
_FILE_TYPE = re.compile(r"(?:^|[-._])(I?Q\d\w*|BF16|F16|F32|MXFP4)(?=[-._])", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One file type of the model."""

    file_type: str
    file_bytes: int
    bits: float
    """A weight."""
    memory_bytes: int
    """On all GPUs together, with the context asked for."""
    fits: bool
    largest_ctx: int | None
    """Tokens a slot that fit, at most those it was trained for; None: not even the smallest, or not known."""
    needs_imatrix: bool
    from_here: bool
    """Whether the file at hand is this one, or can be quantized to it; else it takes the original weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recommendation:
    """All choices by falling quality, and the one to take."""

    model: str
    memory_bytes: int
    """Of all GPUs together."""
    n_ctx: int
    """Tokens a slot."""
    n_parallel: int
    exact: bool
    """Whether sizes come from the file's own tensors, rather than from a number of parameters."""
    choices: tuple[Choice, ...]
    best: str | None
    reason: str


def recommend(
    info: GgufInfo, gpu_bytes: Sequence[int], *, n_ctx: int | None = None, n_parallel: int = 1
) -> Recommendation:
    """The best quality of a model that fits whole on some GPUs.

    Args:
        info: the model, in whichever type (`read_model`).
        gpu_bytes: memory of each GPU; layers are divided among them by their memory.
        n_ctx: tokens a slot. None: 4096, or what the model was trained for if that is less.
        n_parallel: slots.

    Raises:
        ConfigError: no GPU, no memory, or a context or slots below 1.
    """
    _check(gpu_bytes, n_ctx, n_parallel)
    wanted = n_ctx or min(COMFORTABLE_TOKENS, info.n_ctx_train or COMFORTABLE_TOKENS)
    have, total = file_type_of(info), sum(gpu_bytes)
    config = EngineConfig(n_parallel=n_parallel, tensor_split=tuple(size / _GIB for size in gpu_bytes))
    choices = tuple(_choice(info, kind, have, config, total, wanted) for kind in FILE_TYPES.values())
    best = next((choice for choice in choices if choice.fits), None)
    return Recommendation(
        model=info.name,
        memory_bytes=total,
        n_ctx=wanted,
        n_parallel=n_parallel,
        exact=True,
        choices=choices,
        best=best.file_type if best else None,
        reason=_reason(choices, best, total, f"with {wanted} tokens for each of {n_parallel} slots", have),
    )


def recommend_entry(entry: CatalogEntry, gpu_bytes: Sequence[int]) -> Recommendation:
    """As `recommend`, of a model of which only the catalogue's entry is here.

    Raises:
        ConfigError: no GPU, or no memory.
    """
    _check(gpu_bytes, None, 1)
    total = sum(gpu_bytes)
    choices = tuple(_guess(entry.parameters, kind, total, len(gpu_bytes)) for kind in FILE_TYPES.values())
    best = next((choice for choice in choices if choice.fits), None)
    reason = _reason(choices, best, total, "by its number of parameters", type_in_name(entry.file))
    return Recommendation(
        model=entry.name,
        memory_bytes=total,
        n_ctx=COMFORTABLE_TOKENS,
        n_parallel=1,
        exact=False,
        choices=choices,
        best=best.file_type if best else None,
        reason=reason,
    )


def recommend_models(entries: Iterable[CatalogEntry], gpu_bytes: Sequence[int]) -> list[tuple[CatalogEntry, int]]:
    """Entries whose own file fits, with the estimated memory in bytes; the largest first.

    Raises:
        ConfigError: no GPU, or no memory.
    """
    _check(gpu_bytes, None, 1)
    needed = [(entry, guess_memory(entry, len(gpu_bytes))) for entry in entries]
    fitting = [each for each in needed if each[1] <= sum(gpu_bytes)]
    return sorted(fitting, key=lambda each: -each[0].parameters)


def guess_memory(entry: CatalogEntry, n_gpus: int = 1) -> int:
    """Bytes that an entry's own file takes on GPUs, estimated from its parameters and the type in its name."""
    named = type_in_name(entry.file) or "F16"
    kind = next((each for name, each in FILE_TYPES.items() if name.startswith(named)), FILE_TYPES["F16"])
    return _guess(entry.parameters, kind, 0, n_gpus).memory_bytes


def type_in_name(file: str) -> str:
    """The file type that a file's name speaks of, e.g. `Q4_K_M`; empty if none."""
    found = _FILE_TYPE.findall(file)
    return found[-1].upper() if found else ""


def _check(gpu_bytes: Sequence[int], n_ctx: int | None, n_parallel: int) -> None:
    if not gpu_bytes or min(gpu_bytes) <= 0:
        raise ConfigError("vram", list(gpu_bytes), "must be the memory of one GPU or more, e.g. 16GiB")
    for name, value in (("context", n_ctx), ("slots", n_parallel)):
        if value is not None and value < 1:
            raise ConfigError(name, value, "must be 1 or above")


def _choice(info: GgufInfo, kind: FileType, have: str, config: EngineConfig, total: int, n_ctx: int) -> Choice:
    model, slots = quantized(info, kind.name), config.n_parallel
    layers = info.n_layer + 1
    need = estimate(model, n_ctx=n_ctx * slots, n_parallel=slots, n_gpu_layers=layers, config=config).device_bytes
    return Choice(
        file_type=kind.name,
        file_bytes=model.file_bytes,
        bits=8 * model.tensor_bytes / max(info.n_params, 1),
        memory_bytes=need,
        fits=need <= total,
        largest_ctx=largest_context(model, config, total),
        needs_imatrix=kind.imatrix,
        from_here=have in (kind.name, *PLAIN),
    )


def largest_context(info: GgufInfo, config: EngineConfig, budget_bytes: int) -> int | None:
    """Tokens a slot with all layers on the GPUs and all slots kept; None if that does not fit at all."""
    asked = EngineConfig(n_parallel=config.n_parallel, n_gpu_layers=info.n_layer + 1, tensor_split=config.tensor_split)
    try:
        plan = plan_fit(info, budget_bytes=budget_bytes, config=asked, on_gpu=True)
    except ModelDoesNotFitError:
        return None
    return plan.n_ctx // plan.n_parallel if plan.n_parallel == config.n_parallel else None


def _guess(parameters: int, kind: FileType, total: int, n_gpus: int) -> Choice:
    size = int(parameters * kind.bits / 8)
    room = min(_ROOM_BYTES, int(_ROOM_BYTES_A_WEIGHT * parameters))
    need = int((size + room) * (1 + MARGIN_RATIO)) + MARGIN_BYTES + CUDA_CONTEXT_BYTES * n_gpus
    return Choice(
        file_type=kind.name,
        file_bytes=size,
        bits=kind.bits,
        memory_bytes=need,
        fits=need <= total,
        largest_ctx=None,
        needs_imatrix=kind.imatrix,
        from_here=False,
    )


def _reason(choices: Sequence[Choice], best: Choice | None, total: int, how: str, have: str) -> str:
    size = f"{total / _GIB:.4g} GiB"
    if best is None:
        least = min(choices, key=lambda choice: choice.memory_bytes)
        needs = f"{least.file_type}, the smallest, needs {least.memory_bytes / _GIB:.1f} GiB {how}"
        return f"nothing fits {size}: {needs}; take a smaller model, or keep layers on the CPU"
    said = f"{best.file_type} is the best quality that fits {size} {how}, taking {best.memory_bytes / _GIB:.1f} GiB"
    above = choices[: choices.index(best)]
    if above:
        said += f"; {above[-1].file_type} would need {above[-1].memory_bytes / _GIB:.1f} GiB"
    if have not in (best.file_type, *PLAIN):
        said += f"; the file itself is {have}, so {best.file_type} takes the original weights"
    return said
