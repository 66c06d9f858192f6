"""Batches of greedy streams through a gateway, one engine killed in the middle of each, and what every client got."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gateway_harness import Engine, Gateway, real_engine

from lltm_ray.llamacpp.metrics import ServerMetrics, read_metrics
from lltm_ray.models.random_weights import RandomShape, write_random
from lltm_ray.routing.ledger import Drift, Ledger

CHAT, TEXT, NATIVE = ROUTES = ("/v1/chat/completions", "/v1/completions", "/completion")
ENGINES, SLOTS = 3, 8
KINDS = ("plain", "stop", "bytes", "penalties")
_WORDS = ("tell", "me", "of", "rivers", "and", "of", "the", "sea", "in", "winter", "or", "why", "birds", "sing")


@dataclass(frozen=True)
class Wish:
    """One request."""

    path: str
    kind: str
    body: dict[str, Any]


@dataclass
class Got:
    """What one client made of its stream: all that must not depend on what happened behind the gateway."""

    text: str = ""
    ends: list[Any] = field(default_factory=list)
    tokens: int = 0
    """Generated tokens, as the last event counts them."""
    prompt_tokens: int = 0
    id: str = field(default="", compare=False)
    engine: str = field(default="", compare=False)
    events: int = field(default=0, compare=False)
    error: str = ""


def write_model(path: Path) -> Path:
    """The random model with its queries and keys scaled down.

    As it is, a rounding error grows to another greedy text now and then as other requests share the batch, without any
    engine's death, and texts could not be compared.
    """
    write_random(path, RandomShape(n_ctx=32_768))
    reader = gguf.GGUFReader(path, "r+")
    for tensor in reader.tensors:
        if "attn_q" in tensor.name or "attn_k" in tensor.name:
            np.multiply(tensor.data, 0.4, out=tensor.data)
    reader.data.flush()
    return path


def wishes(count: int, seed: int = 1) -> list[Wish]:
    """Chats, completions and native completions in turn, each kind of each."""
    chance = random.Random(seed)
    return [_wish(ROUTES[n % 3], KINDS[n // 3 % 4], n, chance) for n in range(count)]


def _wish(path: str, kind: str, number: int, chance: random.Random) -> Wish:
    prompt = f"{number}: " + " ".join(chance.choices(_WORDS, k=chance.randrange(4, 60)))
    body: dict[str, Any] = {"stream": True, "temperature": 0, "seed": 1, "ignore_eos": True}
    body |= {"messages": [{"role": "user", "content": prompt}]} if path == CHAT else {"prompt": prompt}
    limit = chance.randrange(60, 120) if kind == "bytes" else chance.randrange(120, 260)
    body["n_predict" if path == NATIVE else "max_tokens"] = limit
    if kind == "bytes":  # the random model's byte tokens follow three special ones
        body |= {"logit_bias": [[3 + byte, 15] for byte in "é€".encode()], "repeat_penalty": 1.3}
    if kind == "penalties":
        body |= {"repeat_penalty": 1.5, "repeat_last_n": 64, "presence_penalty": 1.0}
    return Wish(path, kind, body)


async def ask(gate: Gateway, wish: Wish, got: Got) -> Got:
    """Read one stream to its end, or to what broke it."""
    try:
        async with gate.http.post(gate.url + wish.path, json=wish.body) as reply:
            got.id, got.engine = reply.headers["x-request-id"], reply.headers.get("x-lltm-engine", "")
            if reply.status != 200:
                got.error = f"{reply.status} {await reply.text()}"
                return got
            async for line in reply.content:
                if line.strip():
                    _read(got, wish.path, line)
    except Exception as error:
        got.error = repr(error)
    return got


def _read(got: Got, path: str, line: bytes) -> None:
    assert line.startswith(b"data: "), line
    if line == b"data: [DONE]\n":
        got.ends.append("[DONE]")
        return
    event = json.loads(line[6:])
    got.events += 1
    if "timings" in event:
        got.tokens = event["timings"]["predicted_n"]
        got.prompt_tokens = event["timings"]["cache_n"] + event["timings"]["prompt_n"]
    if path == NATIVE:
        got.text += event["content"]
        if event["stop"]:
            got.ends.append((event["stop_type"], event["stopping_word"]))
        return
    for choice in event["choices"]:
        assert not choice.get("logprobs")
        got.text += choice.get("text") or choice.get("delta", {}).get("content") or ""
        if choice["finish_reason"]:
            got.ends.append(choice["finish_reason"])


class Pack:
    """Real servers that are killed and started anew."""

    def __init__(self, model: Path, folder: Path, *, engines: int = ENGINES) -> None:
        self._model, self._folder = model, folder
        self._stacks: dict[str, ExitStack] = {}
        self.engines: dict[str, Engine] = {}
        self.starts = 0
        for number in range(engines):
            self.start(f"e{number}")

    def start(self, name: str) -> None:
        """Start an engine; blocks until it serves."""
        stack = ExitStack()
        folder = self._folder / f"{name}-{self.starts}"
        folder.mkdir()
        self.starts += 1
        self.engines[name] = stack.enter_context(real_engine(name, self._model, folder, slots=SLOTS))
        self._stacks[name] = stack

    def kill(self, name: str) -> None:
        """With SIGKILL, at once."""
        self.engines[name].process.kill()

    async def restart(self, gate: Gateway, name: str) -> None:
        """Start a killed engine again and tell the router, as the directory would."""
        self._stacks[name].close()
        await asyncio.to_thread(self.start, name)
        gate.router.update(engine.info for engine in self.engines.values())

    def close(self) -> None:
        for stack in self._stacks.values():
            stack.close()


async def undisturbed(gate: Gateway, asked: Sequence[Wish]) -> tuple[list[Wish], list[Got]]:
    """What each client gets when nothing happens; stop strings are taken from the middle of what came without them.

    A text that differs between two undisturbed runs has two next tokens as likely as each other, nearer than rounding:
    its request is left out.
    """
    first = await _all(gate, asked)
    final = [_with_stop(wish, got) for wish, got in zip(asked, first, strict=True)]
    second = await _all(gate, final)
    stable = [at for at, wish in enumerate(final) if "stop" in wish.body or first[at].text == second[at].text]
    return [final[at] for at in stable], [second[at] for at in stable]


async def is_tie(gate: Gateway, wish: Wish, want: Got) -> bool:
    """Whether undisturbed runs differ, too: two next tokens were as likely as each other, nearer than rounding.

    What is rounded how depends on where a prompt's computation was divided and on who shared the batch; so all of these
    are tried.
    """
    bodies = [wish.body | {"cache_prompt": cached} for cached in (False, True)]
    for at_once in (1, 2, 5):
        for body in bodies:
            gots = await _all(gate, [Wish(wish.path, wish.kind, body)] * at_once)
            if any(got.text != want.text for got in gots):
                return True
    return False


async def _all(gate: Gateway, asked: Sequence[Wish]) -> list[Got]:
    return list(await asyncio.gather(*(ask(gate, wish, Got()) for wish in asked)))


def _with_stop(wish: Wish, got: Got) -> Wish:
    at = len(got.text) * 2 // 3
    if wish.kind != "stop" or at < 3:
        return wish
    return Wish(wish.path, wish.kind, wish.body | {"stop": [got.text[at : at + 3], "\x00\x00"]})


async def batch_with_a_death(
    gate: Gateway, pack: Pack, asked: Sequence[Wish], victim: str, *, events: int = 20
) -> list[Got]:
    """All at once; the victim is killed when one of its streams is well on its way."""
    gots = [Got() for _ in asked]
    tasks = [asyncio.ensure_future(ask(gate, *pair)) for pair in zip(asked, gots, strict=True)]
    while not all(task.done() for task in tasks):
        if any(got.engine == victim and got.events >= events and not got.ends for got in gots):
            pack.kill(victim)
            break
        await asyncio.sleep(0.001)
    await asyncio.gather(*tasks)
    return gots


@dataclass
class Tally:
    """What a run comes to; all but the first three are expected to be 0."""

    streams: int = 0
    kills: int = 0
    continued: int = 0
    wrong: int = 0
    """Clients whose text, end or counts differ from the undisturbed run's."""
    untouched: int = 0
    """Of those, ones that saw nothing of the death: another text from one engine is the model's own rounding."""
    ties: int = 0
    """Of those, ones whose text comes out otherwise without any death, too; see `is_tie`."""
    errors: int = 0
    lost_tokens: int = 0
    doubled_tokens: int = 0
    missing: int = 0
    """Requests that the ledger does not know."""
    miscounted: int = 0
    """Requests whose delivered tokens are not what the client got."""
    unbalanced: int = 0
    drift_tokens: int = 0

    @property
    def is_clean(self) -> bool:
        """Nothing is wrong, and something was tried."""
        off = (self.wrong - self.untouched - self.ties, self.errors, self.lost_tokens, self.doubled_tokens)
        return self.continued > 0 and not any((*off, self.missing, self.miscounted, self.unbalanced, self.drift_tokens))

    async def find_ties(self, gate: Gateway, ledger: Ledger, seen: Sequence[tuple[Wish, Got, Got]]) -> None:
        """Of the wrong texts, those that tell nothing."""
        for wish, want, got in seen:
            attempts = (ledger.explain(got.id) or {}).get("attempts", ())
            if len(attempts) > 1 and got != want and not got.error and got.tokens == want.tokens:
                self.ties += await is_tie(gate, wish, want)

    def compare(self, ledger: Ledger, wanted: Sequence[Got], gots: Sequence[Got]) -> None:
        """Clients against the undisturbed run."""
        for want, got in zip(wanted, gots, strict=True):
            self.streams += 1
            if got != want:
                self.wrong += 1
                attempts = (ledger.explain(got.id) or {}).get("attempts", ())
                self.untouched += len(attempts) == 1 and not got.error and got.tokens == want.tokens
            self.errors += bool(got.error)
            self.lost_tokens += max(0, want.tokens - got.tokens)
            self.doubled_tokens += max(0, got.tokens - want.tokens)

    def check_ledger(self, ledger: Ledger, gots: Sequence[Got]) -> None:
        """Every request is in the account, with what its client got."""
        known = {entry["request_id"]: entry for entry in ledger.find(limit=10_000)}
        for got in gots:
            entry = known.get(got.id)
            if entry is None:
                self.missing += 1
                continue
            self.miscounted += entry["delivered_tokens"] != got.tokens
            self.unbalanced += not entry["is_balanced"]
            self.continued += any(attempt["outcome"] == "continued" for attempt in entry["attempts"])


