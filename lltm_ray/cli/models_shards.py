"""`lltm-ray models split` and `merge`: one model file as several, and several as one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lltm_ray.cli._output import OUT, errors_end_the_command, progress_bar
from lltm_ray.cli._sizes import parse_bytes
from lltm_ray.models import shards

_Model = Annotated[Path, typer.Argument(help="A GGUF model of one file.")]
_First = Annotated[Path, typer.Argument(help="The first shard, NAME-00001-of-0000N.gguf.")]
_Stem = Annotated[Path, typer.Argument(help="Path of the shards without -00001-of-0000N.gguf.")]
_Out = Annotated[Path, typer.Argument(help="The GGUF file to write.")]
_MaxSize = Annotated[str | None, typer.Option(help="Most bytes of tensors in a shard: 4GiB, 500MB.")]
_MaxTensors = Annotated[int | None, typer.Option(help="Most tensors in a shard.")]


def register(app: typer.Typer) -> None:
    """Add both commands."""
    app.command("split")(split_model)
    app.command("merge")(merge_model)


@errors_end_the_command()
def split_model(path: _Model, out: _Stem, *, max_size: _MaxSize = None, max_tensors: _MaxTensors = None) -> None:
    """Write a model as shards that llama.cpp loads as one, and print their paths; give one of the two limits."""
    max_bytes = None if max_size is None else parse_bytes("max-size", max_size)
    with progress_bar() as progress:
        found = shards.split(
            path,
            out,
            max_bytes=max_bytes,
            max_tensors=max_tensors,
            progress=lambda _, done, total: progress("writing shards", done, total),
        )
    for each in found:
        OUT.print(str(each), markup=False, soft_wrap=True)


@errors_end_the_command()
def merge_model(first_shard: _First, out: _Out) -> None:
    """Write the shards of a model as one file, and print its path."""
    with progress_bar() as progress:
        found = shards.merge(first_shard, out, progress=progress)
    OUT.print(str(found), markup=False, soft_wrap=True)
