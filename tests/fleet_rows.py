"""A simulated fleet's telemetry, with or without a planted fault: what analytics is tested on.

A discrete-event simulation, small but honest: engines with slots behind one gateway queue; each decode slows with busy
slots and with what is before it, and crawls while a neighbour's prompt is read; each engine caches the conversations
and system prompts it has served last. All that rows tell (times, tokens, counters, power, hashes of prompts) comes out
of that one course.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections import Counter, OrderedDict, defaultdict, deque
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import shake_128
from typing import Any

import numpy as np
import pyarrow as pa

from lltm_ray._prefix import HASH_BYTES, SIZE_BITS, hash_blocks, hash_prefixes
from lltm_ray.telemetry.batch import SCHEMAS, pack
from lltm_ray.telemetry.rows import KINDS, AttemptRow, GpuRow, QueueRow, RequestRow, ServerRow, SpanRow

START_UNIX_NANO = 1_790_000_000_000_000_000
DECODE_S, PREFILL_S = 0.010, 0.0004
"""A token's, on an engine that has nothing else to do."""
SLOT_DRAG, PREFILL_DRAG = 0.06, 3.0
"""A decode's slowdown for each other busy slot, and while the engine reads a prompt."""
LOAD_S = 0.03
"""What the router takes a busy slot to cost the next request."""
SLOT_START_S, RELAY_S, ASK_S = 0.0015, 0.0004, 0.0005
AGGRESSOR_TOKENS, LONG_TOKENS = 6000, 16_000
EMBEDDED_TOKENS = 200
CACHED_CONVERSATIONS = 32
"""An engine keeps so many, the last used."""
BYTES_A_TOKEN = 4
_SALT = b"of a simulated fleet"
_KINDS = ("requests", "attempts", "spans", "servers", "gpus", "queues")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A fleet, its load and at most a few faults; the default is a clean fleet at about 40 % of its slots."""

    seed: int = 0
    seconds: float = 180.0
    """Requests arrive for so long; the last ones are served to their end."""
    engines: int = 4
    slots: int = 4
    """Of each engine."""
    gpus: int = 2
    """Engines are spread over them in blocks; 0: no GPU, and no samples of one."""
    rate: float = 14.0
    """Requests a second, all turns counted."""
    turns: float = 4.0
    """Of a conversation, on average."""
    think_s: float = 4.0
    single_share: float = 0.3
    """Of requests that belong to no conversation."""
    families: int = 6
    """Shared system prompts."""
    tenants: int = 5
    gone_share: float = 0.01
    """Of requests whose client leaves in the middle of the answer."""
    noise: float = 0.05
    """Spread of each request's pace (sigma of its logarithm)."""
    context_drag: float = 0.02
    """Slowdown of each token for each 1,000 tokens before it."""
    queue_limit: int = 64
    """Requests that may wait; more are refused with 429."""

    fault_from: float = 0.3
    """Of `seconds`: when a fault starts."""
    factor: float = 1.8
    """How much slower a straggler or a throttled GPU's engines are."""
    straggler: str = ""
    """Engine that becomes slow."""
    throttle: str = ""
    """GPU (`GPU-0`, ...) that becomes hot: samples show hardware thermal throttling, and its engines are slow."""
    aggressor: str = ""
    """Tenant that sends prompts of 6,000 tokens nobody has cached, with short answers."""
    aggressor_rate: float = 0.6
    """Of them, a second."""
    scatter: bool = False
    """Each turn goes to an engine by chance."""
    cascade: str = ""
    """Engine that dies: what runs there fails, and for a while so does what is still sent there."""
    cascade_s: float = 20.0
    overload: float = 1.0
    """Factor of the rate."""
    spread_prefix: bool = False
    """Engines forget shared system prompts: each request that begins with one, and is no later turn, computes it."""
    stamped: bool = False
    """Each conversation and single request has a stamp of its own before the shared system prompt."""

    long_talks: str = ""
    """Engine that has all conversations that are 16,000 tokens long already, and no others: no fault. At most at 8
    requests a second, or it forgets some."""
    lesser: str = ""
    """GPU of a slower product: its engines are `factor` slower from the start; no fault either."""
    late_share: float = 0.0
    """Of requests whose deadline passes in the middle of the answer."""
    embeddings: float = 0.0
    """Requests for embeddings, a second, besides."""
    skew_s: float = 0.0
    """By so much the node's clock, which its samples tell, is ahead of the gateway's."""


def fleet_rows(plan: Plan) -> dict[str, pa.Table]:
    """The rows that such a fleet's telemetry would hold: kind -> table as in `lltm_ray.telemetry.batch.SCHEMAS`."""
    return dict(_simulated(plan))


@lru_cache(maxsize=128)  # a few MB each; the same plans come again in one file after the other
def _simulated(plan: Plan) -> dict[str, pa.Table]:
    rows = _Fleet(plan).run()
    return {kind: pa.Table.from_batches([pack(kind, rows[kind])]) for kind in _KINDS}


def engine_names(plan: Plan) -> list[str]:
    """All of them."""
    return [f"engine-{i}" for i in range(plan.engines)]


