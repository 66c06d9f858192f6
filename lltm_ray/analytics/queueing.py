"""How full the fleet is: arrivals against what slots can serve, the knee, and whether telemetry sees all requests.

An engine is seen as a queue with as many servers as it has slots, a model as one with the slots of all its engines, for
its requests wait in one queue. Expected waits are those of M/M/c: Poisson arrivals, exponential service, first come
first served. Real service is less random and real arrivals more; so they are a yardstick, and the knee keeps away from
where it bends. What a fleet was seen to serve counts more: neither knee nor capacity is told to be below that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from lltm_ray.analytics.answer import MOST_EVIDENCE, Answer, Finding, rows, table
from lltm_ray.analytics.erlang import expected_wait, knee
from lltm_ray.analytics.headroom import Came, Knee, Peaks, at_its_densest, read_peaks, while_it_lasts
from lltm_ray.analytics.occupancy import (
    EDGE,
    EDGE_S,
    Engines,
    Held,
    in_system,
    least_missing,
    read_engines,
    read_held,
    within,
)
from lltm_ray.analytics.readings import sums
from lltm_ray.analytics.saturation import LEAST_REQUESTS, saturations
from lltm_ray.analytics.slowing import at_full_load
from lltm_ray.analytics.trace import Trace
from lltm_ray.analytics.turned_away import REFUSED, models_of
from lltm_ray.analytics.units import digits, percent

NAME = "queueing"
LITTLE_ERROR = 0.1
"""Above it are requests that take no sampling and no delay to explain."""
LEAST_LOST = 0.25
"""Requests in hand that must be missing: servers free a slot a moment late."""
LEAST_SAMPLES = 100
LEAST_SERVICES = 20
"""Service times that fit into the compared time, so that the number in the system has come and gone that often."""

_ENGINES = (
    *("engine", "model", "slots", "arrivals_per_s", "service_s", "utilization", "in_system", "little_in_system"),
    *("little_error", "missing_ratio", "wait_s", "expected_wait_s", "attempts", "failed_ratio", "samples", "known_s"),
)
_MODELS = (
    *("model", "engines", "slots", "arrivals_per_s", "service_s", "capacity_per_s", "utilization", "knee_per_s"),
    *("knee_low_per_s", "knee_high_per_s", "seen_per_s"),
    *("headroom_ratio", "headroom_low_ratio", "headroom_high_ratio", "wait_s", "expected_wait_s", "wait_p95_s"),
    *("waiting", "requests", "rejected", "waited", "served_per_s"),
    *("busiest_per_s", "busiest_low_per_s", "busiest_high_per_s", "busiest_unix_nano", "busiest_s"),
    *("busiest_wait_s", "busiest_wait_p95_s"),
    *("lasting_per_s", "lasting_unix_nano", "lasting_s", "lasting_wait_s", "lasting_wait_p95_s"),
    *("lasting_slots", "lasting_service_s", "lasting_capacity_per_s", "lasting_knee_per_s", "evidence"),
)


def analyze(trace: Trace) -> Answer:
    """Tables `engines`, `models`; no figures.

    Engines: `service_s` is how long an attempt held its slot, `utilization` the share of slot-seconds that were held,
    `in_system` the mean of the server's own processing + deferred, `little_in_system` arrivals times time in the system
    (J. D. C. Little, 1961) of the attempts that telemetry knows over the same time, `little_error` (in_system -
    little_in_system) over the larger; `missing_ratio`: see `least_missing`. `expected_wait_s`: see `expected_wait`.

    Models: `busiest_*` are of the stretch in which requests came the densest (see `densest`), `lasting_*` of the
    fullest that lasts (see `Stretches`). `served_per_s` is the most that was ever served in one that lasts;
    `capacity_per_s` is slots over the service time at high load, `knee_per_s`: see `knee`; both at the slots of the
    stretch, and no less than what was served, for the knee with waits below a service time (`seen_per_s`). The service
    time at high load is the middle of what it may be (see `at_full_load`), of which `knee_low_per_s` and
    `knee_high_per_s` are made. `headroom_ratio` is knee_per_s / busiest_per_s - 1, its `low` and `high` what the knee's
    range, and chance in arrivals and service times, leave open. They and all `busiest_*` are not told (NaN) where that
    is too wide to act on (see `at_its_densest`). Nor are `lasting_*` of a model with too few requests for such a
    stretch, unless even their mean over the window is past the knee. `waiting` requests on average; `requests` are all
    that came, `rejected` those that were refused, as rows or gateways tell, `waited` the others in the rows; waits are
    from a request's arrival to its slots.
    """
    held, engines = read_held(trace), read_engines(trace)
    return Answer(
        {"engines": _table_of_engines(trace, held, engines), "models": _table_of_models(trace, held, engines)}
    )


# --- tables


def _table_of_engines(trace: Trace, held: Held, engines: Engines) -> Any:
    xp, length, found = trace.engine.xp, trace.length_s, len(trace.names.engine)
    columns = {"one": held.slot * 0.0 + 1.0, "begun": ((held.sent >= 0) & (held.sent < length)) * 1.0}
    columns |= {"held_s": held.ended - held.slot, "wait_s": held.wait, "failed": held.failed}
    columns["busy_s"] = within(xp, held.slot, held.ended, length)
    by_engine = {name: sums(xp, held.engine, values, found) for name, values in columns.items()}
    by_engine |= in_system(trace, held)._asdict() | {"missing": least_missing(trace, held, LITTLE_ERROR)}
    told: dict[str, list[Any]] = {name: [] for name in _ENGINES}
    for code, row in enumerate(rows(trace.engine.host(trace.engine.frame(by_engine)))):
        if not row.one and engines.slots[code] == 0:
            continue
        slots, there = engines.slots[code], engines.there_s(code)
        arrivals, service = row.begun / there if there else math.nan, _ratio(row.held_s, row.one)
        system, little = _ratio(row.told_s, row.known_s), _ratio(row.counted_s, row.known_s)
        one = {
            "engine": trace.names.of("engine", code),
            "model": trace.names.of("model", engines.model[code]),
            "slots": slots,
            "arrivals_per_s": arrivals,
            "service_s": service,
            "utilization": _ratio(row.busy_s, slots * there),
            "in_system": system,
            "little_in_system": little,
            "little_error": _apart(system, little),
            "missing_ratio": row.missing,
            "wait_s": _ratio(row.wait_s, row.one),
            "expected_wait_s": expected_wait(arrivals, service, slots),
            "attempts": int(row.one),
            "failed_ratio": _ratio(row.failed, row.one),
            "samples": int(row.samples),
            "known_s": row.known_s,
        }
        for name in _ENGINES:
            told[name].append(one[name])
    return table(told)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan


def _apart(one: float, other: float) -> float:
    return _ratio(one - other, max(one, other))


def _table_of_models(trace: Trace, held: Held, engines: Engines) -> Any:
    queues, waits = _queues(trace), _waits(trace)
    told: dict[str, list[Any]] = {name: [] for name in _MODELS}
    for code, row in enumerate(rows(_load(trace, held, engines, queues))):
        if not row.requests and code not in engines.model:
            continue
        queue, wait = queues.get(code, _NO_QUEUE), waits.get(code, _Wait())
        one = _flow(trace, row, queue, engines, code) | {
            "model": trace.names.of("model", code),
            "engines": engines.model.count(code),
            "wait_s": wait.mean_s,
            "wait_p95_s": wait.p95_s,
            "evidence": wait.evidence,
            "waiting": queue.waiting,
            "requests": int(row.requests + _unnamed(row, queue)),
            "rejected": int(row.refused + _unnamed(row, queue)),
            "waited": int(row.requests - row.refused),
        }
        for name in _MODELS:
            told[name].append(one[name])
    return table(told)


def _unnamed(row: Any, queue: _Queue) -> float:
    """Requests that the gateways refused of which no row names the model."""
    return max(queue.rejected - float(row.refused), 0.0)


def _flow(trace: Trace, row: Any, queue: _Queue, engines: Engines, model: int) -> dict[str, Any]:
    """What comes to a model against what its slots can take."""
    length_s, mean, unnamed = trace.length_s, _ratio(row.held_s, row.one), _unnamed(row, queue)
    arrivals = _ratio(row.arrived + unnamed + max(queue.in_hand - row.still, 0.0), length_s)
    peaks = read_peaks(trace, model, mean)
    here, lasting = (
        _room(row, mean, engines.slots_within(model, each.from_s, each.until_s), peaks)
        for each in (peaks.burst, peaks.lasting)
    )
    came = Came(arrivals, int(row.requests + unnamed))
    varied = math.sqrt(max(_ratio(row.held2_s, row.one) - mean**2, 0.0))
    return {
        "slots": here.slots,
        "arrivals_per_s": arrivals,
        "service_s": here.service_s,
        "capacity_per_s": here.capacity_per_s,
        "utilization": _ratio(row.busy_s, engines.slots_within(model, 0.0, length_s) * length_s),
        "knee_per_s": here.knee.per_s,
        "knee_low_per_s": here.knee.low_per_s,
        "knee_high_per_s": here.knee.high_per_s,
        "seen_per_s": peaks.freely_per_s,
        "expected_wait_s": expected_wait(_ratio(row.one, length_s), mean, here.slots),
        "served_per_s": peaks.served_per_s,
        "lasting_slots": lasting.slots,
        "lasting_service_s": lasting.service_s,
        "lasting_capacity_per_s": lasting.capacity_per_s,
        "lasting_knee_per_s": lasting.knee.per_s,
        **at_its_densest(trace, peaks, came, here.knee, _ratio(varied, mean * math.sqrt(row.one))),
        **while_it_lasts(trace, peaks, came, lasting.knee.per_s),
    }


class _Room(NamedTuple):
    """What slots can take."""

    slots: int
    service_s: float
    capacity_per_s: float
    knee: Knee


def _room(row: Any, mean: float, slots: float, peaks: Peaks) -> _Room:
    servers = max(round(slots), 1) if slots > 0 else 0
    tries = max(_ratio(row.one, row.served), 1.0)
    slow, quick = (mean * tries * (_ratio(each, row.now_s) if row.now_s else 1.0) for each in (row.most_s, row.least_s))
    service = math.sqrt(quick * slow)
    if slots > 0:
        bend = Knee(*(max(knee(each, servers), peaks.freely_per_s) for each in (slow, service, quick)))
    else:
        bend = Knee(math.nan, math.nan, math.nan)
    return _Room(servers, service, max(_ratio(slots, service), peaks.served_per_s), bend)


def _load(trace: Trace, held: Held, engines: Engines, queues: Mapping[int, _Queue]) -> Any:
    """Host table, a row a model: attempts, requests, and seconds of slots."""
    xp, length, found = trace.engine.xp, trace.length_s, len(trace.names.model)
    took = held.ended - held.slot
    of_attempts = {"one": took * 0.0 + 1.0, "held_s": took, "held2_s": took**2}
    of_attempts |= at_full_load(trace, held, engines)._asdict()
    of_attempts["busy_s"] = within(xp, held.slot, held.ended, length)
    requests = trace.requests.assign(model=models_of(trace))
    requests = requests[requests["model"] >= 0]
    names = ("model", "arrived_s", "ended_s", "engine", "status")
    model, arrived, ended, engine, status = (trace.engine.array(requests[name]) for name in names)
    last = xp.asarray([*(queues.get(code, _NO_QUEUE).last_s for code in range(found)), length])[model]
    of_requests = {"requests": arrived * 0.0 + 1.0, "arrived": (arrived >= 0) * 1.0, "served": (engine >= 0) * 1.0}
    of_requests |= {"still": ((arrived <= last) & (ended > last)) * 1.0, "refused": (status == REFUSED) * 1.0}
    known = held.model >= 0
    columns = {name: sums(xp, held.model[known], each[known], found) for name, each in of_attempts.items()}
    columns |= {name: sums(xp, model, each, found) for name, each in of_requests.items()}
    return trace.engine.host(trace.engine.frame(columns))


class _Wait(NamedTuple):
    mean_s: float = math.nan
    p95_s: float = math.nan
    evidence: tuple[str, ...] = ()
    """The longest."""


def _waits(trace: Trace) -> Mapping[int, _Wait]:
    """Of requests by model; those that were refused did not wait."""
    known = trace.requests[(trace.requests["model"] >= 0) & trace.requests["queue_s"].notna()]
    known = known[known["status"] != REFUSED][["model", "r", "queue_s"]]
    means = known.groupby("model", sort=True).agg({"queue_s": "mean"}).reset_index()
    host = trace.engine.host(trace.engine.quantiles(known, ("model",), "queue_s", (0.95,)))
    host = host.merge(trace.engine.host(means), on="model")
    longest = known.sort_values(["queue_s", "r"], ascending=False).reset_index(drop=True)
    longest = trace.engine.host(longest[longest.groupby("model", sort=False).cumcount() < MOST_EVIDENCE])
    evidence = {int(row.model): longest["r"][longest["model"] == row.model] for row in rows(host)}
    return {int(row.model): _Wait(row.queue_s, row.q95, trace.evidence(evidence[int(row.model)])) for row in rows(host)}


class _Queue(NamedTuple):
    """Of one model, in all gateways."""

    last_s: float
    in_hand: float
    """Waiting and running at the last sample, if that is of the window's end."""
    waiting: float
    """On average."""
    rejected: float


