"""`lltm-ray adapters`: a running fleet's LoRA adapters, other scales, other adapters."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from lltm_ray.cli._endpoint import NameOption, fleet_meant
from lltm_ray.cli._output import ERR, JsonFlag, errors_end_the_command, print_json, print_table
from lltm_ray.cli.models_lora import read_choice
from lltm_ray.errors import ConfigError

_Set = Annotated[
    list[str] | None,
    typer.Option("--set", help="NAME=SCALE for requests that choose none; repeatable.", show_default="none"),
]
_Load = Annotated[
    list[str] | None,
    typer.Option(help="PATH or PATH=SCALE of a GGUF adapter that all engines shall have.", show_default="none"),
]
_Unload = Annotated[list[str] | None, typer.Option(help="NAME of one that no engine shall have.", show_default="none")]
_Model = Annotated[str | None, typer.Option(help="The served model to load into.", show_default="the only one")]


@errors_end_the_command()
def adapters(
    *,
    name: NameOption = "default",
    set_scales: _Set = None,
    load: _Load = None,
    unload: _Unload = None,
    model: _Model = None,
    as_json: JsonFlag = False,
) -> None:
    """Show a fleet's LoRA adapters with their scales on each engine; change them.

    A scale is changed at once. To load or unload one, engines are restarted one after the other; no request is lost.
    """
    from lltm_ray.driver import Cluster  # imports Ray

    scales = [_read_scale(each) for each in set_scales or ()]
    files = [read_choice(each) for each in load or ()]
    with Cluster.connect(fleet_meant(name)) as cluster:
        for label in unload or ():
            with ERR.status(f"unloading {label} …"):
                cluster.unload_adapter(label)
        for path, scale in files:
            with ERR.status(f"loading {path.name} …"):
                cluster.load_adapter(Path(path), scale=scale, model=model)
        for label, scale in scales:
            cluster.set_adapter_scale(label, scale)
        found = cluster.adapters()
    if as_json:
        print_json([asdict(each) for each in found])
        return
    rows = [(f"{each.model}:{each.name}", engine, scale) for each in found for engine, scale in each.scales.items()]
    print_table(("adapter", "engine", "scale"), rows)


def _read_scale(text: str) -> tuple[str, float]:
    label, sign, scale = text.rpartition("=")
    try:
        return label, float(scale if sign else "none was given")
    except ValueError as error:
        raise ConfigError("set", text, "must be NAME=SCALE, e.g. ada=0.5") from error
