"""`lltm-ray models quantize` and `imatrix`: smaller GGUF files, and what matters in a model."""

from __future__ import annotations

import re
import signal
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lltm_ray.cli._output import (
    ERR,
    OUT,
    JsonFlag,
    errors_end_the_command,
    human_bytes,
    print_error,
    print_json,
    progress_bar,
)
from lltm_ray.config import read_environment
from lltm_ray.errors import ConfigError, LltmRayError
from lltm_ray.models.resolve import resolve

if TYPE_CHECKING:
    from lltm_ray.actors.quantize_job import Quantized, QuantizeJob

Results = list[tuple["QuantizeJob", "Quantized | None", LltmRayError | None, str]]
_SUFFIX = re.compile(r"(-00001-of-\d{5})?([-.](f32|f16|bf16))?$", re.IGNORECASE)
_Source = Annotated[
    str, typer.Argument(metavar="IN", help="An F16, BF16 or F32 model: a path, or a name that is here.")
]
_Target = Annotated[Path, typer.Argument(metavar="OUT", help="The GGUF to write; a folder for several --type.")]
_Types = Annotated[list[str], typer.Option("--type", help="Q4_K_M, Q8_0, IQ4_XS, ...; may be given several times.")]
_Imatrix = Annotated[Path | None, typer.Option(help="Importance matrix: a GGUF of llama-imatrix.", show_default="none")]
_Threads = Annotated[int, typer.Option(help="Threads; 0: one a core, on Ray a share of the cluster's.")]
_Requantize = Annotated[
    bool, typer.Option("--allow-requantize", help="Take a source that is quantized: it loses twice.")
]
_Leave = Annotated[bool, typer.Option("--leave-output", help="Keep output.weight as it is.")]
_Pure = Annotated[bool, typer.Option("--pure", help="One type for all tensors, no mixture.")]
_Tool = Annotated[str, typer.Option(help="auto, llama-quantize, or embedded: ggml of the PyPI engine.")]
_OnRay = Annotated[bool, typer.Option("--on-ray", help="A Ray task for each --type.")]
_Address = Annotated[
    str | None, typer.Option(help="Ray cluster; implies --on-ray.", show_default="RAY_ADDRESS, or a new one")
]
_Model = Annotated[str, typer.Argument(help="The model: a path, or a name that is here.")]
_Text = Annotated[Path, typer.Argument(help="Text for it to read: 100 KB or more of what it will be used for.")]
_Matrix = Annotated[Path, typer.Argument(metavar="OUT", help="The matrix to write, a GGUF.")]
_Chunks = Annotated[int, typer.Option(help="Read so many chunks; 0: all of the text.")]
_Ctx = Annotated[int, typer.Option("--ctx-size", help="Tokens a chunk.")]
_Layers = Annotated[int | None, typer.Option("--gpu-layers", help="Layers on GPUs.", show_default="as llama.cpp fits")]
_Output = Annotated[bool, typer.Option("--process-output", help="Also for output.weight.")]


@errors_end_the_command()
def quantize(
    source: _Source,
    out: _Target,
    *,
    types: _Types,
    imatrix: _Imatrix = None,
    threads: _Threads = 0,
    allow_requantize: _Requantize = False,
    leave_output: _Leave = False,
    pure: _Pure = False,
    tool: _Tool = "auto",
    on_ray: _OnRay = False,
    address: _Address = None,
    as_json: JsonFlag = False,
) -> None:
    """Quantize a model as llama-quantize does, with or without llama-quantize, and print what was written."""
    from lltm_ray.actors.quantize_job import QuantizeJob
    from lltm_ray.models.quantize.plan import Options

    path = str(resolve(source, cache_dir=read_environment().cache_dir, offline=True).path)
    jobs = []
    for kind in types:
        options = Options(
            kind=kind,
            imatrix=str(imatrix) if imatrix else None,
            threads=threads,
            allow_requantize=allow_requantize,
            leave_output=leave_output,
            pure=pure,
        )
        target = _target(out, path, options.kind, several=len(types) > 1)
        jobs.append(QuantizeJob(source=path, out=str(target), options=options, tool=tool))
    _undo_when_terminated()
    _tell(_on_ray(jobs, address) if on_ray or address else _here(jobs), as_json=as_json)


