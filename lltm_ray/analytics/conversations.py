"""Conversations: how often a turn went to another engine than the turn before, and what that cost.

What belongs together tells `turns`. Each token that was computed in vain counts once: what a turn lost by moving counts
here, as `affinity`; what was computed again though no turn moved (prompts that conversations share, caches that forgot)
counts in `prefix`, as `wasted prefill`. A move away from an engine that was busier than the one chosen is no fault: it
bought time. Only needless ones are judged.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lltm_ray.analytics.answer import MOST_EVIDENCE, Answer, Finding, rows, table
from lltm_ray.analytics.frames import Frame, codes
from lltm_ray.analytics.trace import Trace
from lltm_ray.analytics.turns import turns

NAME = "conversations"
LEAST_MOVES = 10
"""Needless moves that lost tokens; fewer are chance."""
LEAST_RATIO = 0.1
"""Of later turns; routing that weighs load against caches makes a third of that."""
LEAST_LOST_RATIO = 0.01
"""Of the seconds that later turns took; less, nobody notices."""
LEAST_LOST_S = 1.0
_TOP, _MOST_PAIRS = 50, 200


def analyze(trace: Trace) -> Answer:
    """Tables `conversations`, those of at least two requests, and `moves`; figures are of later turns."""
    found = turns(trace)
    later = found[found["previous"] >= 0]
    tables = {"conversations": _conversations(trace, found), "moves": _moves(trace, later)}
    return Answer(tables, _figures(trace, later) | {"conversations": float(found["conversation"].nunique())})


def judge(answer: Answer) -> list[Finding]:
    """Kind `affinity`: turns moved without need, and what their conversation had cached was computed again."""
    told = answer.figures
    costly, lost_s = told["needless_moves"], told["needless_lost_s"]
    if costly < max(LEAST_MOVES, LEAST_RATIO * told["turns"]):
        return []
    if lost_s < max(LEAST_LOST_S, LEAST_LOST_RATIO * told["turns_s"]):
        return []
    evidence = [each for row in rows(answer.tables["conversations"]) for each in row.evidence[:1]]
    return [
        Finding(
            kind="affinity",
            subject="conversations",
            text=(
                f"{costly:,.0f} of {told['turns']:,.0f} later turns of conversations went to another engine than the "
                f"turn before, though that one was no busier, and what it had cached was computed again: "
                f"{told['needless_lost_tokens']:,.0f} tokens, {lost_s:,.1f} s of prefill."
            ),
            advice=_advice(told),
            impact_s=lost_s,
            figures={name: value for name, value in told.items() if value == value},  # noqa: PLR0124
            evidence=tuple(evidence[:MOST_EVIDENCE]),
        )
    ]


def _advice(told: Mapping[str, float]) -> str:
    if told["residency_ratio"] < 0.5:
        return 'Set gateway.policy = "residency": a turn then goes to where its conversation is cached.'
    if told["named_ratio"] < 0.5:
        return "Let clients name their conversation in the header X-Session-ID: its next turn prefers the same engine."
    return (
        'gateway.policy is "residency" and conversations have names: look at why the router took another engine with '
        "lltm-ray explain, and see whether restarts or drains of engines had emptied their caches."
    )


def _figures(trace: Trace, later: Frame) -> dict[str, float]:
    engine, xp, count = trace.engine, trace.engine.xp, len(later)
    r = engine.array(later["r"])
    policies = xp.asarray([code for code, name in enumerate(trace.names.policy) if name == "residency"])
    by_residency = xp.isin(engine.array(trace.requests["policy"])[r], policies)
    is_named = engine.array(trace.requests["conversation"])[r] >= 0
    costly = later[later["lost"] > 0]
    needless = costly[costly["is_needless"] == 1]
    moves = int(later["is_moved"].sum())
    return {
        "turns": float(count),
        "turns_s": float(engine.array(trace.requests["total_s"])[r].sum()),
        "moves": float(moves),
        "moved_ratio": moves / count if count else math.nan,
        "slot_moves": float(later["has_other_slot"].sum()),
        "costly_moves": float(len(costly)),
        "lost_tokens": float(costly["lost"].sum()),
        "lost_s": float(costly["lost_s"].sum()),
        "needless_moves": float(len(needless)),
        "needless_lost_tokens": float(needless["lost"].sum()),
        "needless_lost_s": float(needless["lost_s"].sum()),
        "residency_ratio": float(by_residency.sum()) / count if count else math.nan,
        "named_ratio": float(is_named.sum()) / count if count else math.nan,
    }


def _conversations(trace: Trace, found: Frame) -> Any:
    """Those that moves have cost most."""
    how = {"r": "count", "first": "min", "is_moved": "sum", "lost": "sum", "lost_s": "sum"}
    sums = found.assign(first=found["r"]).groupby("conversation", sort=True).agg(how).reset_index()
    sums = sums[sums["r"] > 1].sort_values(["lost_s", "is_moved", "r", "first"], ascending=[False, False, False, True])
    top = trace.engine.host(sums.head(_TOP))
    members = found[found["conversation"].isin(top["conversation"].tolist())]
    shown = dearest(trace, members, "conversation", ["is_needless", "lost_s"])
    names = trace.engine.array(trace.requests["conversation"])[trace.engine.xp.asarray(codes(top["first"]))]
    return table(
        {
            "conversation": [
                trace.names.of("conversation", int(code)) or str(trace.request_ids[first])
                for code, first in zip(names.tolist(), top["first"].tolist(), strict=True)
            ],
            "turns": top["r"].tolist(),
            "moves": top["is_moved"].tolist(),
            "lost_tokens": top["lost"].tolist(),
            "lost_s": top["lost_s"].tolist(),
            "evidence": [shown.get(label, ()) for label in top["conversation"].tolist()],
        }
    )


def dearest(trace: Trace, found: Frame, by: str, cost: list[str]) -> dict[int, tuple[str, ...]]:
    """Trace ids of the requests, a row each with its `r`, that cost most, for each value of `by`.

    Args:
        trace: where they are from.
        found: on the trace's engine.
        by: a code column; each has few values, or few rows that cost.
        cost: columns to go by, the most important first; the last one is not 0 for a request that counts.
    """
    dear = found[found[cost[-1]] > 0]
    dear = dear.sort_values([by, *cost, "r"], ascending=[True, *(False for _ in cost), True])
    host = trace.engine.host(dear[dear.groupby(by).cumcount() < MOST_EVIDENCE])
    shown: dict[int, tuple[str, ...]] = {}
    for value, trace_id in zip(host[by].tolist(), trace.evidence(host["r"].tolist()), strict=True):
        shown[value] = (*shown.get(value, ()), trace_id)
    return shown


def _moves(trace: Trace, later: Frame) -> Any:
    moved = later[later["is_moved"] == 1]
    how = {"r": "count", "lost": "sum", "lost_s": "sum"}
    sums = moved.groupby(["from_engine", "engine"], sort=True).agg(how).reset_index()
    sums = sums.sort_values(["lost_s", "r", "from_engine", "engine"], ascending=[False, False, True, True])
    top = trace.engine.host(sums.head(_MOST_PAIRS))
    return table(
        {
            "from_engine": trace.names.decode("engine", top["from_engine"]),
            "to_engine": trace.names.decode("engine", top["engine"]),
            "turns": top["r"].tolist(),
            "lost_tokens": top["lost"].tolist(),
            "lost_s": top["lost_s"].tolist(),
        }
    )