def gpu_of(plan: Plan, engine: int) -> int:
    """Where an engine runs."""
    return engine * plan.gpus // plan.engines


@dataclass(eq=False)
class _Talk:
    """A conversation, or a single request."""

    name: str
    """Empty: the client names none."""
    tenant: str
    family: int
    """-1: no shared system prompt."""
    turns: int
    prompt: bytes
    tokens: int
    home: str = ""
    """Engine that has it from before; empty: none."""
    is_embedding: bool = False


@dataclass(eq=False)
class _Ask:
    """A request in the fleet."""

    talk: _Talk
    number: int
    arrived: float
    prompt: bytes
    tokens: int
    generate: int
    pace: float
    gone_at: int
    """Tokens after which its client leaves, or its deadline passes; 0: neither."""
    is_late: bool
    span_id: str
    trace_id: str
    attempts: list[AttemptRow] = field(default_factory=list)
    tried: set[str] = field(default_factory=set)
    first: float = math.nan
    delivered: int = 0
    is_continued: bool = False
    asked: float = 0.0


@dataclass(eq=False)
class _Job:
    """A request in a slot."""

    ask: _Ask
    engine: _Engine
    slot: int
    sent: float
    cached: int
    computed: int
    todo: int
    """Tokens to generate here."""
    left: float = 0.0
    """Seconds of work to the end of its phase, on an engine that has nothing else to do."""
    token_s: float = DECODE_S
    """Of a decode, on an engine that has nothing else to do."""
    headers: float = math.nan
    first: float = math.nan
    is_decoding: bool = False

    def drag(self, plan: Plan) -> tuple[float, float]:
        """Of what is before each token: its prefill's slowdown, and its decode's."""
        before = self.cached + self.computed / 2, self.cached + self.computed + self.todo / 2
        prefill, decode = (1 + plan.context_drag * tokens / 1000 for tokens in before)
        return prefill, decode


class _Engine:
    """An engine's slots, share of time, cache and counters."""

    def __init__(self, name: str, gpu: int, slots: int) -> None:
        self.name, self.gpu = name, gpu
        self.free = list(range(slots))
        self.slots = slots
        self.held: dict[int, _Job] = {}
        self.jobs: list[_Job] = []
        self.at = 0.0
        self.version = 0
        self.slow = 1.0
        self.is_up = True
        self.restarts = 0
        self.cache: OrderedDict[_Talk, tuple[int, int]] = OrderedDict()
        self.families: Counter[int] = Counter()
        self.total: defaultdict[str, float] = defaultdict(float)

    @property
    def busy(self) -> int:
        return len(self.held)

    def rates(self) -> tuple[float, float]:
        """Work done a second by one prefill and by one decode."""
        prefills = sum(not job.is_decoding for job in self.jobs)
        drag = 1 + SLOT_DRAG * (len(self.jobs) - 1)
        return 1 / (max(prefills, 1) * self.slow), 1 / (drag * self.slow * (PREFILL_DRAG if prefills else 1))

    def advance(self, now: float) -> None:
        passed, self.at = now - self.at, now
        if not self.jobs or passed <= 0:
            return
        prefill, decode = self.rates()
        decoding = 0
        for job in self.jobs:
            job.left -= passed * (decode if job.is_decoding else prefill)
            decoding += job.is_decoding
            self.total["predicted"] += passed * decode / job.token_s * job.is_decoding
        self.total["busy_s"] += passed
        self.total["prefill_s"] += passed * (decoding < len(self.jobs))
        self.total["decode_s"] += passed * (decoding > 0)
        self.total["decoding_s"] += passed * decoding

    def next_end(self) -> tuple[float, _Job] | None:
        if not self.jobs:
            return None
        prefill, decode = self.rates()
        ends = ((max(job.left, 0) / (decode if job.is_decoding else prefill), i) for i, job in enumerate(self.jobs))
        soonest, i = min(ends)
        return self.at + soonest, self.jobs[i]

    def cached(self, ask: _Ask, *, no_families: bool) -> int:
        if ask.talk in self.cache:
            return min(self.cache[ask.talk][0], ask.tokens - 1)
        is_known = self.families[ask.talk.family] > 0 and not no_families
        return FAMILY_TOKENS[ask.talk.family] if is_known else 0

    def remember(self, now: float, talk: _Talk) -> None:
        del now
        self.cache[talk] = (talk.tokens, talk.family)
        self.families[talk.family] += 1

    def keep(self, ask: _Ask, tokens: int) -> None:
        family = ask.talk.family
        if self.cache.pop(ask.talk, None) is None:
            self.families[family] += 1
        self.cache[ask.talk] = (tokens, family)
        if len(self.cache) > CACHED_CONVERSATIONS:
            _, (_, gone) = self.cache.popitem(last=False)
            self.families[gone] -= 1


FAMILY_TOKENS = [*(256 + 192 * (i % 5) for i in range(63)), 0]
"""Tokens of each shared system prompt; the last is none."""
_LONG_TEXT = shake_128(b"long").digest(BYTES_A_TOKEN * 4 * LONG_TOKENS)
STAMP_TOKENS = 12


