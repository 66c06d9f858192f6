"""`lltm-ray tune`: which settings suit a model, a workload and this machine, by measuring them."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from lltm_ray.cli._output import (
    ERR,
    OUT,
    JsonFlag,
    errors_end_the_command,
    print_json,
    print_table,
    progress_bar,
    tell_if_demonstration,
)
from lltm_ray.config import FleetConfig, build
from lltm_ray.errors import ConfigError
from lltm_ray.llamacpp.tuning.choice import Gain
from lltm_ray.llamacpp.tuning.file import to_toml
from lltm_ray.llamacpp.tuning.plan import WORKLOADS, Candidate, Facts, Workload, plan, usual
from lltm_ray.llamacpp.tuning.speed import expected_gain
from lltm_ray.sdk.tune import Row, Tuned

_Model = Annotated[str, typer.Option(help="tiny, random, a catalogue name, a path, repo:file[@revision].")]
_Kind = Annotated[str, typer.Option(help=f"What clients send: {', '.join(WORKLOADS)}.")]
_Gpus = Annotated[
    float | None,
    typer.Option(help="GPUs for the whole fleet: 0, a part of one, or whole ones.", show_default="all that are here"),
]
_Minutes = Annotated[float, typer.Option(help="About how long to measure; more tells smaller gains from noise.")]
_Concurrency = Annotated[int | None, typer.Option(min=1, help="Requests at a time.", show_default="the workload's")]
_Draft = Annotated[str | None, typer.Option(help="Draft model to try.", show_default="tiny-draft for tiny, else none")]
_Limit = Annotated[float | None, typer.Option(help="Memory an engine may plan with, GiB.")]
_Server = Annotated[Path | None, typer.Option(help="Path of llama-server.")]
_Out = Annotated[Path | None, typer.Option(help="TOML file to write, for `lltm-ray up --config`.")]
_Dry = Annotated[bool, typer.Option("--dry-run", "--explain", help="Only show the plan with its reasons.")]
_LEAST_SLICE_S, _MOST_SLICE_S = 2.0, 20.0


@dataclass(frozen=True, slots=True)
class _Job:
    """What one command was told, and the plan for it; the workload as the model's context allows."""

    fleet: FleetConfig
    workload: Workload
    facts: Facts
    candidates: list[Candidate]

    def expected_gain(self, candidate: Candidate) -> float | None:
        return expected_gain(candidate, self.candidates[0], self.workload, self.facts)


@errors_end_the_command()
def tune(
    *,
    model: _Model = "tiny",
    workload: _Kind = "chat",
    gpus: _Gpus = None,
    minutes: _Minutes = 5.0,
    concurrency: _Concurrency = None,
    draft: _Draft = None,
    memory_limit_gib: _Limit = None,
    llama_server: _Server = None,
    out: _Out = None,
    dry_run: _Dry = False,
    as_json: JsonFlag = False,
) -> None:
    """Try settings on real fleets under a workload's load, and write the best as TOML with its reasons.

    A gain is named only beyond the noise, with a 95 % interval that holds for all candidates at once; else the plain
    default is kept. Ctrl-C ends it with what was found so far.
    """
    from lltm_ray.sdk.tune_facts import read_facts

    asked = _workload(workload)
    if not dry_run and not asked.answer_tokens:
        raise ConfigError("workload", workload, "the load generator sends chats: only --dry-run works for it")
    if out is not None:
        _check(out, dry_run=dry_run)
    fleet = _fleet(model, memory_limit_gib, llama_server)
    if not 0 < minutes < 10_000:
        raise ConfigError("minutes", minutes, "must be more than 0")
    with progress_bar() as progress:
        facts = read_facts(fleet, gpus=gpus, model_draft=draft, progress=progress)
    asked = replace(asked, concurrency=concurrency) if concurrency else usual(asked, facts)
    asked = asked.fitted(facts.n_ctx_train)
    job = _Job(fleet, asked, facts, plan(asked, facts))
    if dry_run:
        (_print_plan if as_json else _show_plan)(job)
        return
    found, rate = _measure(job, minutes * 60)
    _tell(found, job, rate, out, as_json=as_json)