_NO_QUEUE = _Queue(math.inf, 0.0, math.nan, 0.0)


def _queues(trace: Trace) -> Mapping[int, _Queue]:
    frame = trace.queues[trace.queues["model"] >= 0].sort_values(["model", "gateway", "at_s"]).reset_index(drop=True)
    by = ["model", "gateway"]
    grown = frame["rejected"] - frame.groupby(by, sort=False)["rejected"].shift(1)
    frame = frame.assign(grown=grown.fillna(0).clip(lower=0))
    total = trace.engine.host(frame.groupby(by, sort=True).agg({"waiting": "mean", "grown": "sum"}).reset_index())
    last = frame.drop_duplicates(by, keep="last")[[*by, "at_s", "running", "waiting"]]
    last = trace.engine.host(last.rename(columns={"waiting": "waiting_last"}))
    found: dict[int, _Queue] = {}
    for row in rows(total.merge(last, on=by)):
        before = found.get(int(row.model), _Queue(math.inf, 0.0, 0.0, 0.0))
        is_late = row.at_s >= trace.length_s - max(EDGE_S, EDGE * trace.length_s)
        found[int(row.model)] = _Queue(
            min(before.last_s, row.at_s),
            before.in_hand + is_late * (max(row.waiting_last, 0) + max(row.running, 0)),
            before.waiting + row.waiting,
            before.rejected + row.grown,
        )
    return found