def _text(mark: str, tokens: int) -> bytes:
    """So many tokens that begin with a mark, and share nothing with those of any other mark."""
    return (mark.encode() + shake_128(mark.encode()).digest(BYTES_A_TOKEN * tokens))[: BYTES_A_TOKEN * tokens]


_FAMILY_TEXT = [_text(f"system prompt {i}: ", tokens) for i, tokens in enumerate(FAMILY_TOKENS)]


def family_blocks(family: int) -> set[int]:
    """A shared system prompt's blocks as rows of requests with different stamps tell them."""
    prompts = [_text(mark, STAMP_TOKENS) + _FAMILY_TEXT[family] + _text(mark, 99) for mark in ("one", "other")]
    one, other = (set(np.frombuffer(hash_blocks(each, _SALT), ">i8").tolist()) for each in prompts)
    return one & other


def family_hashes(family: int) -> list[str]:
    """A shared system prompt's hashes as requests' rows tell them, in hex digits, the shortest beginning first."""
    joined = hash_prefixes(_FAMILY_TEXT[family], _SALT)
    return [joined[i : i + HASH_BYTES].hex() for i in range(0, len(joined), HASH_BYTES)]


_ENDS = {
    (False, False): ("ok", "", ""),
    (True, False): ("client gone", "client_gone", "client gone"),
    (True, True): ("deadline", "timeout_error", "the request took longer than 600 s"),
}
"""Whether it is cut off, and by its deadline -> the attempt's outcome; the request's type of error, and text."""