async def drift_at_rest(gate: Gateway, ledger: Ledger, engine: Engine, timeout_s: float = 30.0) -> Drift:
    """What the account lacks of an engine that has come to rest; asked twice, as attempts cut off settle then."""
    deadline = time.monotonic() + timeout_s
    found = None
    while time.monotonic() < deadline:
        asked_unix_nano = time.time_ns()
        told = await scrape(gate, engine)
        found = await asyncio.to_thread(
            ledger.reconcile,
            (engine.info.name, engine.info.server_pid or 0),
            told.prompt_tokens_total or 0,
            told.tokens_predicted_total or 0,
            busy=told.busy,
            asked_unix_nano=asked_unix_nano,
        )
        if found is not None and not found.estimates:
            return found
        await asyncio.sleep(0.05)
    assert found is not None, f"{engine.info.name} did not come to rest"
    return found


async def scrape(gate: Gateway, engine: Engine) -> ServerMetrics:
    """The engine's own counters."""
    async with gate.http.get(f"{engine.info.url}/metrics", headers=engine.headers) as reply:
        return read_metrics(await reply.text())


async def run(
    gate: Gateway, pack: Pack, ledger: Ledger, *, batches: int, size: int, say: Callable[[str], None] = lambda _: None
) -> Tally:
    """Batches of streams, a death in each, another engine every time."""
    tally = Tally()
    for number in range(batches):
        asked, wanted = await undisturbed(gate, wishes(size, seed=number))
        victim = f"e{number % len(pack.engines)}"
        gots = await batch_with_a_death(gate, pack, asked, victim)
        await gate.idle()
        tally.kills += pack.engines[victim].process.poll() is not None
        tally.compare(ledger, wanted, gots)
        tally.check_ledger(ledger, gots)
        for name, engine in pack.engines.items():
            if name != victim:
                drift = await drift_at_rest(gate, ledger, engine)
                tally.drift_tokens += abs(drift.prompt_tokens) + abs(drift.generated_tokens)
        await pack.restart(gate, victim)
        await tally.find_ties(gate, ledger, list(zip(asked, wanted, gots, strict=True)))
        say(f"batch {number + 1} of {batches}: {tally}")
        for wish, want, got in zip(asked, wanted, gots, strict=True):
            if got != want:
                attempts = (ledger.explain(got.id) or {}).get("attempts")
                say(f"  {wish.path} {wish.kind}: wanted {want}\n  got {got}\n  attempts {attempts}")
    return tally
