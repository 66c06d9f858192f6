"""`quantize`: one GGUF file in, a smaller one out."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Protocol

from lltm_ray.errors import ModelFormatError
from lltm_ray.models.gguf import GgufInfo, read_gguf
from lltm_ray.models.quantize.kinds import KINDS
from lltm_ray.models.quantize.plan import Options, Plan, make_plan
from lltm_ray.models.quantize.rewrite import Progress
from lltm_ray.models.whole_file import check_space, refuse_same, whole_file


class Write(Protocol):
    """Writes a planned file: `rewrite.write_quantized` with an encoder, or llama-quantize."""

    def __call__(self, plan: Plan, path: Path, *, progress: Progress | None, cancel: Event | None) -> None:
        """Write it to `path`, which is there already, empty."""


def quantize(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    options: Options,
    *,
    write: Write,
    progress: Progress | None = None,
    cancel: Event | None = None,
) -> GgufInfo:
    """Quantize a model; the file appears when it is whole and has been read.

    Args:
        source: an F16, BF16 or F32 model; of a split one the first shard.
        out: the file to write; one that is there is replaced at the end.
        options: the kind, threads, importance matrix, ...
        write: what does it.
        progress: called with a tensor's name, bytes done and bytes in all.
        cancel: set by another thread, it ends the work; nothing is left.

    Returns:
        What the new file says of itself.

    Raises:
        ModelNotFoundError, ModelFormatError: the source, or what was written, is not a whole model.
        ConfigError: source, out or options cannot be used.
        DiskFullError: the file would not fit.
        CancelledError: `cancel` was set.
        ToolError: llama-quantize failed.
    """
    target = Path(out)
    plan = make_plan(source, options)
    refuse_same(target, source, *filter(None, [options.imatrix]))
    check_space({target: plan.nbytes})
    with whole_file(target) as path:
        write(plan, path, progress=progress, cancel=cancel)
        info = _checked(path, plan)
    return replace(info, path=str(target))


def _checked(path: Path, plan: Plan) -> GgufInfo:
    """What was written, if it is what was asked for."""
    info = read_gguf(path)
    wanted = {each.source.name for each in plan.tensors}
    kind = info.metadata.get("general.file_type")
    if {tensor.name for tensor in info.tensors} != wanted or kind != KINDS[plan.options.kind][0]:
        raise ModelFormatError(str(path), 0, f"is not all of {plan.source} as {plan.options.kind}")
    return info
