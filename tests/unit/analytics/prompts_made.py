"""Small fleets of prompts, as rows, for what analyses make of beginnings."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from lltm_ray._prefix import END_BYTES, HASH_BYTES, hash_blocks, hash_prefixes
from lltm_ray.analytics.frames import choose_engine
from lltm_ray.analytics.ingest import build_trace
from lltm_ray.analytics.trace import Trace
from lltm_ray.telemetry.batch import pack
from lltm_ray.telemetry.rows import KINDS, AttemptRow, RequestRow

START = 1_700_000_000_000_000_000
SALT = bytes(32)
BYTES_A_TOKEN = 4
TOKEN_S = 0.001
_DEFAULTS: dict[str, Any] = {"str": "", "int": 0, "float": 0.0, "bool": False, "bytes": b""}


@dataclass(kw_only=True)
class Told:
    """One request, as it was served."""

    prompt: bytes
    at_s: float
    engine: str = "engine-0"
    cached: int = 0
    generated: int = 20
    name: str = ""
    tenant: str = ""
    model: str = "tiny"
    slot: int = -1
    policy: str = "residency"
    took_s: float | None = None
    has_blocks: bool = True

    @property
    def tokens(self) -> int:
        return len(self.prompt) // BYTES_A_TOKEN

    @property
    def ended_s(self) -> float:
        own = (self.tokens - self.cached) * TOKEN_S + self.generated * 0.01
        return self.at_s + (own if self.took_s is None else self.took_s)

    @property
    def hashes(self) -> list[bytes]:
        joined = hash_prefixes(self.prompt, SALT)
        return [joined[at : at + HASH_BYTES] for at in range(0, len(joined), HASH_BYTES)]


def trace_of(told: list[Told]) -> Trace:
    """Their trace; `r` is their place in the list, which is in the order of arrival."""
    requests = [_request(number, each) for number, each in enumerate(told)]
    attempts = [_attempt(number, each) for number, each in enumerate(told) if each.engine]
    rows = {"requests": requests, "attempts": attempts}
    tables = {kind: pa.Table.from_batches([pack(kind, each)]) for kind, each in rows.items()}
    return build_trace(tables, choose_engine("pandas"), start_unix_nano=START)


def id_of(number: int) -> str:
    return f"{number + 1:032x}"


def _blank(kind: str, **values: Any) -> Any:
    notes = {name: note.__forward_arg__.removesuffix(" | None") for name, note in KINDS[kind].__annotations__.items()}
    return KINDS[kind](**({name: _DEFAULTS[note] for name, note in notes.items()} | values))


def _request(number: int, told: Told) -> RequestRow:
    row: RequestRow = _blank(
        "requests",
        trace_id=id_of(number),
        span_id=f"{2 * number + 1:016x}",
        request_id=f"r-{number}",
        route="/completion",
        model=told.model,
        tenant=told.tenant,
        conversation=told.name,
        status=200 if told.engine else 429,
        arrived_unix_nano=START + round(told.at_s * 1e9),
        total_s=told.ended_s - told.at_s,
        policy=told.policy,
        prompt_bytes=len(told.prompt),
        prefix=b"".join(told.hashes),
        blocks=hash_blocks(told.prompt, SALT) if told.has_blocks else b"",
    )
    return row


def _attempt(number: int, told: Told) -> AttemptRow:
    computed = told.tokens - told.cached
    total = told.ended_s - told.at_s
    row: AttemptRow = _blank(
        "attempts",
        trace_id=id_of(number),
        request_span_id=f"{2 * number + 1:016x}",
        span_id=f"{2 * number + 2:016x}",
        number=1,
        engine=told.engine,
        slot=told.slot,
        first_s=min(computed * TOKEN_S, total),
        ended_s=total,
        cached_tokens=told.cached,
        computed_tokens=computed,
        generated_tokens=told.generated,
        outcome="ok",
    )
    return row


def random_fleet(seed: int, requests: int = 60, *, named: float = 0.5) -> list[Told]:
    """Conversations that grow and branch, shared beginnings, single requests, engines by chance; all times differ."""
    dice = random.Random(seed)
    shared = [dice.randbytes(dice.choice((100, 600, 2500, 9000))) for _ in range(3)]
    talks: list[list[Any]] = []
    told: list[Told] = []
    for number in range(requests):
        if not talks or dice.random() < 0.35:
            name = f"c-{dice.randrange(8)}" if dice.random() < named else ""
            talks.append([dice.choice(shared), name, f"t-{dice.randrange(2)}", dice.choice(("tiny", "tiny", "big"))])
        talk = dice.choice(talks[-6:])
        prompt = talk[0] + dice.randbytes(dice.choice((0, 40, 300, 1500)))
        if dice.random() < 0.8:
            talk[0] = prompt
        engine = dice.choice(("engine-0", "engine-1", "engine-2", ""))
        cached = dice.choice((0, 0, len(prompt) // 8, max(len(prompt) // BYTES_A_TOKEN - 1, 0)))
        each = Told(prompt=prompt, at_s=number + dice.random() / 2, engine=engine, cached=cached * bool(engine))
        each.name, each.tenant, each.model = talk[1:]
        each.generated, each.took_s = dice.randrange(1, 200), dice.choice((0.4, 1.7, 6.3)) * (1 + dice.random() / 10)
        told.append(each)
    return told


def shared_bytes(one: Told, other: Told) -> int:
    """Longest beginning, among those that have hashes, that both have."""
    ends = [end for end in END_BYTES if end <= min(len(one.prompt), len(other.prompt))]
    return max((end for end in ends if one.prompt[:end] == other.prompt[:end]), default=0)
