"""Conversations that grow, over four engines, through each router in turn."""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import uvloop

from lltm_ray.config import LLAMA_CPP_SIMILARITY_RATIO

from .client import Client, Reply
from .engines import Server
from .figures import Row, percentiles
from .gpu_fleet import router, servers
from .gpu_run import CHAT, ENGINES, Run, Scale, filler, told, within
from .processes import StartError, cpu_s
from .workloads import Conversations, Session


def multi_turn(run: Run) -> None:
    """Every router in turn with fresh engines; rows `SESSIONS/ROUTER`, one for each round."""
    names = ["residency", "least-loaded", *(["vllm-router"] if run.host.vllm_router else [])]
    for number in range(run.scale.rounds):
        order = names[number % len(names) :] + names[: number % len(names)]
        for count in run.scale.sessions:
            for name in order:
                _attempt(run, f"{count}/{name}", _conversations, name, count, run.seed + number)


def _attempt(run: Run, row: str, play: Callable[..., Row], *given: Any) -> None:
    """One that fails does not take the rest with it; the end of the part's time does."""
    _ = run.left_s
    try:
        run.save(row, play(run, *given))
    except (StartError, OSError, ValueError) as error:
        if isinstance(error, TimeoutError):
            raise
        run.save(row, {"failed": f"{type(error).__name__}: {error}"[:600]})


def _conversations(run: Run, name: str, count: int, seed: int) -> Row:
    scale = run.scale
    config = run.host.config(scale.slots, scale.slot_tokens, scale.cache_ram_mib)
    if name != "residency":  # llama.cpp's default, as in a fleet whose requests name no slot
        config = replace(config, slot_prompt_similarity=LLAMA_CPP_SIMILARITY_RATIO)
    folder = run.folder / f"multi-{name}-{count}-{seed}"
    began = time.monotonic()
    with (
        servers(run.host, config, ENGINES, folder) as behind,
        router(name, run.host, config, behind, folder) as front,
    ):
        _warm(behind, random.Random(f"warm {seed}"), scale)
        plan = _plan(random.Random(f"multi {count} {seed}"), behind[0], count, scale)
        start_s = time.monotonic() - began
        before, spent = _counters(behind), cpu_s(front.process.pid)
        client, began = Client((front.port,), extra=CHAT), time.monotonic()
        cut = uvloop.run(within(plan.play(client), client, run.left_s))
        row = _conversation_row(client.replies, time.monotonic() - began, scale.turn_tokens[2])
        spent = cpu_s(front.process.pid) - spent
        row |= _fleet_row(before, _counters(behind), client.replies)
        row["front_us_per_token"] = spent / row["output_tokens"] * 1e6 if row["output_tokens"] else None
        row |= {"cut": cut, "start_s": start_s} | (told(front) if name != "vllm-router" else {})
        return row


def _warm(behind: tuple[Server, ...], rng: random.Random, scale: Scale) -> None:
    """Each engine has seen one long prompt and some decoding before anything is measured."""
    text = filler(rng, behind[0], scale.turn_tokens[0])

    async def ask() -> None:
        clients = [Client((int(server.url.rpartition(":")[2]),), extra=CHAT) for server in behind]
        asks = [
            client.chat(Reply(0, 0, [{"role": "user", "content": f"{number} {text}"}], 8))
            for client in clients
            for number in range(2)
        ]
        await asyncio.gather(*asks)
        for client in clients:
            client.close()

    uvloop.run(ask())


def _plan(rng: random.Random, server: Server, count: int, scale: Scale) -> Conversations:
    first, later, output = scale.turn_tokens
    sessions = [
        Session(
            number=number,
            start_s=rng.uniform(0.0, scale.think_s[1]),
            system="",
            turns=tuple(filler(rng, server, later if turn else first) for turn in range(scale.turns)),
            thinks_s=(0.0, *(rng.uniform(*scale.think_s) for _ in range(scale.turns - 1))),
            max_tokens=output,
        )
        for number in range(count)
    ]
    return Conversations(tuple(sessions))


def _counters(behind: tuple[Server, ...]) -> list[dict[str, float]]:
    return [server.counters() for server in behind]


def _conversation_row(replies: list[Reply], wall_s: float, wanted: int) -> Row:
    good = [reply for reply in replies if reply.ok and reply.output_tokens]
    later = [reply for reply in good if reply.turn]
    tokens = sum(reply.output_tokens or 0 for reply in good)
    return {
        "requests": len(replies),
        "ok": len(good),
        "errors": sorted({reply.error for reply in replies if reply.error})[:3],
        "wrong_length": sum(reply.output_tokens != wanted for reply in good),
        "ttft_ms": percentiles(reply.ttft_s for reply in good if reply.ttft_s is not None),
        "later_ttft_ms": percentiles(reply.ttft_s for reply in later if reply.ttft_s is not None),
        "total_ms": percentiles(reply.took_s for reply in good),
        "tokens_per_s": tokens / wall_s,
        "output_tokens": tokens,
        "prompt_tokens": sum(reply.prompt_tokens or 0 for reply in good),
        "cached_tokens": sum(reply.cached_tokens or 0 for reply in good),
        "possible_tokens": _possible(good),
        "wall_s": wall_s,
    }


def _possible(good: list[Reply]) -> int:
    """Tokens that its own session's earlier turn left for each turn, if the reply comes back token for token."""
    left = {(reply.session, reply.turn): (reply.prompt_tokens or 0) + (reply.output_tokens or 0) - 1 for reply in good}
    return sum(min((reply.prompt_tokens or 1) - 1, left.get((reply.session, reply.turn - 1), 0)) for reply in good)


def _fleet_row(before: list[dict[str, float]], after: list[dict[str, float]], replies: list[Reply]) -> Row:
    """By the servers' own counters."""
    rises = [
        {name: late.get(name, 0.0) - early.get(name, 0.0) for name in ("prompt_tokens_total", "tokens_predicted_total")}
        for early, late in zip(before, after, strict=True)
    ]
    made = [rise["tokens_predicted_total"] for rise in rises]
    told = sum(reply.prompt_tokens or 0 for reply in replies)
    computed = sum(rise["prompt_tokens_total"] for rise in rises)
    return {
        "computed_tokens": computed,
        "reuse": 1 - computed / told if told else None,
        "busiest_over_mean": max(made) / statistics.fmean(made) if sum(made) else None,
    }
