"""The recorded trace of requests: JSON lines without any text, as the gateway writes them and `replay` reads them.

A prompt is a list of block ids: a salted hash of every 64 bytes of its key. Prompts that begin alike have the same
first ids, which is all that routing needs; without the salt, which is made anew for each recorder and written nowhere,
nobody can test what a prompt was. A line repeats nothing of the same session's last one: `keep` says how many blocks
of that (prompt and reply) come first. The last, incomplete block of a prompt is left out: it is computed each time.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from heapq import heappop, heappush
from math import inf
from pathlib import Path
from typing import Any

from lltm_ray.errors import ConfigError
from lltm_ray.routing.replay.simulated import BLOCK_BYTES, common_blocks

__all__ = ["HEADER", "Arrival", "Parents", "read_trace", "trace_lines", "write_line"]

HEADER = {"trace": "lltm-ray", "version": 1}
"""A trace's first line."""
_PARENT_BYTES = 16 * 2**20
_WINDOW = 16_384
"""Lines are written when a request ends; a reader puts so many in order of arrival."""
_MAX_LINE_CHARS = 64 * 2**20
MOST = 10**15
"""No number of a trace is larger."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """One request of a trace."""

    arrived_s: float
    """Since the trace began."""
    key: bytes
    """8 bytes for each block of the prompt."""
    reply: bytes = b""
    """The same for what the reply adds."""
    prompt_tokens: int
    output_tokens: int
    max_tokens: int | None = None
    tenant: str = ""
    session: str = ""
    priority: int = 0
    allowance_s: float = inf
    """Seconds from its arrival to the latest beginning of its answer."""
    pause_s: float | None = None
    """It is sent no sooner than this after the end of the session's last one; None: at `arrived_s` come what may."""
    engine: str = ""
    """Where it really went, and how many cached tokens the router expected there; nothing in a synthetic trace."""
    predicted_tokens: int = 0


class Parents:
    """The last content of each session, bounded in bytes: writer and reader forget the same ones."""

    def __init__(self) -> None:
        self._last: OrderedDict[str, bytes] = OrderedDict()
        self._bytes = 0

    def get(self, session: str) -> bytes:
        """Prompt and reply of its last request; empty if there was none lately."""
        return self._last.get(session, b"")

    def put(self, session: str, content: bytes) -> None:
        """Its last request is another one now."""
        if not session:
            return
        self._bytes += len(content) - len(self._last.pop(session, b""))
        self._last[session] = content
        while self._bytes > _PARENT_BYTES:
            self._bytes -= len(self._last.popitem(last=False)[1])


# --- writing


def trace_lines(arrivals: Iterable[Arrival]) -> Iterator[str]:
    """A trace file's lines, its header first; each ends with a newline."""
    yield json.dumps(HEADER) + "\n"
    parents = Parents()
    for arrival in arrivals:
        yield write_line(arrival, parents)


def write_line(arrival: Arrival, parents: Parents) -> str:
    """One request as a line."""
    content = arrival.key + arrival.reply
    keep = common_blocks(parents.get(arrival.session), arrival.key)
    parents.put(arrival.session, content)
    fields: dict[str, Any] = {"arrived_s": round(arrival.arrived_s, 6)}
    optional = {
        "tenant": arrival.tenant,
        "session": arrival.session,
        "keep": keep,
        "blocks": arrival.key[keep * BLOCK_BYTES :].hex(),
        "reply": arrival.reply.hex(),
        "max_tokens": arrival.max_tokens,
        "priority": arrival.priority,
        "allowance_s": None if arrival.allowance_s == inf else round(arrival.allowance_s, 6),
        "engine": arrival.engine,
        "predicted_tokens": arrival.predicted_tokens,
    }
    fields |= {name: value for name, value in optional.items() if value}
    fields |= {"prompt_tokens": arrival.prompt_tokens, "output_tokens": arrival.output_tokens}
    if arrival.pause_s is not None:
        fields["pause_s"] = round(arrival.pause_s, 6)
    return json.dumps(fields, separators=(",", ":")) + "\n"


# --- reading