class _Fleet:
    """One course of events."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._random = random.Random(plan.seed)
        self._events: list[tuple[float, int, Any, tuple[Any, ...]]] = []
        self._order = itertools.count()
        self._engines = [
            _Engine(name, gpu_of(plan, i) if plan.gpus else -1, plan.slots) for i, name in enumerate(engine_names(plan))
        ]
        self._by_name = {engine.name: engine for engine in self._engines}
        self._waiting: deque[_Ask] = deque()
        self._rejected = 0
        self._fault_at = plan.seconds * plan.fault_from
        self._energy = [1000.0 * (i + 1) for i in range(plan.gpus)]
        self._seen: dict[str, defaultdict[str, float]] = {each.name: each.total.copy() for each in self._engines}
        self._hot = [45.0] * plan.gpus
        self.rows: dict[str, list[Any]] = {kind: [] for kind in KINDS}

    def run(self) -> dict[str, list[Any]]:
        plan = self._plan
        self._plan_talks()
        self._plan_faults()
        for second in range(math.ceil(plan.seconds) + 1):
            self._at(second, self._sample, second)
        for engine in self._engines:
            self._load_span(engine, 0.0)
            engine.slow = plan.factor if plan.lesser == f"GPU-{engine.gpu}" else 1.0
        while self._events:
            now, _, do, told = heapq.heappop(self._events)
            do(now, *told)
        return self.rows

    def _at(self, when: float, do: Any, *told: Any) -> None:
        heapq.heappush(self._events, (when, next(self._order), do, told))

    # --- load

    def _plan_talks(self) -> None:
        plan, dice = self._plan, self._random
        rate = plan.rate * plan.overload
        for count, mean_turns, share in ((True, plan.turns, 1 - plan.single_share), (False, 1.0, plan.single_share)):
            per_s, now = rate * share / mean_turns, 0.0
            while per_s and (now := now + dice.expovariate(per_s)) < plan.seconds:
                turns = self._geometric(mean_turns) if count else 1
                self._begin_talk(now, turns, f"tenant-{dice.randrange(plan.tenants)}", is_named=count)
        others = (plan.aggressor, plan.aggressor_rate, self._fault_at), ("search", plan.embeddings, 0.0)
        for tenant, per_s, now in others:
            while tenant and per_s and (now := now + dice.expovariate(per_s)) < plan.seconds:
                self._at(now, self._arrive, _Talk("", tenant, -1, 1, b"", 0, is_embedding=tenant == "search"))

    def _geometric(self, mean: float) -> int:
        return 1 + int(math.log(1 - self._random.random()) / math.log(1 - 1 / mean)) if mean > 1 else 1

    def _begin_talk(self, now: float, turns: int, tenant: str, *, is_named: bool) -> None:
        family = min(int(self._random.expovariate(0.5)), self._plan.families - 1)
        name = f"c-{self._random.getrandbits(48):012x}" if is_named else ""
        talk = _Talk(name, tenant, family, turns, _FAMILY_TEXT[family], FAMILY_TOKENS[family])
        if self._plan.stamped:
            stamp = _text(f"{now:015.6f} {tenant}: ", STAMP_TOKENS)
            talk.prompt, talk.tokens = stamp + talk.prompt, STAMP_TOKENS + talk.tokens
        if self._plan.long_talks and self._random.random() < 1 / self._plan.engines:
            talk.home, tokens = self._plan.long_talks, int(LONG_TOKENS * self._random.lognormvariate(0, 0.2))
            talk.prompt, talk.tokens = _LONG_TEXT[: BYTES_A_TOKEN * tokens], tokens
            self._at(now, self._by_name[talk.home].remember, talk)
        self._at(now, self._arrive, talk)

    def _arrive(self, now: float, talk: _Talk) -> None:
        dice = self._random
        if now >= self._plan.seconds:
            return
        is_attack = talk.family < 0
        tokens = EMBEDDED_TOKENS if talk.is_embedding else AGGRESSOR_TOKENS
        user = tokens if is_attack else int(min(max(dice.lognormvariate(4.0, 0.7), 8), 1500))
        generate = dice.randint(4, 12) if is_attack else int(min(max(dice.lognormvariate(3.5, 0.6), 4), 400))
        number = len(self.rows["requests"]) + len(self._waiting)
        talk.prompt += _text(f"{dice.getrandbits(64):016x} says: ", user)
        talk.tokens += user
        pace = dice.lognormvariate(0, self._plan.noise)
        gone = dice.randint(1, generate) if dice.random() < self._plan.gone_share else 0
        is_late = bool(self._plan.late_share) and not gone and dice.random() < self._plan.late_share
        gone = dice.randint(1, generate) if is_late else gone
        ids = f"{dice.getrandbits(64) | 1:016x}", f"{dice.getrandbits(128):032x}"
        ask = _Ask(talk, number, now, talk.prompt, talk.tokens, generate, pace, gone, is_late, *ids)
        talk.turns -= 1
        self._ask_slot(now, ask)

    def _ask_slot(self, now: float, ask: _Ask) -> None:
        ask.asked = now
        if len(self._waiting) >= self._plan.queue_limit:
            self._rejected += 1
            self._note_attempt(ask, None, now, "refused")
            self._finish(now, ask, 429, "overloaded_error", "the queue is full")
            return
        self._waiting.append(ask)
        self._grant(now)

    # --- routing

    def _grant(self, now: float) -> None:
        """In order of arrival; each to the engine that has its conversation, or else costs least now."""
        while self._waiting:
            free = [each for each in self._engines if each.free and self._may_have(each, self._waiting[0])]
            if self._is_down(now):
                free = [each for each in free if each.is_up or self._random.random() < 0.35]
            if not free:
                return
            ask = self._waiting.popleft()
            engine = self._random.choice(free) if self._plan.scatter else min(free, key=lambda e: self._cost(e, ask))
            if not engine.is_up:
                self._fail_at_once(now, ask, engine)
            else:
                self._send(now, ask, engine)

    def _may_have(self, engine: _Engine, ask: _Ask) -> bool:
        is_home = not self._plan.long_talks or ask.talk.home == (engine.name == self._plan.long_talks) * engine.name
        return is_home and engine.name not in ask.tried

    def _is_down(self, now: float) -> bool:
        return bool(self._plan.cascade) and not self._by_name[self._plan.cascade].is_up

    def _cost(self, engine: _Engine, ask: _Ask) -> tuple[float, float]:
        if not engine.is_up:
            return -1.0, 0.0  # nobody has told the gateway yet
        computed = ask.tokens - engine.cached(ask, no_families=self._plan.spread_prefix or self._plan.stamped)
        is_home = ask.talk in engine.cache
        return (0.0 if is_home else computed * PREFILL_S + LOAD_S * engine.busy), self._random.random()

    def _send(self, now: float, ask: _Ask, engine: _Engine) -> None:
        slot = engine.free.pop(self._random.randrange(len(engine.free)))
        prompt = ask.tokens + ask.delivered
        cached = engine.cached(ask, no_families=self._plan.spread_prefix or self._plan.stamped)
        sent = now + ASK_S
        todo = max((ask.gone_at or ask.generate) - ask.delivered, 1)
        job = _Job(ask, engine, slot, sent, cached, prompt - cached, todo)
        engine.held[slot] = job
        self._at(sent + SLOT_START_S, self._start, job)

    # --- an engine at work

    def _start(self, now: float, job: _Job) -> None:
        engine = job.engine
        if engine.held.get(job.slot) is not job:
            return
        engine.advance(now)
        job.headers = now
        noise = self._random.lognormvariate(0, self._plan.noise)
        prefill, decode = job.drag(self._plan)
        job.left = (0.004 + job.computed * PREFILL_S * prefill) * noise
        job.token_s = DECODE_S * job.ask.pace * decode
        engine.jobs.append(job)
        self._schedule(engine)

    def _schedule(self, engine: _Engine) -> None:
        engine.version += 1
        if found := engine.next_end():
            self._at(found[0], self._phase_end, engine, engine.version, found[1])

    def _phase_end(self, now: float, engine: _Engine, version: int, job: _Job) -> None:
        if version != engine.version:
            return
        engine.advance(now)
        if not job.is_decoding and job.ask.talk.is_embedding:
            engine.total["prompt"] += job.computed
            self._end_job(now, job)
        elif not job.is_decoding:
            job.is_decoding, job.first = True, now
            if math.isnan(job.ask.first):
                job.ask.first = now
            job.left = job.todo * job.token_s
            engine.total["prompt"] += job.computed
            engine.total["cached"] += job.cached
        else:
            self._end_job(now, job)
        self._schedule(engine)

    def _end_job(self, now: float, job: _Job) -> None:
        ask, engine = job.ask, job.engine
        self._free(job)
        if ask.talk.is_embedding:
            job.headers = now
            self._note_attempt(ask, job, now, "ok")
            self._finish(now, ask, 200, "", "")
            self._grant(now)
            return
        ask.delivered += job.todo
        engine.keep(ask, ask.tokens + ask.delivered)
        outcome, *error = _ENDS[bool(ask.gone_at), ask.is_late]
        self._note_attempt(ask, job, now, outcome, job.todo)
        self._finish(now, ask, 200, *error)
        self._grant(now)

    def _free(self, job: _Job) -> None:
        engine = job.engine
        if job in engine.jobs:
            engine.jobs.remove(job)
        del engine.held[job.slot]
        engine.free.append(job.slot)

    # --- faults

    def _plan_faults(self) -> None:
        plan = self._plan
        for i, engine in enumerate(self._engines):
            is_hot = bool(plan.throttle) and f"GPU-{gpu_of(plan, i)}" == plan.throttle
            if engine.name == plan.straggler or is_hot:
                self._at(self._fault_at, self._slow_down, engine)
        if plan.cascade:
            self._at(self._fault_at, self._die, self._by_name[plan.cascade])

    def _slow_down(self, now: float, engine: _Engine) -> None:
        engine.advance(now)
        engine.slow = self._plan.factor
        self._schedule(engine)

    def _die(self, now: float, engine: _Engine) -> None:
        engine.advance(now)
        engine.is_up = False
        engine.version += 1
        engine.cache.clear()
        engine.families.clear()
        self._at(now + self._plan.cascade_s, self._revive, engine)
        for job in list(engine.held.values()):
            self._free(job)
            self._break_off(now, job)
        self._grant(now)

    def _break_off(self, now: float, job: _Job) -> None:
        """Before the first text a request is tried elsewhere; after it, another engine mostly goes on from there."""
        ask = job.ask
        ask.tried.add(job.engine.name)
        if not job.is_decoding:
            self._note_attempt(ask, job, now, "retried")
            self._ask_slot(now, ask)
            return
        made = min(max(job.todo - math.ceil(job.left / job.token_s), 1), job.todo)
        ask.delivered += made
        goes_on = self._random.random() < 0.6 and ask.delivered < ask.generate
        self._note_attempt(ask, job, now, "continued" if goes_on else "failed", made)
        if goes_on:
            ask.is_continued = True
            self._ask_slot(now, ask)
        else:
            self._finish(now, ask, 200, "stream_broken", f"{job.engine.name} exited")

    def _fail_at_once(self, now: float, ask: _Ask, engine: _Engine) -> None:
        ask.tried.add(engine.name)
        ended = now + self._random.uniform(0.05, 0.5)
        job = _Job(ask, engine, -1, now + ASK_S, 0, 0, 0)
        is_last = self._random.random() < 0.25
        self._note_attempt(ask, job, ended, "failed" if is_last else "retried")
        if is_last:
            self._at(ended, self._finish, ask, 503, "unavailable_error", f"{engine.name} is unreachable")
        else:
            self._at(ended, self._ask_slot, ask)

    def _revive(self, now: float, engine: _Engine) -> None:
        engine.at = now
        engine.is_up = True
        engine.restarts += 1
        engine.total.clear()
        self._seen[engine.name].clear()
        self._load_span(engine, now - 4.0)
        self._grant(now)

    # --- rows

    def _nano(self, at: float) -> int:
        return START_UNIX_NANO + round(at * 1e9)

    def _finish(self, now: float, ask: _Ask, status: int, error_type: str, error: str) -> None:
        talk, zero = ask.talk, ask.arrived
        talk.prompt += _text(f"{ask.span_id} answers: ", ask.delivered)
        talk.tokens += ask.delivered
        if talk.turns > 0:
            self._at(now + 0.3 + self._random.expovariate(1 / self._plan.think_s), self._arrive, talk)
        self.rows["requests"].append(
            RequestRow(
                trace_id=ask.trace_id,
                span_id=ask.span_id,
                parent_span_id="" if self._random.random() < 0.8 else f"{self._random.getrandbits(64) | 1:016x}",
                flags=1,
                state="",
                request_id=f"r-{ask.span_id}",
                route="/v1/embeddings" if talk.is_embedding else "/v1/chat/completions",
                model_asked="tiny",
                model="tiny",
                tenant=talk.tenant,
                conversation=talk.name,
                status=status,
                error_type=error_type,
                error=error,
                arrived_unix_nano=self._nano(zero),
                ttft_s=ask.first - zero + RELAY_S,
                total_s=now - zero + RELAY_S,
                delivered_tokens=ask.delivered,
                bytes_sent=400 + 180 * ask.delivered,
                is_stream=not talk.is_embedding,
                parameters="{}" if talk.is_embedding else '{"stream":true}',
                response_id=f"chatcmpl-{ask.span_id}" if status == 200 else "",
                response_model="tiny" if status == 200 else "",
                finish_reasons="stop" if ask.delivered and not error_type else "",
                policy="random" if self._plan.scatter else "residency",
                why="" if status == 429 else "it costs least there",
                content="",
                prompt_bytes=len(ask.prompt),
                prefix=hash_prefixes(ask.prompt, _SALT),
                blocks=hash_blocks(ask.prompt, _SALT),
            )
        )
        self.rows["attempts"] += ask.attempts

    def _note_attempt(self, ask: _Ask, job: _Job | None, now: float, outcome: str, made: int = 0) -> None:
        zero = ask.arrived
        is_told = job is not None and outcome == "ok" and job.is_decoding
        is_read = job is not None and (job.is_decoding or (outcome == "ok" and ask.talk.is_embedding))
        ask.attempts.append(
            AttemptRow(
                trace_id=ask.trace_id,
                request_span_id=ask.span_id,
                span_id=f"{self._random.getrandbits(64) | 1:016x}",
                number=len(ask.attempts) + 1,
                engine=job.engine.name if job else "",
                server_pid=100 + int(job.engine.name.rpartition("-")[2]) + 50 * job.engine.restarts if job else 0,
                slot=job.slot if job else -1,
                asked_s=ask.asked - zero,
                sent_s=job.sent - zero if job else math.nan,
                headers_s=job.headers - zero if job else math.nan,
                first_s=job.first - zero if job else math.nan,
                ended_s=now - zero,
                predicted_cached_tokens=job.cached if job else -1,
                cached_tokens=job.cached if job and is_read else 0,
                computed_tokens=job.computed if job and is_read else 0,
                generated_tokens=made,
                delivered_tokens=made,
                prompt_ms=(job.first - job.headers) * 1e3 if job and is_told else math.nan,
                predicted_ms=(now - job.first) * 1e3 if job and is_told else math.nan,
                draft_tokens=0,
                accepted_tokens=0,
                outcome=outcome,
                is_estimate=outcome not in ("ok", "refused"),
                is_continued=ask.is_continued,
            )
        )

    def _load_span(self, engine: _Engine, now: float) -> None:
        ids = f"{self._random.getrandbits(128):032x}", f"{self._random.getrandbits(64) | 1:016x}"
        span = SpanRow(
            *ids, "", "lltm.model.load", "internal", self._nano(now), self._nano(now + 3.5), "", "", "", "{}"
        )
        self.rows["spans"].append(span._replace(engine=engine.name))

    def _sample(self, now: float, second: int) -> None:
        at = self._nano(now + self._plan.skew_s)
        load = [(0.0, 0.0)] * self._plan.gpus
        for engine in self._engines:
            engine.advance(now)
            self._schedule(engine)
            seen, total = self._seen[engine.name], engine.total
            if engine.gpu >= 0:
                busy, prefill = load[engine.gpu]
                share = self._plan.gpus / self._plan.engines
                busy += share * (total["busy_s"] - seen["busy_s"])
                load[engine.gpu] = busy, prefill + share * (total["prefill_s"] - seen["prefill_s"])
            self._seen[engine.name] = total.copy()
            self.rows["servers"].append(self._server(at, engine))
        for gpu, (busy, prefill) in enumerate(load):
            self.rows["gpus"].append(self._gpu(at, now, gpu, busy, prefill))
        running = sum(engine.busy for engine in self._engines)
        queue = QueueRow(self._nano(now), "gateway-0", "tiny", len(self._waiting), running, self._rejected, 0.0)
        self.rows["queues"].append(queue)

    def _server(self, at: int, engine: _Engine) -> ServerRow:
        total = engine.total
        used = sum(job.ask.tokens for job in engine.held.values())
        return ServerRow(
            at_unix_nano=at,
            node="node-0",
            engine=engine.name,
            model="tiny",
            server_pid=100 + int(engine.name.rpartition("-")[2]) + 50 * engine.restarts,
            gpu_uuids=f"GPU-{engine.gpu}" if engine.gpu >= 0 else "",
            share=min(self._plan.gpus / self._plan.engines, 1.0),
            gpu_memory_bytes=4 * 2**30 if engine.gpu >= 0 else None,
            gpu_memory_share_bytes=6 * 2**30 if engine.gpu >= 0 else None,
            prompt_tokens=float(total["prompt"]),
            prompt_tokens_cached=float(total["cached"]),
            prompt_seconds=float(total["prefill_s"]),
            predicted_tokens=float(int(total["predicted"])),
            predicted_seconds=float(total["decode_s"]),
            decodes=float(int(total["busy_s"] / DECODE_S)),
            draft_tokens=None,
            draft_accepted=None,
            busy_slots_per_decode=total["decoding_s"] / total["decode_s"] if total["decode_s"] else 0.0,
            processing=float(len(engine.jobs)),
            deferred=0.0,
            slots_total=engine.slots,
            slots_busy=engine.busy,
            context_tokens=32768 * engine.slots,
            context_used_tokens=used,
            cpu_s=float(total["busy_s"] * 0.3),
            memory_bytes=2**31,
            virtual_bytes=2**34,
            threads=8,
            open_files=40,
            restarts=engine.restarts,
        )

    def _gpu(self, at: int, now: float, gpu: int, busy: float, prefill: float) -> GpuRow:
        is_hot = self._plan.throttle == f"GPU-{gpu}" and now >= self._fault_at
        power = (70 + 130 * busy + 90 * prefill) * (0.75 if is_hot else 1) + self._random.gauss(0, 2)
        self._energy[gpu] += power
        self._hot[gpu] += 0.1 * ((91 if is_hot else 42 + 24 * busy) - self._hot[gpu])
        return GpuRow(
            at_unix_nano=at,
            node="node-0",
            gpu=gpu,
            uuid=f"GPU-{gpu}",
            name="NVIDIA Test Lite" if self._plan.lesser == f"GPU-{gpu}" else "NVIDIA Test",
            driver="1",
            utilization_ratio=round(min(busy, 1.0), 2),
            encoder_ratio=0.0,
            decoder_ratio=0.0,
            memory_total_bytes=24 * 2**30,
            memory_used_bytes=8 * 2**30,
            power_w=power,
            power_limit_w=300.0,
            energy_j=self._energy[gpu],
            temperature_c=round(self._hot[gpu]),
            throttle=0x40 if is_hot else 0x1 if busy == 0 else 0,
            pcie_sent_bytes=None,
            pcie_received_bytes=None,
            ecc_corrected=0,
            ecc_uncorrected=0,
        )


# --- many

_ENGINES, _SLOTS, _GPUS, _TURNS = 16, 8, 8, 4
_LANE_S = 2.0
"""A slot starts a request so often; each is over before the next."""
_DEPTHS = 8
_SAMPLES = 5_000
"""Of each GPU and server, at most."""


def many_spans(spans: int, seed: int = 0) -> dict[str, pa.Table]:
    """About so many spans of a clean fleet of 16 engines, without a course of events: 6 a request.

    Each slot serves one request after the other, and each four are the turns of one conversation; beginnings of prompts
    are shared by 50 families.
    """
    n = max(spans // 6, 1)
    dice = np.random.default_rng(seed)
    lanes = _ENGINES * _SLOTS
    lane, turn = np.arange(n) % lanes, np.arange(n) // lanes % _TURNS
    talk = np.arange(n) // (lanes * _TURNS) * lanes + lane
    family = _mixed(talk) % 50
    arrived = (np.arange(n) / lanes + dice.random(n) * 0.01) * _LANE_S
    generated = np.clip(dice.lognormal(3.5, 0.5, n), 4, 120).astype(np.int64)
    computed = np.clip(dice.lognormal(4.5, 0.6, n), 10, 1000).astype(np.int64) + np.where(turn == 0, 300, 0)
    cached = 400 + 200 * turn
    route, queue = dice.exponential(0.002, n), 0.001 + dice.exponential(0.001, n)
    prefill = 0.004 + computed * PREFILL_S * dice.lognormal(0, 0.05, n)
    decode = generated * DECODE_S * 1.2 * dice.lognormal(0, 0.05, n)
    sent = ASK_S + route
    first = sent + queue + prefill
    trace, span = _hex(dice, n, 32), _hex(dice, n, 16)
    common = {"trace_id": trace, "outcome": "ok", "number": 1, "server_pid": 100}
    requests = {
        "trace_id": trace,
        "span_id": span,
        "flags": 1,
        "request_id": span,
        "route": "/v1/chat/completions",
        "model_asked": "tiny",
        "model": "tiny",
        "tenant": _named("tenant-", family % 5),
        "conversation": _named("c-", talk),
        "status": 200,
        "arrived_unix_nano": START_UNIX_NANO + (arrived * 1e9).astype(np.int64),
        "ttft_s": first + RELAY_S,
        "total_s": first + decode + RELAY_S,
        "delivered_tokens": generated,
        "bytes_sent": 180 * generated,
        "is_stream": True,
        "parameters": "{}",
        "policy": "residency",
        "prompt_bytes": BYTES_A_TOKEN * (cached + computed),
        "prefix": _many_prefixes(family, talk),
        "blocks": _many_blocks(family, talk),
    }
    attempts = common | {
        "request_span_id": span,
        "span_id": _hex(dice, n, 16),
        "engine": _named("engine-", lane // _SLOTS),
        "slot": lane % _SLOTS,
        "asked_s": np.full(n, ASK_S),
        "sent_s": sent,
        "headers_s": sent + queue,
        "first_s": first,
        "ended_s": first + decode,
        "predicted_cached_tokens": cached,
        "cached_tokens": cached,
        "computed_tokens": computed,
        "generated_tokens": generated,
        "delivered_tokens": generated,
        "prompt_ms": prefill * 1e3,
        "predicted_ms": decode * 1e3,
    }
    tables = {"requests": _table("requests", n, requests), "attempts": _table("attempts", n, attempts)}
    return tables | _many_samples(dice, float(arrived[-1]))


def _many_samples(dice: np.random.Generator, length_s: float) -> dict[str, pa.Table]:
    steps = int(min(max(length_s, 2), _SAMPLES))
    moments = np.linspace(0, length_s, steps)

    def spread(things: int) -> tuple[Any, Any, dict[str, Any]]:
        at, thing = np.repeat(moments, things), np.tile(np.arange(things), steps)
        return at, thing, {"at_unix_nano": START_UNIX_NANO + (at * 1e9).astype(np.int64), "node": "node-0"}

    at, gpu, common = spread(_GPUS)
    power = 200 + dice.normal(0, 5, len(at))
    gpus = common | {
        "gpu": gpu,
        "uuid": _named("GPU-", gpu),
        "name": "NVIDIA Test",
        "utilization_ratio": np.clip(dice.normal(0.6, 0.1, len(at)), 0, 1),
        "memory_total_bytes": 24 * 2**30,
        "memory_used_bytes": 8 * 2**30,
        "power_w": power,
        "power_limit_w": 300.0,
        "energy_j": 200.0 * at,
        "temperature_c": 60.0,
        "throttle": 0,
    }
    at, engine, common = spread(_ENGINES)
    servers = common | {
        "engine": _named("engine-", engine),
        "model": "tiny",
        "server_pid": 100,
        "gpu_uuids": _named("GPU-", engine * _GPUS // _ENGINES),
        "share": 0.5,
        "prompt_tokens": 400.0 * at,
        "prompt_seconds": 0.2 * at,
        "predicted_tokens": 160.0 * at,
        "predicted_seconds": 0.6 * at,
        "decodes": 80.0 * at,
        "busy_slots_per_decode": 2.0,
        "processing": dice.integers(0, 5, len(at)).astype(np.float64),
        "deferred": 0.0,
        "slots_total": _SLOTS,
        "slots_busy": dice.integers(0, 5, len(at)),
    }
    at, _, common = spread(1)
    queues = common | {"gateway": "gateway-0", "model": "tiny", "waiting": 0, "running": 30, "rejected": 0}
    rows = {"gpus": gpus, "servers": servers, "queues": queues}
    return {"spans": _table("spans", 0, {})} | {
        kind: _table(kind, len(told["at_unix_nano"]), told) for kind, told in rows.items()
    }


_BLANK = {pa.string(): "", pa.binary(): b"", pa.int64(): 0, pa.float64(): math.nan, pa.bool_(): False}


def _table(kind: str, n: int, columns: dict[str, Any]) -> pa.Table:
    """A table of arrays and of values that all rows share; blank where nothing is said."""
    arrays = []
    for named in SCHEMAS[kind]:
        value = columns.get(named.name, _BLANK[named.type])
        is_column = isinstance(value, np.ndarray | pa.Array)
        arrays.append(pa.array(value, named.type) if is_column else pa.repeat(pa.scalar(value, named.type), n))
    return pa.table(arrays, schema=SCHEMAS[kind])


def _mixed(numbers: Any) -> Any:
    """Numbers that look like chance (splitmix64), as uint64."""
    x = np.asarray(numbers).astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _many_prefixes(family: Any, talk: Any) -> pa.Array:
    """Three beginnings are the family's, the others the conversation's."""
    return _eights(_many_hashes(family, talk))


def _many_blocks(family: Any, talk: Any) -> pa.Array:
    """As the beginnings, of 400 bytes each."""
    return _eights(_many_hashes(family, talk) >> np.uint64(SIZE_BITS) << np.uint64(SIZE_BITS) | np.uint64(400))


def _many_hashes(family: Any, talk: Any) -> Any:
    seeds = [_mixed(family) + np.uint64(d) if d < 3 else _mixed(talk + 1000) + np.uint64(d) for d in range(_DEPTHS)]
    return np.stack([_mixed(each) for each in seeds], axis=1)


def _eights(numbers: Any) -> pa.Array:
    """Rows of numbers as 8 bytes each."""
    return _fixed(numbers.astype(">u8").view(np.uint8).reshape(len(numbers), -1), pa.large_binary()).cast(pa.binary())


def _hex(dice: np.random.Generator, n: int, digits: int) -> pa.Array:
    chosen = dice.integers(0, 16, (n, digits), dtype=np.uint8)
    chosen[:, -1] |= 1  # no id is zero
    return _fixed(np.frombuffer(b"0123456789abcdef", np.uint8)[chosen], pa.large_string()).cast(pa.string())


def _fixed(values: Any, kind: pa.DataType) -> pa.Array:
    """Rows of bytes, all of one length."""
    n, width = values.shape
    ends = np.arange(n + 1, dtype=np.int64) * width
    return pa.Array.from_buffers(kind, n, [None, pa.py_buffer(ends), pa.py_buffer(np.ascontiguousarray(values))])


def _named(stem: str, numbers: Any) -> pa.Array:
    known, places = np.unique(np.asarray(numbers), return_inverse=True)
    return pa.array([f"{stem}{each}" for each in known.tolist()]).take(pa.array(places))
