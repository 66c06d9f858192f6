"""`lltm-ray models show`: what a model's file says of itself, what memory it takes, and which GPUs hold it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict
from itertools import groupby
from typing import Annotated, Any

import typer

from lltm_ray.cli._output import ERR, JsonFlag, errors_end_the_command, human_bytes, print_json, print_table
from lltm_ray.config import EngineConfig, read_environment
from lltm_ray.errors import ModelDownloadError
from lltm_ray.gpu.nvml import read_inventory
from lltm_ray.models.catalog import CatalogEntry, load_catalog
from lltm_ray.models.gguf import GgufInfo, read_model
from lltm_ray.models.gpus import Fit, common_gpus, fit_gpus
from lltm_ray.models.memory import estimate
from lltm_ray.models.resolve import Origin, ResolvedModel, resolve

_CONTEXTS = (2048, 8192, 32_768, 131_072)
_Model = Annotated[str, typer.Argument(help="tiny, random, a catalogue name, a path, or repo:file[@revision].")]
_Tensors = Annotated[bool, typer.Option("--tensors", help="List every tensor too.")]


@errors_end_the_command()
def show(model: _Model, *, tensors: _Tensors = False, as_json: JsonFlag = False) -> None:
    """Show what a model's file says of itself, what memory it takes and which GPUs hold it; downloads nothing."""
    try:
        resolved = resolve(model, cache_dir=read_environment().cache_dir, offline=True)
    except ModelDownloadError:
        entry = load_catalog().get(model)
        if entry is None:
            raise
        _show_entry(entry, as_json=as_json)
        return
    info = read_model(resolved.path)
    facts = describe(resolved, info)
    if tensors:
        facts["tensors"] = [
            {"name": each.name, "shape": list(each.shape), "type": each.type, "bytes": each.nbytes}
            for each in info.tensors
        ]
    if as_json:
        print_json(facts)
        return
    _print(resolved.name, facts)


def describe(resolved: ResolvedModel, info: GgufInfo) -> dict[str, Any]:
    """The facts that `show` prints; sizes in bytes, contexts in tokens."""
    here = [(f"here: {gpu.name} ({gpu.index})", gpu.total_bytes) for gpu in read_inventory().gpus]
    return {
        "path": str(resolved.path),
        "origin": str(resolved.origin),
        "licence": _licence(resolved),
        "architecture": info.architecture,
        "parameters": info.n_params,
        "file_bytes": info.file_bytes,
        "quantization_bytes": dict(info.quantization),
        "context": info.n_ctx_train,
        "layers": info.n_layer,
        "vocabulary": info.n_vocab,
        "pooling": info.pooling,
        "chat_template": info.chat_template is not None,
        "memory": [_memory_row(info, n_ctx) for n_ctx in _contexts(info)],
        "gpus": [asdict(fit) for fit in fit_gpus(info, [*here, *common_gpus()])],
    }


def _print(name: str, facts: dict[str, Any]) -> None:
    memory, gpus, tensors = facts.pop("memory"), facts.pop("gpus"), facts.pop("tensors", [])
    print_table(("", name), [(field, _words(field, value)) for field, value in facts.items()])
    columns = ("context", "KV cache", "all on GPUs", "all on the CPU")
    rows = [(row["n_ctx"], *(human_bytes(row[field]) for field in list(row)[1:])) for row in memory]
    print_table(columns, rows, title="\nmemory of one engine with one slot")
    columns = ("GPU", "memory", "holds", "context")
    print_table(columns, list(_gpu_rows([Fit(**each) for each in gpus])), title="\nwhat one GPU holds, with one slot")
    if tensors:
        listed = [(each["name"], _shape(each["shape"]), each["type"], each["bytes"]) for each in tensors]
        print_table(("tensor", "shape", "type", "bytes"), listed, title=f"\n{len(tensors)} tensors")


def _gpu_rows(fits: Iterable[Fit]) -> Iterator[tuple[Any, ...]]:
    """One row a GPU of this machine; common ones that hold the same share a row."""
    for (here, held, n_ctx), group in groupby(fits, lambda fit: (fit.gpu.startswith("here"), _held(fit), fit.n_ctx)):
        members = list(group)
        rows = [[each] for each in members] if here else [members]
        for row in rows:
            sizes = dict.fromkeys(human_bytes(fit.memory_bytes) for fit in (row[0], row[-1]))
            yield ", ".join(fit.gpu for fit in row), " to ".join(sizes), held, n_ctx or None


def _held(fit: Fit) -> str:
    return "whole" if fit.whole else f"{fit.n_layers} layers" if fit.n_layers else "nothing"


def _shape(shape: list[int]) -> str:
    return " x ".join(map(str, shape))


def _licence(resolved: ResolvedModel) -> str | None:
    """As the catalogue has it; the package's own models are under its licence."""
    if resolved.entry is not None:
        return resolved.entry.licence
    return "MIT" if resolved.origin is Origin.EMBEDDED else None


def _contexts(info: GgufInfo) -> list[int]:
    trained = info.n_ctx_train or _CONTEXTS[1]
    return sorted({n_ctx for n_ctx in _CONTEXTS if n_ctx < trained} | {trained})


def _memory_row(info: GgufInfo, n_ctx: int) -> dict[str, int]:
    config = EngineConfig(n_parallel=1)
    on_gpu = estimate(info, n_ctx=n_ctx, n_parallel=1, n_gpu_layers=info.n_layer + 1, config=config)
    on_cpu = estimate(info, n_ctx=n_ctx, n_parallel=1, n_gpu_layers=0, config=config)
    return {
        "n_ctx": n_ctx,
        "kv_bytes": on_cpu.kv_bytes,
        "gpu_bytes": on_gpu.device_bytes,
        "cpu_bytes": on_cpu.host_bytes,
    }


def _show_entry(entry: CatalogEntry, *, as_json: bool) -> None:
    if as_json:
        print_json(asdict(entry))
    else:
        print_table(("", entry.name), [item for item in asdict(entry).items() if item[1] != ""])
    ERR.print(f"Not downloaded yet; `lltm-ray models pull {entry.name}` fetches it.", style="dim", markup=False)


def _words(name: str, value: Any) -> Any:
    if name == "file_bytes":
        return human_bytes(value)
    if name == "quantization_bytes":
        return ", ".join(f"{kind} {size / (sum(value.values()) or 1):.0%}" for kind, size in value.items())
    return human_count(value) if name == "parameters" else value


def human_count(number: int) -> str:
    """A number of parameters, e.g. `1.24 B`."""
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= 0.9995 * size:  # else 999,900,000 would round to 1e+03 M
            return f"{number / size:.3g} {unit}"
    return str(number)
