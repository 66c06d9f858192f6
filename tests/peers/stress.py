"""Workloads that hurt: long prefills beside short decodes, more load than there is room, clients that leave, a kill."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from .client import Client, Reply
from .engines import SLOTS, Fleet, Server
from .figures import Row, percentiles, summarize
from .workloads import Conversations, Session, filler, key

DEADLINE_S = 2.0
"""An answer that comes later does not count as goodput."""
OVERLOAD = 1.5


@dataclass
class Setting:
    """What all of them are told."""

    seed: int
    quick: bool
    capacity_per_s: float = 0.0
    """Requests a second that these engines answer without a front, all slots busy; measured once in a session."""
    expected: dict[str, str] = field(default_factory=dict)

    def seconds(self, full: float) -> float:
        """Shorter when it must be quick."""
        return full / 2 if self.quick else full

    def random(self, name: str) -> random.Random:
        """The same for all peers."""
        return random.Random(f"{name} {self.seed}")


def _ask(rng: random.Random, number: int, characters: int, tokens: int, kind: str = "") -> Reply:
    return Reply(number, 0, [{"role": "user", "content": filler(rng, characters)}], tokens, kind)


async def _loop_until(deadline: float, step: Callable[[], Awaitable[object]]) -> None:
    while time.monotonic() < deadline:
        await step()


async def mixed(target: Fleet, client: Client, setting: Setting) -> Row:
    """Six users stream short answers; every 0.6 s a prompt of 3,000 tokens comes. What do the streams notice?"""
    rng, began = setting.random("mixed"), time.monotonic()
    deadline = began + setting.seconds(10.0)
    long_ones = []

    async def feed() -> None:
        while time.monotonic() < deadline:
            long_ones.append(asyncio.create_task(client.chat(_ask(rng, 0, 3000, 4, "long"))))
            await asyncio.sleep(0.6)

    async def short() -> object:
        return await client.chat(_ask(rng, 0, 60, 64, "short"))

    await asyncio.gather(feed(), *(_loop_until(deadline, short) for _ in range(6)))
    await asyncio.gather(*long_ones)
    short_ones = [reply for reply in client.replies if reply.kind == "short"]
    row = summarize(short_ones, time.monotonic() - began)
    row["longest_gap_ms"] = percentiles(reply.gap_s for reply in short_ones if reply.ok)
    told = [reply for reply in client.replies if reply.kind == "long"]
    row["long_ttft_ms"] = percentiles(reply.ttft_s for reply in told if reply.ttft_s is not None)
    row["long_ok"] = [sum(reply.ok for reply in told), len(told)]
    return row


async def measure_capacity(target: Fleet, setting: Setting) -> float:
    """Requests a second with every slot of every engine busy."""
    rng, began = setting.random("capacity"), time.monotonic()
    clients = [Client((port,)) for port in target.ports]

    def loop(client: Client) -> Awaitable[None]:
        return _loop_until(began + 4.0, lambda: client.chat(_ask(rng, 0, 300, 32)))

    await asyncio.gather(*(loop(client) for client in clients for _ in range(SLOTS)))
    return sum(reply.ok for client in clients for reply in client.replies) / (time.monotonic() - began)


async def overload(target: Fleet, client: Client, setting: Setting) -> Row:
    """Requests come at 1.5 times what the engines can do, whether earlier ones are answered or not."""
    rng, began = setting.random("overload"), time.monotonic()
    deadline, rate, due = began + setting.seconds(12.0), OVERLOAD * setting.capacity_per_s, began
    tasks: list[asyncio.Task[Reply]] = []
    while due < deadline:
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        tasks.append(asyncio.create_task(client.chat(_ask(rng, len(tasks), 300, 32))))
        due += rng.expovariate(rate)
    lasted_s = time.monotonic() - began
    await asyncio.gather(*tasks)
    row = summarize(client.replies, time.monotonic() - began)
    rejected = [reply for reply in client.replies if reply.status in (429, 503, 529)]
    in_time = sum(reply.ok and reply.took_s <= DEADLINE_S for reply in client.replies)
    row |= {"offered_per_s": len(tasks) / lasted_s, "goodput_per_s": in_time / lasted_s, "rejected": len(rejected)}
    row["late"] = sum(reply.ok and reply.took_s > DEADLINE_S for reply in client.replies)
    row["reject_ms"] = percentiles(reply.took_s for reply in rejected)
    return row


async def aborts(target: Fleet, client: Client, setting: Setting) -> Row:
    """Sixteen users; every other request is left by its client after eight of 256 tokens."""
    rng, began = setting.random("aborts"), time.monotonic()
    before, deadline = target.total("tokens_predicted_total"), began + setting.seconds(8.0)

    async def user(number: int) -> None:
        turn = number
        while time.monotonic() < deadline:
            turn += 1
            await client.chat(_ask(rng, number, 100, 256), abort_after=8 if turn % 2 else None)

    await asyncio.gather(*(user(number) for number in range(16)))
    left_at = time.monotonic()
    while sum(server.busy() for server in target.servers) and time.monotonic() < left_at + 30:
        await asyncio.sleep(0.02)
    row = summarize([reply for reply in client.replies if not reply.aborted], left_at - began)
    row["aborted"] = sum(reply.aborted for reply in client.replies)
    made = target.total("tokens_predicted_total") - before
    row["wasted_tokens"] = made - sum(reply.pieces for reply in client.replies)
    row["slots_free_s"] = time.monotonic() - left_at
    return row


KILL_TOKENS = 600


def kill_plan(seed: int) -> Conversations:
    """One question each."""
    rng = random.Random(f"kill {seed}")
    return Conversations(tuple(Session(i, 0.0, "", (filler(rng, 200),), (0.0,), KILL_TOKENS) for i in range(32)))


async def kill(target: Fleet, client: Client, setting: Setting) -> Row:
    """Sixteen streams; the busiest engine is killed with -9 when one has 50 of 600 tokens; then sixteen more."""
    began, plan = time.monotonic(), kill_plan(setting.seed)
    replies = [
        Reply(each.number, 0, [{"role": "user", "content": each.turns[0]}], KILL_TOKENS) for each in plan.sessions
    ]
    for reply in replies:
        reply.expected = setting.expected.get(key(reply.messages))
    tasks = [asyncio.create_task(client.chat(reply)) for reply in replies[:16]]
    while not any(reply.pieces >= 50 for reply in replies) and not all(task.done() for task in tasks):
        await asyncio.sleep(0.005)
    caught, victim = await _busiest(target)
    os.kill(victim.pid, signal.SIGKILL)
    await asyncio.sleep(0.2)
    await asyncio.gather(*tasks, *(client.chat(reply) for reply in replies[16:]))
    row = summarize(replies, time.monotonic() - began)
    exact = [reply.ok and reply.text == reply.expected for reply in replies]
    row["caught"] = caught
    row["exact"] = [sum(exact[:16]), sum(exact[16:])]
    row["whole"] = [sum(reply.ok for reply in replies[:16]), sum(reply.ok for reply in replies[16:])]
    row["longest_gap_ms"] = percentiles(reply.gap_s for reply in replies if reply.ok)
    return row


async def _busiest(target: Fleet) -> tuple[int, Server]:
    counts = await asyncio.gather(*(asyncio.to_thread(server.busy) for server in target.servers))
    return max(zip(counts, target.servers, strict=True), key=lambda pair: pair[0])


STRESSES: dict[str, Callable[[Fleet, Client, Setting], Awaitable[Row]]] = {
    "mixed": mixed,
    "overload": overload,
    "aborts": aborts,
    "kill": kill,
}
"""`kill` last: it leaves an engine dead."""