def _workload(name: str) -> Workload:
    if name not in WORKLOADS:
        raise ConfigError("workload", name, f"must be one of {', '.join(WORKLOADS)}")
    return WORKLOADS[name]


def _fleet(model: str, memory_limit_gib: float | None, llama_server: Path | None) -> FleetConfig:
    given = {
        "model": model,
        "memory_limit_bytes": int(memory_limit_gib * 2**30) if memory_limit_gib else None,
        "llama_server": str(llama_server) if llama_server else None,
    }
    fleet: FleetConfig = build(FleetConfig, given)
    return fleet.with_absolute_paths()


def _measure(job: _Job, seconds: float) -> tuple[Tuned, float | None]:
    """What was found, and the rate of requests at which times to the first token were measured."""
    from lltm_ray.sdk.tune import tune as run
    from lltm_ray.sdk.tune_fleet import FleetBench

    tell_if_demonstration(job.fleet.model)
    slice_s = min(max(_LEAST_SLICE_S, seconds / 30), _MOST_SLICE_S)
    with _stopped_by_signals() as stop, ERR.status("starting Ray …") as status:
        bench = FleetBench(job.fleet, job.workload, job.facts, slice_s=slice_s, stop=stop)
        bench.admit(job.candidates)
        with bench:
            found = run(
                job.candidates,
                bench.measure,
                seconds=seconds,
                higher_is_better=job.workload.goal == "throughput",
                tell=lambda words: status.update(f"{words} …"),
            )
            status.update("stopping …")
    for row in found.rows:
        row.expected = job.expected_gain(row.candidate)
    return found, bench.rate


@contextmanager
def _stopped_by_signals() -> Iterator[threading.Event]:
    """The first SIGINT or SIGTERM asks for an orderly end; a second SIGINT does not wait for it."""
    stop = threading.Event()

    def ask(_number: int, _frame: Any) -> None:
        stop.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _check(out: Path, *, dry_run: bool) -> None:
    """Before minutes are spent on what could not be kept."""
    if dry_run:
        raise ConfigError("out", str(out), "--dry-run measures nothing to write: leave one of the two out")
    if not out.parent.is_dir() or not os.access(out.parent, os.W_OK | os.X_OK):
        raise ConfigError("out", str(out), f"cannot be written: make the folder {out.parent}, or give another")
    if out.is_dir() or (out.exists() and not os.access(out, os.W_OK)):
        raise ConfigError("out", str(out), "cannot be written: give a file's name that may be replaced")


def _tell(found: Tuned, job: _Job, rate: float | None, out: Path | None, *, as_json: bool) -> None:
    """Show what was found, then write it: a disk that is full by now does not hide it."""
    text = to_toml(found.chosen, fleet=job.fleet, notes=_notes(found, job, rate))
    if as_json:
        print_json(_plain(found, job, rate, text))
    else:
        _show(found, job, rate)
    if out is not None:
        _write(out, text)
    if not as_json:
        where = f"lltm-ray up --config {out}" if out else "--out fleet.toml writes it for `lltm-ray up --config`"
        OUT.print(f"\n{where}", markup=False, soft_wrap=True)


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError("out", str(path), f"cannot be written: {error}") from error


# what people see -----------------------------------------------------------------------------------------------------


def _print_plan(job: _Job) -> None:
    rows = [{**asdict(each), "expected": job.expected_gain(each)} for each in job.candidates]
    print_json({"workload": asdict(job.workload), "candidates": rows})


def _show_plan(job: _Job) -> None:
    OUT.print(_describe(job.workload) + "\n", markup=False, soft_wrap=True)
    rows = [
        (each.name, each.engines, each.gpu_share, each.engine.n_parallel, job.expected_gain(each), each.tries)
        for each in job.candidates
    ]
    print_table(("candidate", "engines", "GPUs each", "slots each", "expected gain", "what it is to show"), rows)
    note = f"slots each: guesses for {job.workload.concurrency} requests at once (--concurrency), not the default's."
    ERR.print(note, style="dim", markup=False)
    _show_settings(job.candidates[1])