# --- findings


def judge(answer: Answer) -> list[Finding]:
    """`saturation`: models past their knee whose requests wait; `little`: engines that have more than is told."""
    apart = [_little(row) for row in rows(answer.tables["engines"]) if _is_apart(row)]
    return saturations(answer.tables["models"]) + apart


def _is_apart(row: Any) -> bool:
    return bool(
        row.missing_ratio > LITTLE_ERROR
        and row.in_system - row.little_in_system >= LEAST_LOST
        and row.samples >= LEAST_SAMPLES
        and row.attempts >= LEAST_REQUESTS
        and row.known_s >= LEAST_SERVICES * row.service_s
    )


def _little(row: Any) -> Finding:
    return Finding(
        kind="little",
        subject=row.engine,
        text=(
            f"{row.engine} had {digits(row.in_system)} requests in hand on average, but those that telemetry knows "
            f"come to {digits(row.little_in_system)} (arrivals times time there): {percent(row.missing_ratio)} are "
            "missing, so other figures of this engine are too low."
        ),
        advice=(
            "Either requests reach its server past the gateways and the driver, or some run longer than the window, or "
            "rows were dropped before they were read: raise `telemetry.ring_rows`."
        ),
        impact_s=0.0,
        figures={
            name: float(getattr(row, name))
            for name in ("in_system", "little_in_system", "little_error", "missing_ratio", "samples")
        },
    )
