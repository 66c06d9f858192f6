"""`lltm-ray models`: list, show, pull, convert; and `engine-download` for llama.cpp itself."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from lltm_ray.cli._output import (
    ERR,
    OUT,
    JsonFlag,
    errors_end_the_command,
    human_bytes,
    print_json,
    print_table,
    progress_bar,
)
from lltm_ray.config import EngineConfig, read_environment
from lltm_ray.errors import ConfigError, ModelDownloadError
from lltm_ray.llamacpp.download import default_variant, download_engine, releases
from lltm_ray.models.catalog import KINDS, CatalogEntry, load_catalog
from lltm_ray.models.gguf import GgufInfo, read_model
from lltm_ray.models.memory import estimate
from lltm_ray.models.resolve import TINY, ResolvedModel, resolve

app = typer.Typer(
    help="Models: list the catalogue, show a file, pull, convert; and download llama.cpp.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
_CONTEXTS = (2048, 8192, 32_768, 131_072)
_Model = Annotated[str, typer.Argument(help="tiny, a catalogue name, a path, or repo:file[@revision].")]
_Kind = Annotated[str | None, typer.Option(help=f"Only {', '.join(KINDS)}.", show_default="all")]
_Offline = Annotated[bool, typer.Option("--offline", help="Use only what is downloaded already.")]
_Tag = Annotated[str | None, typer.Option(help="llama.cpp release.", show_default=str(releases()["tag"]))]
_Variant = Annotated[str | None, typer.Option(help=f"One of {', '.join(releases()['variants'])}.", show_default="CPU")]
_Sha256 = Annotated[
    str | None, typer.Option("--sha256", help="SHA-256 the archive must have, 64 hex digits.", show_default="as pinned")
]
_Folder = Annotated[Path, typer.Argument(help="The checkpoint: config.json, tokenizer.json, *.safetensors.")]
_Out = Annotated[Path, typer.Argument(help="The GGUF file to write; one that is there is replaced.")]
_OutType = Annotated[str, typer.Option("--type", help="Of the matrices: f32, f16, bf16 or q8_0.")]
_Pre = Annotated[
    str | None, typer.Option(help="llama.cpp's name of the pre-tokenizer.", show_default="told by tokenizer.json")
]
_BaseUrl = Annotated[
    str | None, typer.Option(help="Mirror with <tag>/<file> below it.", show_default=str(releases()["base_url"]))
]


@app.command("list")
@errors_end_the_command()
def list_models(*, kind: _Kind = None, as_json: JsonFlag = False) -> None:
    """List the catalogue: models that go by a short name."""
    if kind is not None and kind not in KINDS:
        raise ConfigError("kind", kind, f"must be one of {', '.join(KINDS)}")
    entries = [entry for entry in load_catalog().values() if kind in (None, entry.kind)]
    if as_json:
        print_json([asdict(entry) for entry in entries])
        return
    print_table(("name", "kind", "parameters", "context", "licence"), [_catalog_row(entry) for entry in entries])
    ERR.print(
        f"Beside these: {TINY} (made here, no download), a path, or repo:file[@revision].", style="dim", markup=False
    )


@app.command("show")
@errors_end_the_command()
def show_model(model: _Model, *, as_json: JsonFlag = False) -> None:
    """Show what a model's file says of itself and what memory it takes; downloads nothing."""
    try:
        resolved = resolve(model, cache_dir=read_environment().cache_dir, offline=True)
    except ModelDownloadError:
        entry = load_catalog().get(model)
        if entry is None:
            raise
        _show_entry(entry, as_json=as_json)
        return
    facts = describe(resolved, read_model(resolved.path))
    if as_json:
        print_json(facts)
        return
    memory = facts.pop("memory")
    print_table(("", resolved.name), [(name, _words(name, value)) for name, value in facts.items()])
    columns = ("context", "KV cache", "all on GPUs", "all on the CPU")
    rows = [(row["n_ctx"], *(human_bytes(row[name]) for name in list(row)[1:])) for row in memory]
    print_table(columns, rows, title="\nmemory of one engine with one slot")


@app.command("pull")
@errors_end_the_command()
def pull_model(model: _Model, *, offline: _Offline = False) -> None:
    """Download a model, unless it is here, and print its path."""
    environment = read_environment()
    with progress_bar() as progress:
        found = resolve(
            model, cache_dir=environment.cache_dir, offline=offline or environment.hf_offline, progress=progress
        )
    OUT.print(str(found.path), markup=False, soft_wrap=True)


@app.command("convert")
@errors_end_the_command()
def convert_model(folder: _Folder, out: _Out, *, out_type: _OutType = "f16", pre: _Pre = None) -> None:
    """Convert a Hugging Face checkpoint (safetensors) to one GGUF file, and print its path."""
    from lltm_ray.models.convert.convert import convert  # gguf takes half a second to import

    with progress_bar() as progress:
        info = convert(
            folder, out, out_type=out_type, pre=pre, progress=lambda _, done, total: progress(out.name, done, total)
        )
    OUT.print(info.path, markup=False, soft_wrap=True)


@app.command("engine-download")
@errors_end_the_command()
def engine_download(
    *, tag: _Tag = None, variant: _Variant = None, sha256: _Sha256 = None, base_url: _BaseUrl = None
) -> None:
    """Download a release build of llama.cpp, verify its hash, and print the path of its llama-server."""
    variant = variant or default_variant()
    with progress_bar() as progress:
        server = download_engine(
            tag,
            cache_dir=read_environment().cache_dir,
            variant=variant,
            sha256=sha256,
            base_url=base_url,
            progress=lambda done, total: progress(f"llama.cpp {variant}", done, total),
        )
    OUT.print(str(server), markup=False, soft_wrap=True)


def describe(resolved: ResolvedModel, info: GgufInfo) -> dict[str, Any]:
    """The facts that `show` prints; sizes in bytes, contexts in tokens."""
    return {
        "path": str(resolved.path),
        "origin": str(resolved.origin),
        "licence": resolved.entry.licence if resolved.entry else None,
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
    }


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


def _catalog_row(entry: CatalogEntry) -> tuple[str | int, ...]:
    return (entry.name, entry.kind, _count(entry.parameters), entry.context, entry.licence)


def _words(name: str, value: Any) -> Any:
    if name == "file_bytes":
        return human_bytes(value)
    if name == "quantization_bytes":
        return ", ".join(f"{kind} {size / (sum(value.values()) or 1):.0%}" for kind, size in value.items())
    return _count(value) if name == "parameters" else value


def _count(number: int) -> str:
    """A number of parameters, e.g. `1.24 B`."""
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= 0.9995 * size:  # else 999,900,000 would round to 1e+03 M
            return f"{number / size:.3g} {unit}"
    return str(number)