def _describe(workload: Workload) -> str:
    turns = f", {workload.turns} turns a conversation" if workload.turns > 1 else ""
    shared = f" after {workload.shared_tokens} that all share" if workload.shared_tokens else ""
    return (
        f"{workload.name}: {workload.concurrency} at a time, {workload.question_tokens} new tokens{shared}, "
        f"answers of {workload.answer_tokens}{turns}; goal: {_goal(workload)}"
    )


def _goal(workload: Workload) -> str:
    return "tokens/s" if workload.goal == "throughput" else "TTFT p95, ms"


def _show_settings(candidate: Candidate) -> None:
    settings = {"engines": candidate.engines, "gpu_share": candidate.gpu_share, **candidate.changes}
    rows = [(name, str(value), candidate.reasons.get(name)) for name, value in settings.items()]
    print_table(("setting", "value", "why"), rows, title=f"\n{candidate.name}")


def _show(found: Tuned, job: _Job, rate: float | None) -> None:
    at = f" at {rate:.3g} requests/s" if rate else ""
    head = f"{_describe(job.workload)}{at}; {found.rounds} rounds, {found.wall_s:.0f} s\n"
    OUT.print(head, markup=False, soft_wrap=True)
    figure = _goal(job.workload)
    columns = ("candidate", "engines", "slots each", "rounds", figure, "gain", "95 % interval", "expected", "")
    print_table(columns, [_row(row, found, job.workload) for row in found.rows])
    OUT.print("\n" + _verdict(found), markup=False, soft_wrap=True)
    if found.gain is not None:
        _show_settings(found.chosen)


def _row(row: Row, found: Tuned, workload: Workload) -> tuple[Any, ...]:
    figure = row.figure if row.figure is None or workload.goal == "throughput" else row.figure * 1e3
    note = "" if row.state == "measured" else row.state
    if row.candidate.name == found.chosen.name:
        note = "chosen"
    each = row.candidate
    shown = (each.name, each.engines, each.engine.n_parallel, len(row.figures), figure)
    return (*shown, row.gain.ratio if row.gain else None, _interval(row.gain), row.expected, note)


def _interval(gain: Gain | None) -> str | None:
    if gain is None:
        return None
    return "unknown" if gain.low is None or gain.high is None else f"{gain.low:.2f} to {gain.high:.2f}"


def _verdict(found: Tuned) -> str:
    ended = "Stopped early. " if found.interrupted else ""
    failed = [row.candidate.name for row in found.rows if row.state.startswith("failed")]
    ended += f"Failed: {', '.join(failed)}. " if failed else ""
    if found.gain is None:
        return (
            f"{ended}Nothing is better than {found.baseline.name} beyond the noise; it is kept. Longer runs tell more."
        )
    return (
        f"{ended}{found.chosen.name} is {found.gain.ratio:.2f} times as good as {found.baseline.name} "
        f"({_interval(found.gain)}). Others whose intervals overlap with this one may be as good."
    )


def _notes(found: Tuned, job: _Job, rate: float | None) -> list[str]:
    workload = job.workload
    at = f", {rate:.3g} requests/s" if rate else ""
    lines = [f"lltm-ray tune. {_describe(workload)}{at}", _verdict(found), "candidate: figure, gain (95 % interval)"]
    for row in found.rows:
        figure = "none" if row.figure is None else f"{row.figure * (1e3 if workload.goal == 'ttft' else 1):.4g}"
        gain = f", {row.gain.ratio:.2f} ({_interval(row.gain)})" if row.gain else ""
        state = "" if row.state == "measured" else f"; {row.state}"
        lines.append(f"  {row.candidate.name}: {figure}{gain}{state}")
    return lines


def _plain(found: Tuned, job: _Job, rate: float | None, text: str) -> dict[str, Any]:
    rows = [{**asdict(row), "figure": row.figure} for row in found.rows]
    summary = {"workload": asdict(job.workload), "rate": rate, "verdict": _verdict(found), "chosen": found.chosen.name}
    ended = {"rounds": found.rounds, "interrupted": found.interrupted, "wall_s": found.wall_s}
    return {**summary, "gain": asdict(found.gain) if found.gain else None, **ended, "rows": rows, "toml": text}