@errors_end_the_command()
def imatrix(
    model: _Model,
    text: _Text,
    out: _Matrix,
    *,
    chunks: _Chunks = 0,
    n_ctx: _Ctx = 512,
    threads: _Threads = 0,
    gpu_layers: _Layers = None,
    process_output: _Output = False,
    as_json: JsonFlag = False,
) -> None:
    """Compute an importance matrix with llama-imatrix: what a model's weights are multiplied with, on your text."""
    from lltm_ray.actors.quantize_job import ImatrixJob, make_imatrix

    job = ImatrixJob(
        model=str(resolve(model, cache_dir=read_environment().cache_dir, offline=True).path),
        text=str(text),
        out=str(out),
        chunks=chunks,
        n_ctx=n_ctx,
        threads=threads,
        n_gpu_layers=gpu_layers,
        process_output=process_output,
    )
    _undo_when_terminated()
    with progress_bar(unit="chunks") as progress:
        found = make_imatrix(job, progress=lambda _, done, total: progress(out.name, done, total))
    if as_json:
        print_json({"path": str(out), "tensors": len(found.weights), "chunks": found.n_chunks})
        return
    ERR.print(f"{len(found.weights)} tensors, {found.n_chunks} chunks of {n_ctx} tokens.", style="dim", markup=False)
    OUT.print(str(out), markup=False, soft_wrap=True)


def register(app: typer.Typer) -> None:
    """Add both commands to `lltm-ray models`."""
    app.command("quantize")(quantize)
    app.command("imatrix")(imatrix)


def _target(out: Path, source: str, kind: str, *, several: bool) -> Path:
    """OUT itself, or a file in it: `model-F16.gguf` as Q4_K_M is `model-Q4_K_M.gguf`."""
    if not several and not out.is_dir():
        return out
    try:
        out.mkdir(exist_ok=True)
    except OSError as error:
        raise ConfigError("out", str(out), f"must be a folder for several types: {error.strerror}") from error
    return out / f"{_SUFFIX.sub('', Path(source).stem, count=1)}-{kind}.gguf"


def _undo_when_terminated() -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def _here(jobs: Sequence[QuantizeJob]) -> Results:
    from lltm_ray.actors.quantize_job import run_job

    results: Results = []
    with progress_bar() as progress:
        for job in jobs:
            name = Path(job.out).name
            try:
                done = run_job(job, progress=lambda _, now, total, name=name: progress(name, now, total))  # type: ignore[misc]
                results.append((job, done, None, ""))
            except LltmRayError as error:
                results.append((job, None, error, ""))
    return results


def _on_ray(jobs: Sequence[QuantizeJob], address: str | None) -> Results:
    from lltm_ray.actors.quantize import quantize_many
    from lltm_ray.driver import join_ray

    join_ray(address)
    with progress_bar() as progress:
        outcomes = quantize_many(jobs, progress=lambda job, _, done, total: progress(Path(job.out).name, done, total))
    return [(each.job, each.done, each.error, each.node) for each in outcomes]


def _tell(results: Results, *, as_json: bool) -> None:
    """Every file on stdout, every failure on stderr; the exit code is the first failure's."""
    failures = [error for _, _, error, _ in results if error is not None]
    if as_json:
        print_json([_row(*each) for each in results])
    for job, done, error, node in results:
        if error is not None:
            ERR.print(f"{job.options.kind}:", style="bold", end=" ", markup=False)
            print_error(error)
        elif done is not None and not as_json:
            ERR.print(_words(done, node), style="dim", markup=False)
            OUT.print(done.path, markup=False, soft_wrap=True)
    if failures:
        raise typer.Exit(2 if isinstance(failures[0], ConfigError) else 1)


def _words(done: Quantized, node: str) -> str:
    sizes = f"{human_bytes(done.source_bytes)} to {human_bytes(done.file_bytes)}"
    where = f" on {node}" if node else ""
    return f"{done.kind}: {sizes}, {done.bits:.2f} bits a weight, {done.seconds:.1f} s by {done.tool}{where}."


def _row(job: QuantizeJob, done: Quantized | None, error: LltmRayError | None, node: str) -> dict[str, Any]:
    facts = asdict(done) if done else {"path": job.out, "kind": job.options.kind}
    return {**facts, "node": node or None, "error": error.as_dict()["error"] if error else None}
