"""`lltm-ray models`: list, show, pull, convert, diff; and `engine-download` for llama.cpp itself."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from lltm_ray.cli._output import (
    ERR,
    OUT,
    JsonFlag,
    errors_end_the_command,
    print_json,
    print_table,
    progress_bar,
)
from lltm_ray.cli.models_diff import diff
from lltm_ray.cli.models_lora import app as lora
from lltm_ray.cli.models_quantize import register as register_quantize
from lltm_ray.cli.models_recommend import recommend_model
from lltm_ray.cli.models_shards import register as register_shards
from lltm_ray.cli.models_show import human_count, show
from lltm_ray.cli.models_validate import validate_model
from lltm_ray.config import read_environment
from lltm_ray.errors import ConfigError
from lltm_ray.llamacpp.download import default_variant, download_engine, releases
from lltm_ray.models.catalog import KINDS, CatalogEntry, load_catalog
from lltm_ray.models.resolve import DEMONSTRATIONS, resolve

app = typer.Typer(
    help="Models: list the catalogue, show a file, pull, convert, compare two files; and download llama.cpp.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
_Model = Annotated[str, typer.Argument(help="tiny, random, a catalogue name, a path, or repo:file[@revision].")]
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
    for name, about in DEMONSTRATIONS.items():
        ERR.print(f"Without a download: {name}, {about}.", style="dim", markup=False)
    ERR.print("Beside these: a path, or repo:file[@revision].", style="dim", markup=False)


app.command("show")(show)


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


app.command("diff")(diff)
app.command("recommend")(recommend_model)
app.command("validate")(validate_model)
register_quantize(app)
register_shards(app)
app.add_typer(lora, name="lora")


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


def _catalog_row(entry: CatalogEntry) -> tuple[str | int, ...]:
    return (entry.name, entry.kind, human_count(entry.parameters), entry.context, entry.licence)
