"""Models whose slots are too few for what comes for a while: how many they need.

Judged by the fullest stretch that lasts, not by the densest: no engine is added for a burst of a second.
"""

from __future__ import annotations

import math
from typing import Any

from lltm_ray.analytics.answer import Finding, rows
from lltm_ray.analytics.erlang import expected_wait, slots_for
from lltm_ray.analytics.units import clock, count, digits, seconds

TARGET_HEADROOM = 0.3
"""What is advised: 30 % more may come before requests wait for each other, or about one engine of four may fail."""

LEAST_REQUESTS = 100
WAIT_RATIO, LONG_WAIT_RATIO = 0.1, 0.5
"""Mean wait over the service time, and its 95th percentile, from which people notice it."""
LEAST_WAIT_S, LEAST_LOST_S = 0.1, 5.0
"""Of the 95th percentile, and of all waits; less, nobody does."""


def saturations(models: Any) -> list[Finding]:
    """Models past their knee whose requests wait.

    Args:
        models: `queueing.analyze`'s table.
    """
    return [_saturation(row) for row in rows(models) if _is_full(row)]


def _is_full(row: Any) -> bool:
    is_long = row.lasting_wait_p95_s >= max(LONG_WAIT_RATIO * row.lasting_service_s, LEAST_WAIT_S)
    is_waiting = is_long and row.lasting_wait_s >= WAIT_RATIO * row.lasting_service_s and _lost_s(row) >= LEAST_LOST_S
    is_past = row.lasting_per_s > row.lasting_knee_per_s
    return bool(is_past and row.requests >= LEAST_REQUESTS and (is_waiting or row.rejected > 0))


def _needed(row: Any) -> int:
    """Slots."""
    return slots_for(row.lasting_per_s, row.lasting_service_s, TARGET_HEADROOM)


def _lost_s(row: Any) -> float:
    """Waits, less what they would be with the slots that are needed."""
    would = expected_wait(row.lasting_per_s, row.lasting_service_s, max(_needed(row), row.lasting_slots))
    return float(max((row.wait_s - would) * row.waited, 0.0))


def _saturation(row: Any) -> Finding:
    needed = _needed(row)
    each = max(row.lasting_slots / max(row.engines, 1), 1.0)
    wanted = max(math.ceil(needed / each), row.engines + 1)
    refused = f"; {count(row.rejected)} were refused" if row.rejected else ""
    return Finding(
        kind="saturation",
        subject=row.model,
        text=(
            f"{row.model} gets {digits(row.lasting_per_s)} requests a second for {seconds(row.lasting_s)}, from "
            f"{clock(row.lasting_unix_nano)} on; its {row.lasting_slots} slots serve "
            f"{digits(row.lasting_capacity_per_s)} at most, and from {digits(row.lasting_knee_per_s)} on they wait for "
            f"each other. Then they waited {seconds(row.lasting_wait_s)} on average, one in twenty "
            f"{seconds(row.lasting_wait_p95_s)} or more{refused}."
        ),
        advice=(
            f"For {TARGET_HEADROOM * 100:.0f} % of headroom it needs {needed} slots: run {wanted} engines instead of "
            f"{row.engines} (`--engines {wanted}`, or `max_engines` where they come and go), where GPUs or cores have "
            "time left for them: engines that share full ones serve no more. More slots an engine (`n_parallel`) help "
            "only then, too."
        ),
        impact_s=_lost_s(row),
        figures={
            **{name: float(getattr(row, name)) for name in ("arrivals_per_s", "lasting_per_s", "served_per_s")},
            "capacity_per_s": float(row.lasting_capacity_per_s),
            "knee_per_s": float(row.lasting_knee_per_s),
            "headroom_ratio": float(row.lasting_knee_per_s / row.lasting_per_s - 1),
            **{name: float(getattr(row, name)) for name in ("wait_s", "wait_p95_s", "rejected")},
            "slots_needed": float(needed),
            "engines_needed": float(wanted),
        },
        explains=(("waiting", "slots"), ("rejections", row.model), ("deadlines", row.model)),
        evidence=tuple(row.evidence),
    )
