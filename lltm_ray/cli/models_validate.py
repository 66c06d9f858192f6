"""`lltm-ray models validate`: whether a model file is whole and llama.cpp can load it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lltm_ray.cli._output import OUT, JsonFlag, errors_end_the_command, human_bytes, print_json, print_table
from lltm_ray.config import read_environment
from lltm_ray.models.resolve import resolve

if TYPE_CHECKING:
    from lltm_ray.models.validate import Validation

_Model = Annotated[str, typer.Argument(help="A path (of a split model any shard), or a name that is here.")]
_Data = Annotated[bool, typer.Option("--data", help="Also look for NaN and infinity in all weights; reads them all.")]


@errors_end_the_command()
def validate_model(path: _Model, *, data: _Data = False, as_json: JsonFlag = False) -> None:
    """Check that a model file is whole and that llama.cpp can load it; exit code 1 if not."""
    from lltm_ray.models.validate import validate  # NumPy

    found = validate(resolve(path, cache_dir=read_environment().cache_dir, offline=True).path, check_data=data)
    if as_json:
        print_json({"ok": found.ok, **asdict(found)})
    else:
        _print(found)
    if not found.ok:
        raise typer.Exit(1)


def _print(found: Validation) -> None:
    rows = [
        (each.severity, Path(each.path).name, each.offset_bytes, each.tensor, each.what, each.remedy)
        for each in found.findings
    ]
    if rows:
        print_table(("severity", "file", "byte", "tensor", "what", "remedy"), rows)
    what = "headers and all weights" if found.data_checked else "headers; --data looks at the weights too"
    files = f"{len(found.paths)} files, " if len(found.paths) > 1 else ""
    verdict = "valid" if found.ok else "invalid"
    OUT.print(f"{verdict}: {files}{found.n_tensors} tensors, {human_bytes(found.tensor_bytes)} ({what})", markup=False)
