"""`lltm-ray collectives`: do the ranks of a group compute right, and how fast is what lies between them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lltm_ray.cli._output import ERR, JsonFlag, errors_end_the_command, print_json, print_table
from lltm_ray.errors import CollectiveError, ConfigError

if TYPE_CHECKING:
    from lltm_ray.actors.collectives import CollectiveGroup

DTYPES = ("float32", "float16", "int32", "int64")
MEASURED = ("all_reduce", "broadcast", "reduce", "all_gather", "reduce_scatter", "send")
_MIB = 2**20
_Ranks = Annotated[int, typer.Option(help="Actors in the group; on GPUs one each.")]
_Cpu = Annotated[bool, typer.Option("--cpu", help="On CPUs with gloo, also where there are GPUs.")]
_Size = Annotated[int, typer.Option(help="Size of the measured tensors, MiB.")]
_Repeats = Annotated[int, typer.Option(help="Measurements of each operation; the median is shown.")]
_Timeout = Annotated[float, typer.Option(help="Longest wait of a call, seconds.")]
_Fleet = Annotated[str | None, typer.Option(help="Tell the telemetry of this fleet.", show_default="nobody")]


@errors_end_the_command()
def collectives(
    *,
    ranks: _Ranks = 2,
    cpu: _Cpu = False,
    mib: _Size = 256,
    repeats: _Repeats = 5,
    timeout: _Timeout = 60.0,
    fleet: _Fleet = None,
    as_json: JsonFlag = False,
) -> None:
    """Check every operation of a group of actors against NumPy, then measure its bandwidth.

    Bus bandwidth is what a link carries, as nccl-tests reckon it. Exit code 1 when a result is wrong.
    """
    for name, value in (("mib", mib), ("repeats", repeats)):
        if value < 1:
            raise ConfigError(name, value, "must be 1 or more")
    from lltm_ray.actors.collectives import CollectiveGroup
    from lltm_ray.driver import join_ray

    join_ray()
    with CollectiveGroup.start(ranks, gpu_share=0.0 if cpu else None, timeout_s=timeout, fleet=fleet) as group:
        ERR.print(f"{ranks} ranks on {group.backend}", style="dim", markup=False)
        wrong = [name for name, is_right in check(group) if not is_right]
        rows = [_measured(group, operation, mib * _MIB, repeats) for operation in MEASURED if group.size > 1]
    if as_json:
        print_json({"backend": group.backend, "ranks": ranks, "wrong": wrong, "measured": rows})
    else:
        print_table(("operation", "MiB", "ms", "algorithm GB/s", "bus GB/s"), [_shown(row) for row in rows])
    if wrong:
        raise CollectiveError(f"results differ from NumPy's: {', '.join(wrong)}")
    ERR.print(f"All operations are right for {', '.join(DTYPES)}.", style="dim", markup=False)


def check(group: CollectiveGroup) -> Iterator[tuple[str, bool]]:
    """`operation dtype`, and whether every rank has what NumPy has."""
    import numpy as np

    for dtype in DTYPES:
        given = [np.random.default_rng(rank).integers(1, 5, (4 * group.size, 8)) for rank in range(group.size)]
        for name, call in _calls(np, group, [each.astype(dtype) for each in given]).items():
            yield f"{name} {dtype}", call()
    group.barrier()
    yield "barrier", True


def _calls(np: Any, group: CollectiveGroup, given: list[Any]) -> dict[str, Callable[[], bool]]:
    """Each operation -> whether it does with these what NumPy does."""
    last = given[-1]
    total = np.add.reduce(given, dtype=last.dtype)  # NumPy would widen int32
    calls = {
        "all_reduce": lambda: _all(np, group.all_reduce(given), total),
        "broadcast": lambda: _all(np, group.broadcast(last, root=group.size - 1), last),
        "reduce": lambda: _all(np, [group.reduce(given, op="max")], np.maximum.reduce(given)),
        "all_gather": lambda: _all(np, group.all_gather(given), np.stack(given)),
        "reduce_scatter": lambda: _all(np, [np.concatenate(group.reduce_scatter(given))], total),
    }
    if group.size > 1:
        calls["send"] = lambda: _all(np, [group.send(given[0], 0, 1)], given[0])
    return calls


def _all(np: Any, found: list[Any], want: Any) -> bool:
    return all(bool(np.array_equal(each, want)) and each.dtype == want.dtype for each in found)


def _measured(group: CollectiveGroup, operation: str, nbytes: int, repeats: int) -> dict[str, Any]:
    records = group.measure(operation, nbytes, repeats)
    middle = median(record.seconds for record in records)
    return min(records, key=lambda record: abs(record.seconds - middle)).as_dict()


def _shown(row: dict[str, Any]) -> tuple[Any, ...]:
    speeds = (row["algorithm_bytes_s"] / 1e9, row["bus_bytes_s"] / 1e9)
    return (row["operation"], row["nbytes"] / _MIB, row["seconds"] * 1e3, *speeds)
