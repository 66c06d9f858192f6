"""`lltm-ray models lora`: convert PEFT's adapters, look into one, and merge some into their model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lltm_ray.cli._output import (
    OUT,
    JsonFlag,
    errors_end_the_command,
    human_bytes,
    print_json,
    print_table,
    progress_bar,
)
from lltm_ray.config import read_environment
from lltm_ray.errors import ConfigError
from lltm_ray.models.lora.file import LoraFile, read_lora
from lltm_ray.models.resolve import resolve

if TYPE_CHECKING:
    from lltm_ray.cli._output import ProgressCallback

app = typer.Typer(
    help="LoRA adapters: convert one of PEFT's, show one, merge some into their model.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
_Folder = Annotated[Path, typer.Argument(help="Holds adapter_config.json and adapter_model.safetensors.")]
_Out = Annotated[Path, typer.Argument(help="The GGUF file to write; one that is there is replaced.")]
_Base = Annotated[str, typer.Option(help="What it was trained on: a model that is here, or a folder with config.json.")]
_Model = Annotated[str, typer.Argument(help="The model: tiny, a catalogue name that is here, or a path.")]
_Kind = Annotated[str, typer.Option("--type", help="Of the factors: f32, f16 or bf16.")]
_Merged = Annotated[
    str | None,
    typer.Option("--type", help="Of the changed tensors: f32, f16, bf16 or q8_0.", show_default="as they are, or f16"),
]
_Adapters = Annotated[list[str], typer.Option("--adapter", help="PATH or PATH=SCALE of a GGUF adapter; repeatable.")]
_File = Annotated[Path, typer.Argument(help="A GGUF adapter.")]


@app.command("convert")
@errors_end_the_command()
def convert_lora(folder: _Folder, out: _Out, *, base: _Base, out_type: _Kind = "f16") -> None:
    """Convert an adapter that PEFT saved to GGUF, and print its path."""
    from lltm_ray.models.lora.convert import convert_adapter  # gguf takes half a second to import

    with progress_bar() as progress:
        made = convert_adapter(folder, out, base=_find(base), out_type=out_type, progress=_steps(out, progress))
    OUT.print(made.path, markup=False, soft_wrap=True)


@app.command("merge")
@errors_end_the_command()
def merge_lora(base: _Model, out: _Out, *, adapter: _Adapters, out_type: _Merged = None) -> None:
    """Write a model that has adapters in its weights, and print its path.

    Tensors that no adapter changes are copied as they are. Changed ones keep their type where it can be written; those
    of K quants become F16.
    """
    from lltm_ray.models.lora.merge import merge_adapter

    chosen = [read_choice(each) for each in adapter]
    with progress_bar() as progress:
        made = merge_adapter(_find(base), chosen, out, out_type, progress=_steps(out, progress))
    OUT.print(made.path, markup=False, soft_wrap=True)


@app.command("show")
@errors_end_the_command()
def show_lora(file: _File, *, as_json: JsonFlag = False) -> None:
    """Show what a GGUF adapter says of itself: its model's architecture, alpha, ranks, and what it changes."""
    lora = read_lora(file)
    facts = describe(lora)
    if as_json:
        print_json(facts)
        return
    changes = facts.pop("changes")
    facts["file_bytes"] = human_bytes(facts["file_bytes"])
    print_table(("", lora.name), [(name, ", ".join(map(str, value)) if isinstance(value, list) else value)
                                  for name, value in facts.items()])  # fmt: skip
    rows = [(row["tensor"], row["rank"], row["factor"], row["type"]) for row in changes]
    print_table(("changes", "rank", "factor", "type"), rows, title="")


def describe(lora: LoraFile) -> dict[str, Any]:
    """The facts that `show` prints; factor is what b a is multiplied by at scale 1."""
    changes = [
        {"tensor": name, "rank": pair.rank, "factor": lora.factor(name), "type": pair.b.type}
        for name, pair in lora.pairs.items()
    ]
    return {
        "path": lora.path,
        "architecture": lora.architecture,
        "alpha": lora.alpha,
        "ranks": sorted({pair.rank for pair in lora.pairs.values()}),
        "parameters": sum(each.n_elements for pair in lora.pairs.values() for each in (pair.a, pair.b)),
        "file_bytes": lora.file_bytes,
        "changes": changes,
    }


def read_choice(text: str) -> tuple[Path, float]:
    """`PATH=SCALE`, or a path alone at scale 1; a path that holds `=` is taken where there is such a file.

    Raises:
        ConfigError: the scale is no number.
    """
    path, sign, scale = text.rpartition("=")
    if not sign or Path(text).exists():
        return Path(text), 1.0
    try:
        return Path(path), float(scale)
    except ValueError as error:
        raise ConfigError("adapter", text, "must be PATH or PATH=SCALE, e.g. ada.gguf=0.5") from error


def _find(model: str) -> Path:
    """A folder as it is; else what the name or path stands for, without a download."""
    if Path(model).is_dir():
        return Path(model)
    return resolve(model, cache_dir=read_environment().cache_dir, offline=True).path


def _steps(out: Path, progress: ProgressCallback) -> Any:
    return lambda _, done, total: progress(out.name, done, total)
