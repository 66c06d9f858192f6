"""`lltm-ray models diff`: how far the weights of two GGUF files lie apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lltm_ray._optional import load
from lltm_ray.cli._output import ERR, JsonFlag, errors_end_the_command, print_json, print_table, progress_bar
from lltm_ray.config import read_environment
from lltm_ray.errors import ConfigError, MissingExtraError
from lltm_ray.models.resolve import resolve

if TYPE_CHECKING:
    from lltm_ray.models.diff import Dequantize, ModelDiff, TensorDiff
    from lltm_ray.models.diff_header import MetadataDiff

DEVICES = ("auto", "cpu", "cuda")
_COLUMNS = ("tensor", "a", "b", "bits", "relative", "rmse", "max", "1-cosine", "note")
_A = Annotated[str, typer.Argument(help="The reference: tiny, a catalogue name that is here, or a path.")]
_B = Annotated[str, typer.Argument(help="The other file of the same model.")]
_Device = Annotated[str, typer.Option(help="Decodes and compares: cpu, cuda, or auto: cuda where PyTorch sees a GPU.")]
_Rows = Annotated[int, typer.Option(help="Tensors to print, the worst first; 0: all.")]
_Only = Annotated[str, typer.Option(help="Compare only tensors named like this, e.g. 'blk.0.*'.")]
_Header = Annotated[bool, typer.Option("--header", help="Only the metadata; also of two models.")]
_Html = Annotated[Path | None, typer.Option("--html", help="Write charts as one self-contained page.")]


@errors_end_the_command()
def diff(
    a: _A,
    b: _B,
    *,
    device: _Device = "auto",
    only: _Only = "*",
    rows: _Rows = 30,
    html: _Html = None,
    header: _Header = False,
    as_json: JsonFlag = False,
) -> None:
    """Compare two files of one model, e.g. F16 with Q4_K_M: their metadata, and their weights tensor by tensor.

    Relative is the Frobenius norm of the error over that of A's tensor; bits are B's per weight. Tensors that cannot be
    compared come first.
    """
    from lltm_ray.models.diff import diff_models
    from lltm_ray.models.diff_header import diff_headers

    if rows < 0:
        raise ConfigError("rows", rows, "must be 0 or above")
    paths = [resolve(model, cache_dir=read_environment().cache_dir, offline=True).path for model in (a, b)]
    if header:
        _print_header(diff_headers(*paths), as_json=as_json)
        return
    decode, where = choose_decoder(device)
    with progress_bar() as progress:
        found = diff_models(
            *paths, dequantize=decode, only=only, progress=lambda _, done, total: progress("comparing", done, total)
        )
    _check_compared(found, a, b, only)
    if html is not None:
        html.write_text(to_html(found), encoding="utf-8")
    if as_json:
        print_json({"device": where, **asdict(found), "tensors": [asdict(each) for each in found.worst()]})
        return
    _print(found, rows)
    ERR.print(f"Compared on {where}.", style="dim", markup=False)


def _check_compared(found: ModelDiff, a: str, b: str, only: str) -> None:
    if not found.tensors:
        raise ConfigError("only", only, "is the name of no tensor in either file")
    if not any(each.state == "compared" for each in found.tensors):
        states = ", ".join(sorted({each.state for each in found.tensors}))
        why = f"has no tensor that can be compared with {a}'s ({states}); give two files of one model"
        raise ConfigError("b", b, why)


def choose_decoder(device: str) -> tuple[Dequantize, str]:
    """What decodes, and the name of the device that it does so on.

    Raises:
        ConfigError: no such choice, or PyTorch sees no GPU.
        MissingExtraError: `cuda` without PyTorch.
    """
    if device not in DEVICES:
        raise ConfigError("device", device, f"must be one of {', '.join(DEVICES)}")
    if device == "cpu":
        return _on_cpu, "the CPU"
    try:
        torch = load("torch", extra="torch", feature="PyTorch")
    except MissingExtraError:
        if device == "cuda":
            raise
        return _on_cpu, "the CPU"
    if torch.cuda.is_available():
        return _on_gpu(torch), str(torch.cuda.get_device_name())
    if device == "cuda":
        raise ConfigError("device", device, "PyTorch sees no CUDA device here; take cpu")
    return _on_cpu, "the CPU"


def _on_cpu(blocks: Any, kind: str, *, n_elements: int) -> Any:
    """The package's own decoder for the types that it knows: faster than gguf's on quantized blocks."""
    from lltm_ray.kernels.gguf_blocks import KINDS, dequantize
    from lltm_ray.models.diff import reference_dequantize

    return (dequantize if kind in KINDS else reference_dequantize)(blocks, kind, n_elements=n_elements)


def _on_gpu(torch: Any) -> Dequantize:
    from lltm_ray.kernels.gguf_blocks import dequantize

    def decode(blocks: Any, kind: str, *, n_elements: int) -> Any:
        return dequantize(torch.from_numpy(blocks).to("cuda"), kind, n_elements=n_elements)

    return decode


def _print_header(found: Sequence[MetadataDiff], *, as_json: bool = False) -> None:
    if as_json:
        print_json([asdict(each) for each in found])
        return
    if found:
        print_table(("metadata", "a", "b"), [(each.key, each.a, each.b) for each in found], title="\nother metadata")
    else:
        ERR.print("The metadata is the same.", style="dim", markup=False)


def _print(found: ModelDiff, rows: int) -> None:
    worst = found.worst()
    print_table(_COLUMNS, [_row(each) for each in worst[: rows or None]])
    if rows and len(worst) > rows:
        ERR.print(f"{len(worst) - rows} more with less error; --rows 0 prints all.", style="dim", markup=False)
    columns = ("type of a", "type of b", "tensors", "elements", "bits", "relative, mean", "relative, worst")
    print_table(columns, _by_type(found.tensors), title="\nby type")
    _print_header(found.metadata)


def _row(each: TensorDiff) -> tuple[Any, ...]:
    away = None if each.cosine is None else 1 - each.cosine
    note = "; ".join(filter(None, ("" if each.state == "compared" else each.state, each.note)))
    figures = (each.bits_b, each.relative, each.rmse, each.max_abs, away)
    return (each.name, each.kind_a, each.kind_b, *figures, note or None)


def _by_type(tensors: Sequence[TensorDiff]) -> list[tuple[Any, ...]]:
    """One row a pair of types; the mean relative error weighs each element alike."""
    pairs: dict[tuple[str, str], list[TensorDiff]] = {}
    for each in tensors:
        if each.state == "compared":
            pairs.setdefault((str(each.kind_a), str(each.kind_b)), []).append(each)
    rows = []
    for (a, b), members in pairs.items():
        known = [(each.relative, each.n_elements) for each in members if each.relative is not None]
        elements = sum(each.n_elements for each in members)
        weight = sum(count for _, count in known)
        mean = sum(error * count for error, count in known) / weight if weight else None
        worst = max((error for error, _ in known), default=None)
        rows.append((a, b, len(members), elements, members[0].bits_b, mean, worst))
    return rows


def to_html(found: ModelDiff) -> str:
    """One page with Plotly in it: relative error of each kind of tensor by layer, and of the others as bars."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    grid, others = _by_layer(found.tensors)
    layers = sorted({layer for row in grid.values() for layer in row})
    titles = ("Relative error by layer", "Relative error outside the layers")
    figure = make_subplots(rows=2, cols=1, row_heights=[0.75, 0.25], subplot_titles=titles)
    values = [[row.get(layer) for layer in layers] for row in grid.values()]
    bar = {"title": "relative", "len": 0.6, "y": 0.65}
    figure.add_trace(go.Heatmap(x=layers, y=list(grid), z=values, colorscale="Viridis", colorbar=bar), row=1, col=1)
    shown = sorted(others.items(), key=lambda item: -item[1])
    figure.add_trace(go.Bar(x=[name for name, _ in shown], y=[error for _, error in shown]), row=2, col=1)
    figure.update_layout(
        title=f"{Path(found.path_a).name} against {Path(found.path_b).name}", template="plotly_white", height=900
    )
    return str(figure.to_html(include_plotlyjs=True, full_html=True))


def _by_layer(tensors: Sequence[TensorDiff]) -> tuple[dict[str, dict[int, float]], dict[str, float]]:
    """Relative errors: role -> layer -> error of tensors named `blk.<layer>.<role>`, and name -> error of others."""
    grid: dict[str, dict[int, float]] = {}
    others: dict[str, float] = {}
    for each in tensors:
        if each.relative is None:
            continue
        prefix, _, rest = each.name.partition(".")
        layer, _, role = rest.partition(".")
        if prefix == "blk" and layer.isdecimal() and role:
            grid.setdefault(role, {})[int(layer)] = each.relative
        else:
            others[each.name] = each.relative
    return grid, others
