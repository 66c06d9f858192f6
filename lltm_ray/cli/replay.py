"""`lltm-ray replay`: what routing policies make of a trace, on simulated engines."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import typer

from lltm_ray.cli._output import (
    ERR,
    OUT,
    JsonFlag,
    ProgressCallback,
    errors_end_the_command,
    human_bytes,
    print_json,
    print_table,
    progress_bar,
)
from lltm_ray.config import build
from lltm_ray.errors import ConfigError
from lltm_ray.routing.policy import POLICIES, make_policy
from lltm_ray.routing.replay import Fleet, Replay, Result
from lltm_ray.routing.replay.measure import Ideal, quiet_gc
from lltm_ray.routing.replay.simulated import EngineSpec
from lltm_ray.routing.replay.synthetic import KINDS, Shape, request_rate, shape_of, synthetic
from lltm_ray.routing.replay.trace import Arrival, read_trace, trace_lines

GC_NOTE = "cyclic garbage collection frozen and off, as in a gateway after its start"
_DEFAULT_REQUESTS = 2000


def _keys(kind: type[Any], *elsewhere: str) -> str:
    """Names of a dataclass's fields and their defaults, for people."""
    items = ((item.name, item.default) for item in fields(kind) if item.name not in elsewhere)
    return ", ".join(f"{name}={value:.12g}" if isinstance(value, int | float) else name for name, value in items)


_Trace = Annotated[Path | None, typer.Argument(help="Recorded trace. Left out: --synthetic makes one.")]
_Kind = Annotated[str | None, typer.Option("--synthetic", help=f"Make a trace: {', '.join(KINDS)}.")]
_Policies = Annotated[
    list[str] | None,
    typer.Option(
        "--policy", help=f"May be given again: {', '.join(POLICIES)}.", show_default="residency, least-loaded"
    ),
]
_Requests = Annotated[
    int | None, typer.Option(min=1, help="How many of the trace.", show_default=f"all; synthetic {_DEFAULT_REQUESTS}")
]
_Pairs = list[str] | None
_AGAIN = "; may be given again."
_Engine = Annotated[
    _Pairs, typer.Option(metavar="KEY=VALUE", help=f"Of each engine: {_keys(EngineSpec, 'slots')}{_AGAIN}")
]
_Workload = Annotated[
    _Pairs,
    typer.Option(metavar="KEY=VALUE", help=f"Of a synthetic trace, by default the kind's own: {_keys(Shape)}{_AGAIN}"),
]
_RouterPairs = Annotated[
    _Pairs,
    typer.Option("--router", metavar="KEY=VALUE", help=f"Of the router: {_keys(Fleet, 'engines', 'spec')}{_AGAIN}"),
]
_Write = Annotated[Path | None, typer.Option(help="Write the trace to this file instead of playing it.")]


@errors_end_the_command()
def replay(
    trace: _Trace = None,
    *,
    kind: _Kind = None,
    policies: _Policies = None,
    engines: Annotated[int, typer.Option(help="Simulated engines.")] = 4,
    slots: Annotated[int, typer.Option(help="Slots of each.")] = 4,
    requests: _Requests = None,
    seed: Annotated[int, typer.Option(help="Synthetic: the same seed makes the same trace.")] = 0,
    engine: _Engine = None,
    workload: _Workload = None,
    router: _RouterPairs = None,
    write: _Write = None,
    as_json: JsonFlag = False,
) -> None:
    """Play a trace against simulated engines, once for each policy, and compare them.

    The router is the real one; only engines and time are simulated. An engine is by default like a 1.3 B model on an
    H200. The ideal is one server with unlimited slots and memory. State is what the router holds at its peak.
    """
    spec = build(EngineSpec, {"slots": slots} | _pairs("engine", engine), "engine.")
    fleet = build(Fleet, {"engines": engines, "spec": spec} | _pairs("router", router), "router.")
    source = _source(trace, kind, _pairs("workload", workload), _Run(fleet, requests, seed))
    if write is not None:
        _write(write, source)
        return
    names = policies or ["residency", "least-loaded"]
    for name in names:
        make_policy(name)
    with progress_bar(unit="requests") as moved:
        ideal, results = _play(names, fleet, source, moved)
    if not ideal.prompt_tokens:
        raise ConfigError("trace", str(trace), "has no requests")
    if as_json:
        print_json(_as_json(kind or str(trace), fleet, ideal, results))
    else:
        _show(kind or str(trace), fleet, ideal, results)


@dataclass(frozen=True, slots=True)
class _Run:
    fleet: Fleet
    requests: int | None
    seed: int


Source = Callable[[], Iterator[Arrival]]
"""Begins the trace anew each time."""