def read_trace(path: str | Path) -> Iterator[Arrival]:
    """The requests of a trace file in order of arrival; at most 16,384 are in memory at once.

    A request that comes even later in the file keeps its place in the file, at the time of the one before it.

    Raises:
        ConfigError: the file cannot be read, is no trace, or a line is wrong; it names line, field and value.
    """
    window: list[tuple[float, int, Arrival]] = []
    try:
        with Path(path).open(encoding="utf-8") as file:
            for number, arrival in _parsed(file):
                heappush(window, (arrival.arrived_s, number, arrival))
                if len(window) > _WINDOW:
                    yield heappop(window)[2]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("trace", str(path), f"cannot be read: {error}") from error
    while window:
        yield heappop(window)[2]


def _parsed(lines: Iterable[str]) -> Iterator[tuple[int, Arrival]]:
    parents, header_seen = Parents(), False
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        fields = _fields(line, number)
        if not header_seen:
            header_seen = True
            _check_header(fields)
            continue
        yield number, _arrival(fields, number, parents)
    if not header_seen:
        raise ConfigError("trace", "", f"is empty; its first line must be {json.dumps(HEADER)}")


def _fields(line: str, number: int) -> dict[str, Any]:
    try:
        fields = json.loads(line) if len(line) <= _MAX_LINE_CHARS else None
    except ValueError:
        fields = None
    if not isinstance(fields, dict):
        raise ConfigError(f"trace, line {number}", line[:60], "must be a JSON object")
    return fields


def _check_header(fields: dict[str, Any]) -> None:
    if {name: fields.get(name) for name in HEADER} != HEADER:
        raise ConfigError("trace, line 1", fields, f"must be {json.dumps(HEADER)}")


def _arrival(fields: dict[str, Any], number: int, parents: Parents) -> Arrival:
    take = _Taker(fields, number)
    session, keep = take.word("session"), int(take.number("keep", 0))
    parent = parents.get(session)
    if keep * BLOCK_BYTES > len(parent):
        held = len(parent) // BLOCK_BYTES
        raise ConfigError(take.name("keep"), keep, f"the session's last request has only {held} blocks")
    arrival = Arrival(
        arrived_s=take.number("arrived_s"),
        key=parent[: keep * BLOCK_BYTES] + take.blocks("blocks"),
        reply=take.blocks("reply"),
        prompt_tokens=int(take.number("prompt_tokens", low=1)),
        output_tokens=int(take.number("output_tokens")),
        max_tokens=int(take.number("max_tokens", 0)) if "max_tokens" in fields else None,
        tenant=take.word("tenant"),
        session=session,
        priority=int(take.number("priority", 0, low=-10, high=10)),
        allowance_s=take.number("allowance_s", inf),
        pause_s=take.number("pause_s", 0) if "pause_s" in fields else None,
        engine=take.word("engine"),
        predicted_tokens=int(take.number("predicted_tokens", 0)),
    )
    parents.put(session, arrival.key + arrival.reply)
    return arrival


class _Taker:
    """Reads one line's fields and names what is wrong."""

    def __init__(self, fields: dict[str, Any], number: int) -> None:
        self._fields, self._number = fields, number

    def name(self, field: str) -> str:
        return f"trace, line {self._number}, {field}"

    def number(self, field: str, default: float | None = None, *, low: float = 0, high: float = MOST) -> float:
        value: Any = self._fields.get(field, default)
        if default == inf and field not in self._fields:
            return inf
        if type(value) not in (int, float) or not low <= value <= high:
            raise ConfigError(self.name(field), value, f"must be a number from {low:g} to {high:g}")
        return float(value)

    def word(self, field: str) -> str:
        value = self._fields.get(field, "")
        if not isinstance(value, str):
            raise ConfigError(self.name(field), value, "must be a string")
        return value

    def blocks(self, field: str) -> bytes:
        try:
            value = bytes.fromhex(self.word(field))
        except ValueError:
            value = b"?"
        if len(value) % BLOCK_BYTES:
            raise ConfigError(self.name(field), self._fields[field], "must be 16 hexadecimal digits for each block")
        return value
