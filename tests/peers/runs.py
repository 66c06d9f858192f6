"""Plays workloads on real engines through one peer."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import uvloop

from .client import Client, Reply
from .engines import Fleet, fleet, servers
from .figures import Row, summarize
from .ideal import expected_texts, ideal
from .peers import BY_NAME, Peer
from .processes import cpu_s
from .stress import STRESSES, Setting, kill_plan, measure_capacity
from .workloads import CONVERSATIONS, Conversations

SETTLED_RATIO, SETTLED_WITHIN_S = 0.3, 15.0
"""All processes of a peer, its engines included, count as started when they take less of one core for a second."""


@dataclass
class Reference:
    """What does not depend on the peer: the plans and the right answers."""

    setting: Setting
    hints: bool
    plans: dict[str, Conversations] = field(default_factory=dict)


def prepare(names: Sequence[str], setting: Setting, folder: Path, *, hints: bool) -> Reference:
    """Play each plan once, undisturbed, on one server; measure how much the engines can do."""
    found = Reference(setting, hints)
    found.plans = {
        name: make(setting.seed, quick=setting.quick) for name, make in CONVERSATIONS.items() if name in names
    }
    plans = [*found.plans.values(), *([kill_plan(setting.seed)] if "kill" in names else [])]
    with servers(folder / "reference", 1) as (server,):
        for plan in plans:
            setting.expected |= uvloop.run(expected_texts(plan, int(server.url.rpartition(":")[2])))
    if "overload" in names:
        with fleet(BY_NAME["direct"], folder / "capacity") as target:
            setting.capacity_per_s = uvloop.run(measure_capacity(target, setting))
    return found


def play(peer: Peer, names: Sequence[str], given: Reference, folder: Path) -> dict[str, Row]:
    """The chosen workloads on one peer with fresh engines.

    Raises:
        StartError: the peer or an engine cannot be started.
    """
    rows = {}
    with fleet(peer, folder / peer.name.replace("/", "-")) as target:
        settle()
        for name in names:
            rows[name] = uvloop.run(_play(name, target, given))
    return rows


def settle() -> None:
    """Wait until what was started has finished: its last imports would take the cores of the first requests."""
    deadline, used_s = time.monotonic() + SETTLED_WITHIN_S, cpu_s(os.getpid())
    while time.monotonic() < deadline:
        time.sleep(1.0)
        before_s, used_s = used_s, cpu_s(os.getpid())
        if used_s - before_s < SETTLED_RATIO:
            return


async def _play(name: str, target: Fleet, given: Reference) -> Row:
    client, cpu, before = Client(target.ports, given.hints), front_cpu_s(target), target.total("prompt_tokens_total")
    if name in STRESSES:
        row = await STRESSES[name](target, client, given.setting)
    else:
        began = time.monotonic()
        await given.plans[name].play(client, given.setting.expected)
        row = summarize(client.replies, time.monotonic() - began)
    client.close()
    row["front_us_per_token"] = per_token_us(front_cpu_s(target) - cpu, client.replies)
    if name not in STRESSES:
        row["computed_tokens"] = target.total("prompt_tokens_total") - before
        row["reuse"] = 1 - row["computed_tokens"] / row["prompt_tokens"] if row["prompt_tokens"] else None
        possible, total = ideal(target.servers[0], client.replies)
        row["ideal"] = possible / total if total else None
    return row


def front_cpu_s(target: Fleet) -> float:
    """CPU time of the front so far."""
    return cpu_s(target.front_pid, target.peer.keep) if target.front_pid else 0.0


def per_token_us(spent_s: float, replies: Sequence[Reply]) -> float | None:
    """Microseconds for each token that the client got."""
    tokens = sum(reply.pieces for reply in replies)
    return spent_s / tokens * 1e6 if tokens else None