def _pairs(option: str, texts: list[str] | None) -> dict[str, Any]:
    """KEY=VALUE texts of an option; what is no number stays text, for `build` to refuse."""
    found = {}
    for text in texts or ():
        name, is_pair, value = text.partition("=")
        if not is_pair:
            raise ConfigError(option, text, f"must be KEY=VALUE; `lltm-ray replay --help` lists the keys of --{option}")
        found[name.strip()] = _value(value.strip())
    return found


def _value(text: str) -> Any:
    for kind in (int, float):
        with suppress(ValueError):  # the next kind may do
            return kind(text)
    return text


def _source(trace: Path | None, kind: str | None, changes: dict[str, Any], run: _Run) -> Source:
    if (trace is None) == (kind is None):
        why = "give either a recorded trace or --synthetic KIND"
        raise ConfigError("trace", "" if trace is None else str(trace), f"{why}; kinds are {', '.join(KINDS)}")
    if trace is not None:
        for name, value in changes.items():
            raise ConfigError(f"workload.{name}", value, "changes synthetic traces only, not a recorded one")
        return lambda: _first(read_trace(trace), run.requests)
    shape = build(Shape, asdict(shape_of(str(kind))) | changes, "workload.")
    requests_s = request_rate(shape, run.fleet.engines, run.fleet.spec)
    requests = run.requests or _DEFAULT_REQUESTS
    return lambda: synthetic(shape, requests=requests, requests_s=requests_s, seed=run.seed)


def _first(arrivals: Iterator[Arrival], most: int | None) -> Iterator[Arrival]:
    for number, arrival in enumerate(arrivals):
        if number == most:
            return
        yield arrival


def _write(path: Path, source: Source) -> None:
    try:
        with path.open("x", encoding="ascii") as file:
            file.writelines(trace_lines(source()))
    except OSError as error:
        raise ConfigError("write", str(path), f"cannot be written: {error.strerror}") from error
    ERR.print(f"wrote {path}", markup=False)


def _play(names: list[str], fleet: Fleet, source: Source, moved: ProgressCallback) -> tuple[Ideal, list[Result]]:
    ideal, total, results = Ideal(), 0, []
    with quiet_gc() as freeze:
        for total, arrival in enumerate(source(), 1):
            ideal.take(arrival)
            if not total % 1024:
                moved("ideal", total, None)
        ideal.forget()
        for name in names:
            player = Replay(name, fleet)
            freeze()
            results.append(player.run(source(), lambda done, name=name: moved(name, done, total)))  # type: ignore[misc]
    return ideal, results


def _as_json(name: str, fleet: Fleet, ideal: Ideal, results: list[Result]) -> dict[str, Any]:
    return {
        "trace": name,
        "fleet": asdict(fleet),
        "gc": GC_NOTE,
        "ideal": {"prompt_tokens": ideal.prompt_tokens, "cached_tokens": ideal.cached_tokens}
        | {"reuse_ratio": ideal.reuse_ratio},
        "policies": [asdict(result) | {"reuse_of_ideal_ratio": _of_ideal(result, ideal)} for result in results],
    }


def _of_ideal(result: Result, ideal: Ideal) -> float | None:
    return result.reuse_ratio / ideal.reuse_ratio if ideal.cached_tokens else None


def _show(name: str, fleet: Fleet, ideal: Ideal, results: list[Result]) -> None:
    first = results[0]
    OUT.print(
        f"{name}: {first.requests:,} requests in {first.simulated_s:,.1f} simulated s on {fleet.engines:,} engines "
        f"x {fleet.spec.slots} slots; ideal reuse {ideal.reuse_ratio:.1%}",
        markup=False,
    )
    columns = ("policy", "reuse", "of ideal", "computed", "TTFT ms p50", "p95", "p99", "goodput", "refused")
    rows = []
    for each in results:
        share = _of_ideal(each, ideal)
        times = [1e3 * value for value in (each.ttft_s.p50, each.ttft_s.p95, each.ttft_s.p99)]
        reuse = (f"{each.reuse_ratio:.1%}", None if share is None else f"{share:.1%}")
        refused = sum(each.rejected.values())
        rows.append((each.policy, *reuse, each.computed_tokens, *times, f"{each.goodput_ratio:.2%}", refused))
    print_table(columns, rows)
    OUT.print()
    work = ("decision CPU µs p50", "p99", "settling p50", "p99", "release p50", "p99")
    costs = ("policy", "decision µs p50", "p99", *work, "state", "index")
    print_table(costs, [_cost(each) for each in results], title="what deciding costs here")


def _cost(each: Result) -> tuple[Any, ...]:
    spreads = each.decision_us, each.decision_cpu_us, each.settle_cpu_us, each.release_cpu_us
    sizes = human_bytes(each.state_peak_bytes), human_bytes(each.residency_peak_bytes)
    return each.policy, *(time for spread in spreads for time in (spread.p50, spread.p99)), *sizes
