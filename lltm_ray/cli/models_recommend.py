"""`lltm-ray models recommend`: which file type of a model, or which model, for so much GPU memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated

import typer

from lltm_ray.cli._output import ERR, OUT, JsonFlag, errors_end_the_command, human_bytes, print_json, print_table
from lltm_ray.cli._sizes import parse_gpus
from lltm_ray.config import read_environment
from lltm_ray.errors import ConfigError, ModelDownloadError
from lltm_ray.models.catalog import CatalogEntry, load_catalog
from lltm_ray.models.gguf import read_model
from lltm_ray.models.recommend import Recommendation, recommend, recommend_entry, recommend_models, type_in_name
from lltm_ray.models.resolve import resolve

_Model = Annotated[
    str | None, typer.Argument(help="A catalogue name or a path.", show_default="the catalogue's models that fit")
]
_Vram = Annotated[str, typer.Option(help="Memory of the GPUs: 16GiB, 2x16GiB, or 16GiB,24GiB.")]
_Context = Annotated[int | None, typer.Option(help="Tokens a slot.", show_default="4096")]
_Slots = Annotated[int, typer.Option(help="Slots.")]


@errors_end_the_command()
def recommend_model(
    model: _Model = None, *, vram: _Vram, context: _Context = None, slots: _Slots = 1, as_json: JsonFlag = False
) -> None:
    """Recommend the file type of a model that fits whole on GPUs of such memory; without a model, models that do."""
    gpus = parse_gpus("vram", vram)
    if model is None:
        if context is not None or slots != 1:
            raise ConfigError("context" if context is not None else "slots", context or slots, "needs a model")
        _print_models(recommend_models(load_catalog().values(), gpus), gpus, as_json=as_json)
        return
    found = _recommend(model, gpus, context, slots)
    if as_json:
        print_json(found)
        return
    _print(found)


def _recommend(model: str, gpus: Sequence[int], context: int | None, slots: int) -> Recommendation:
    try:
        path = resolve(model, cache_dir=read_environment().cache_dir, offline=True).path
    except ModelDownloadError:
        entry = load_catalog().get(model)
        if entry is None:
            raise
        if context is not None or slots != 1:
            field, value = ("context", context) if context is not None else ("slots", slots)
            why = f"needs the file, which is not here: `lltm-ray models pull {model}` first"
            raise ConfigError(field, value, why) from None
        return recommend_entry(entry, gpus)
    return recommend(read_model(path), gpus, n_ctx=context, n_parallel=slots)


def _print(found: Recommendation) -> None:
    rows = [
        (
            f"{each.file_type}{' *' if each.file_type == found.best else ''}",
            f"{each.bits:.2f}",
            human_bytes(each.file_bytes),
            human_bytes(each.memory_bytes),
            each.fits,
            each.largest_ctx,
            "imatrix" if each.needs_imatrix else None,
        )
        for each in found.choices
    ]
    context = f" at {found.n_ctx} tokens x {found.n_parallel} slots{'' if found.exact else ', estimated'}"
    columns = ("type", "bits", "file", f"memory{context}", "fits", "largest context", "needs")
    print_table(columns, rows, title=found.model)
    OUT.print(found.reason, markup=False)
    if not found.exact:
        note = (
            "Not downloaded: estimated from its number of parameters; `models pull` it for its true sizes and context."
        )
        ERR.print(note, style="dim", markup=False)


def _print_models(fitting: Sequence[tuple[CatalogEntry, int]], gpus: Sequence[int], *, as_json: bool) -> None:
    if as_json:
        print_json([{**asdict(entry), "memory_bytes": need} for entry, need in fitting])
        return
    rows = [
        (entry.name, entry.kind, type_in_name(entry.file), human_bytes(need), entry.context, entry.licence)
        for entry, need in fitting
    ]
    print_table(("name", "kind", "type", "memory, estimated", "trained context", "licence"), rows)
    size = human_bytes(sum(gpus))
    ERR.print(f"{len(rows)} of the catalogue fit {size}; the largest model first.", style="dim", markup=False)
