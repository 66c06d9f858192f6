"""One of four engines killed in the middle of greedy streams: is every text the undisturbed one?"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from dataclasses import dataclass

import uvloop

from .client import Client, Reply
from .engines import Server
from .figures import Row
from .gpu_fleet import Front, router, servers
from .gpu_run import CHAT, ENGINES, Run, filler, told, within


def kill(run: Run) -> None:
    """The same greedy streams three times, the last time with a kill: row `kill`."""
    scale = run.scale
    prompt, output = scale.kill_tokens
    tokens = max(512, 4 * (prompt + output) // 2)
    config = run.host.config(scale.kill_slots, tokens, 0)
    folder = run.folder / "kill"
    with (
        servers(run.host, config, ENGINES, folder) as behind,
        router("residency", run.host, config, behind, folder) as front,
    ):
        rng = random.Random(f"kill {run.seed}")
        texts = [filler(rng, behind[0], prompt) for _ in range(scale.kill_streams)]
        rounds: list[_Played] = []
        for _ in range(3):
            kill_after_s = 0.6 * rounds[1].took_s if len(rounds) == 2 else None
            rounds.append(uvloop.run(_streams(front, behind, texts, output, run.left_s, kill_after_s)))
            run.save("kill", _kill_row(rounds, output) | {"ledger": told(front)["ledger"]})


@dataclass
class _Played:
    replies: list[Reply]
    at_kill: list[int] | None = None
    """Characters that each had by then."""
    busy: int = 0
    """Streams on the engine that was killed."""
    took_s: float = 0.0
    longest_gap_s: float = 0.0


async def _streams(
    front: Front, behind: tuple[Server, ...], texts: list[str], tokens: int, limit_s: float, kill_after_s: float | None
) -> _Played:
    """All of them at once; with a limit, the busiest engine is killed when one has 40 % of its tokens, or then."""
    client = Client((front.port,), extra=CHAT)
    replies = [Reply(i, 0, [{"role": "user", "content": text}], tokens) for i, text in enumerate(texts)]
    played, began = _Played(replies), time.monotonic()

    async def play() -> None:
        tasks = [asyncio.create_task(client.chat(reply)) for reply in replies]
        if kill_after_s is not None:
            while time.monotonic() < began + kill_after_s and all(reply.pieces < 0.4 * tokens for reply in replies):
                await asyncio.sleep(0.002)
            counts = await asyncio.gather(*(asyncio.to_thread(server.busy) for server in behind))
            played.busy, victim = max(zip(counts, behind, strict=True), key=lambda pair: pair[0])
            os.kill(victim.pid, signal.SIGKILL)
            played.at_kill = [len(reply.text) for reply in replies]
        await asyncio.gather(*tasks)

    await within(play(), client, limit_s)
    played.took_s = time.monotonic() - began
    played.longest_gap_s = max((reply.gap_s for reply in replies), default=0.0)
    return played


def _kill_row(rounds: list[_Played], tokens: int) -> Row:
    row: Row = {"streams": len(rounds[0].replies), "undisturbed_broken": _broken(rounds[0].replies, tokens)}
    if len(rounds) > 1:
        row["noise"] = _compare(rounds[0].replies, rounds[1].replies, tokens)
        row["undisturbed_longest_gap_s"] = rounds[1].longest_gap_s
    if len(rounds) > 2:
        struck = rounds[2]
        row["killed"] = _compare(rounds[0].replies, struck.replies, tokens)
        row["killed_against_second"] = _compare(rounds[1].replies, struck.replies, tokens)
        either = zip(rounds[0].replies, rounds[1].replies, struck.replies, strict=True)
        row["identical_to_either"] = sum(c.ok and c.text in (a.text, b.text) for a, b, c in either)
        row["differ_from"] = _places(rounds[0].replies, struck)
        row["unfinished_at_kill"] = sum(
            had < len(b.text) for had, b in zip(struck.at_kill or [], struck.replies, strict=False)
        )
        row["on_the_victim"], row["longest_gap_s"] = struck.busy, struck.longest_gap_s
        row["errors"] = sorted({reply.error for reply in struck.replies if reply.error})[:3]
    return row


def _broken(replies: list[Reply], tokens: int) -> int:
    return sum(not reply.ok or reply.output_tokens != tokens for reply in replies)


def _compare(expected: list[Reply], got: list[Reply], tokens: int) -> dict[str, int]:
    """Broken: not ended well, or not as many tokens as asked for."""
    broken = _broken(got, tokens)
    same = sum(b.ok and b.output_tokens == tokens and a.text == b.text for a, b in zip(expected, got, strict=True))
    return {"identical": same, "different": len(got) - broken - same, "broken": broken}


def _places(expected: list[Reply], struck: _Played) -> dict[str, int]:
    """Where differing texts part: before the kill it cannot be the failover's doing."""
    found = {"before the kill": 0, "after it": 0}
    for a, b, had in zip(expected, struck.replies, struck.at_kill or [0] * len(expected), strict=True):
        if b.ok and a.text != b.text:
            found["before the kill" if _shared(a.text, b.text) < had else "after it"] += 1
    return found


def _shared(one: str, other: str) -> int:
    pairs = zip(one, other, strict=False)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
