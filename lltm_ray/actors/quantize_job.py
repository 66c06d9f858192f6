"""One quantization, or one importance matrix, on this machine: by llama.cpp's programs or by the PyPI engine's ggml.

Without Ray, so that a command for one file need not import it; `quantize` runs several over a cluster.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event

from lltm_ray.config import read_environment
from lltm_ray.errors import ConfigError, ModelNotFoundError
from lltm_ray.llamacpp.ggml import load_ggml
from lltm_ray.llamacpp.tools import IMATRIX, QUANTIZE, find_tool, need_tool, quantize_args, run_imatrix, run_quantize
from lltm_ray.models.gguf import read_model
from lltm_ray.models.quantize.imatrix import Imatrix, read_imatrix
from lltm_ray.models.quantize.plan import Options, Plan
from lltm_ray.models.quantize.quantize import Write, quantize
from lltm_ray.models.quantize.rewrite import Progress, write_quantized
from lltm_ray.models.whole_file import refuse_same, whole_file

EMBEDDED = "embedded"
TOOLS = ("auto", QUANTIZE, EMBEDDED)


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeJob:
    """One file to make."""

    source: str
    out: str
    options: Options
    tool: str = "auto"
    """`llama-quantize`, `embedded` (the PyPI engine's ggml), or `auto`: the first where it is installed."""

    def __post_init__(self) -> None:
        if self.tool not in TOOLS:
            raise ConfigError("tool", self.tool, f"must be one of {', '.join(TOOLS)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantized:
    """One file that was made."""

    path: str
    kind: str
    tool: str
    """What made it: llama-quantize's path, or ggml's version."""
    source_bytes: int
    file_bytes: int
    bits: float
    """Bits a weight, all tensors together."""
    quantization: Mapping[str, int] = field(hash=False)
    """Tensor type -> bytes, most first."""
    seconds: float


def run_job(job: QuantizeJob, *, progress: Progress | None = None, cancel: Event | None = None) -> Quantized:
    """Quantize one file here.

    Raises:
        LltmRayError: see `lltm_ray.models.quantize.quantize.quantize`.
    """
    started = time.monotonic()
    write, tool = _choose(job.tool)
    info = quantize(job.source, job.out, job.options, write=write, progress=progress, cancel=cancel)
    return Quantized(
        path=info.path,
        kind=job.options.kind,
        tool=tool,
        source_bytes=read_model(job.source).file_bytes,
        file_bytes=info.file_bytes,
        bits=8 * info.tensor_bytes / max(info.n_params, 1),
        quantization=dict(info.quantization),
        seconds=time.monotonic() - started,
    )


def _choose(tool: str) -> tuple[Write, str]:
    environment = read_environment()
    program = need_tool(QUANTIZE, environment) if tool == QUANTIZE else None
    if tool == "auto":
        program = find_tool(QUANTIZE, environment)
    return (_by_program(program), str(program)) if program else (_by_ggml, f"ggml {load_ggml().version}")


def _by_ggml(plan: Plan, path: Path, *, progress: Progress | None, cancel: Event | None) -> None:
    write_quantized(plan, path, load_ggml(), progress=progress, cancel=cancel)


def _by_program(program: Path) -> Write:
    def write(plan: Plan, path: Path, *, progress: Progress | None, cancel: Event | None) -> None:
        sizes = [each.source.nbytes for each in plan.tensors]

        def moved(name: str, done: int, _: int) -> None:  # it counts tensors, in the plan's order; we count bytes
            if progress is not None:
                progress(name, sum(sizes[:done]), sum(sizes))

        options = plan.options
        flags = [
            *(["--imatrix", options.imatrix] if options.imatrix else []),
            *(["--allow-requantize"] if options.allow_requantize else []),
            *(["--leave-output-tensor"] if options.leave_output else []),
            *(["--pure"] if options.pure else []),
        ]
        argv = quantize_args(program, plan.source, path, options.kind, threads=options.n_threads, options=flags)
        run_quantize(argv, progress=moved, cancel=cancel)

    return write


@dataclass(frozen=True, slots=True, kw_only=True)
class ImatrixJob:
    """One importance matrix to compute."""

    model: str
    text: str
    """File of the text that the model reads; some 100 KB of what it will be used for."""
    out: str
    chunks: int = 0
    """0: all of the text."""
    n_ctx: int = 512
    """Tokens a chunk."""
    threads: int = 0
    """0: one a core that this process may use."""
    n_gpu_layers: int | None = None
    """None: as llama.cpp chooses."""
    process_output: bool = False
    """Also for output.weight."""

    def __post_init__(self) -> None:
        for name, least in (("chunks", 0), ("n_ctx", 16), ("threads", 0)):
            if getattr(self, name) < least:
                raise ConfigError(name, getattr(self, name), f"must be {least} or above")


def make_imatrix(
    job: ImatrixJob, *, progress: Callable[[str, int, int], None] | None = None, cancel: Event | None = None
) -> Imatrix:
    """Compute an importance matrix with llama-imatrix; the file appears when it is whole and has been read.

    Raises:
        MissingExtraError: llama-imatrix is not installed.
        ModelNotFoundError: no such text.
        ConfigError: the file to write is the model or the text, or cannot be written.
        ToolError: it failed; has its own words.
        CancelledError: `cancel` was set.
    """
    program = need_tool(IMATRIX, read_environment())
    if not Path(job.text).is_file():
        raise ModelNotFoundError(job.text, "no such file; give a text for the model to read")
    read_model(job.model)
    refuse_same(job.out, job.model, job.text)
    with whole_file(Path(job.out)) as path:
        threads = job.threads or len(os.sched_getaffinity(0))
        argv = [
            str(program),
            "-m",
            job.model,
            "-f",
            job.text,
            "-o",
            str(path),
            "-c",
            str(job.n_ctx),
            "-t",
            str(threads),
        ]
        argv += ["--chunks", str(job.chunks)] if job.chunks else []
        argv += ["-ngl", str(job.n_gpu_layers)] if job.n_gpu_layers is not None else []
        argv += ["--process-output"] if job.process_output else []
        run_imatrix(argv, progress=progress, cancel=cancel)
        return read_imatrix(path)
