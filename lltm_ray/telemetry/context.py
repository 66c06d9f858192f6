"""Trace identity: W3C Trace Context without a tracing library, for the request path.

Source: https://www.w3.org/TR/trace-context-2/ (version 00; a later version is read as far as 00 goes).
"""

from __future__ import annotations

import random
import re
from typing import NamedTuple

_PARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?\Z")
MOST_STATE_BYTES = 512
"""Of `tracestate`: what the standard wants passed on at least. It waits in every row; a longer one is dropped."""
SAMPLED = 0x01
"""Bit of `trace-flags`: the caller may record. Other bits (0x02: random trace id) are passed on as they came."""
_ids = random.SystemRandom()
_fast = random.Random(_ids.getrandbits(128))  # noqa: S311 - an identity, not a secret


class TraceContext(NamedTuple):
    """Who caused a span: ids in lower-case hex, 32 and 16 digits."""

    trace_id: str
    span_id: str
    flags: int = SAMPLED
    state: str = ""
    """`tracestate`, passed on unread."""

    @property
    def is_sampled(self) -> bool:
        """Whether the caller records."""
        return bool(self.flags & SAMPLED)


def read_traceparent(value: str, state: str = "") -> TraceContext | None:
    """A `traceparent` header; None if it is none, which starts a new trace."""
    found = _PARENT.match(value.strip())
    if found is None:
        return None
    version, trace_id, span_id, flags, more = found.groups()
    is_legal = version != "ff" and (version != "00" or not more)
    if not is_legal or not int(trace_id, 16) or not int(span_id, 16):
        return None
    return TraceContext(trace_id, span_id, int(flags, 16), state)


def write_traceparent(trace_id: str, span_id: str, flags: int) -> str:
    """The header that makes `span_id` the parent of what the receiver does."""
    return f"00-{trace_id}-{span_id}-0{flags & 0x03}"


def new_trace_id() -> str:
    """32 hex digits; all zero, which means none, once in 2**128."""
    return _fast.randbytes(16).hex()


def new_span_id() -> str:
    """16 hex digits; all zero, which means none, once in 2**64."""
    return _fast.randbytes(8).hex()


def new_ids() -> tuple[str, str, str]:
    """A trace's and two spans', at the cost of one."""
    ids = _fast.getrandbits(256).to_bytes(32, "little").hex()
    return ids[:32], ids[32:48], ids[48:]


def derive_span_id(span_id: str, number: int) -> str:
    """The id of a span's `number`-th derived child: the same in every exporter and after every restart.

    Args:
        span_id: the parent's.
        number: from 1.
    """
    step = number * 0x9E3779B97F4A7C15  # 2**64 over the golden ratio: neighbours land far apart
    return f"{(int(span_id, 16) + step) & 0xFFFF_FFFF_FFFF_FFFF or 1:016x}"
