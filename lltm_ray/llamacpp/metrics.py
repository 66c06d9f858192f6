"""llama-server's `/metrics` text into a record. Pure.

What to know before using it: each scrape resets the two rate gauges (`*_tokens_seconds`), so one reader a server;
numbers are printed with six significant digits, so counters are exact below a million only; which names there are is up
to the build, so a name that is missing is None, not 0; `n_tokens_max` is a high-water mark that calls itself a counter.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields

from lltm_ray.errors import UpstreamError

_PREFIX = "llamacpp:"
_SAMPLE = re.compile(rf"^{_PREFIX}(\w+)(?:\{{([^}}]*)\}})?[ \t]+(\S+)")
_POSITION = re.compile(r'position="(\d+)"')
_PER_POSITION = "spec_decode_num_accepted_tokens_per_pos_total"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerMetrics:
    """One scrape, by llama-server's own names; None where this build does not say."""

    prompt_tokens_total: float | None = None
    """Prompt tokens computed, without cached ones; embeddings and cancelled requests count."""
    prompt_tokens_cached_total: float | None = None
    prompt_seconds_total: float | None = None
    tokens_predicted_total: float | None = None
    """Generated tokens; a request's are added when its slot is released, however it ended."""
    tokens_predicted_seconds_total: float | None = None
    n_decode_total: float | None = None
    n_tokens_max: float | None = None
    n_busy_slots_per_decode: float | None = None
    prompt_tokens_seconds: float | None = None
    """Since the last scrape by anyone."""
    predicted_tokens_seconds: float | None = None
    """Since the last scrape by anyone."""
    requests_processing: float | None = None
    requests_deferred: float | None = None
    spec_decode_num_draft_tokens_total: float | None = None
    spec_decode_num_accepted_tokens_total: float | None = None
    spec_decode_num_drafts_total: float | None = None
    accepted_per_position: tuple[float, ...] = ()
    """Draft tokens accepted at each position; empty before the first speculative request."""

    @property
    def busy(self) -> int:
        """Requests in slots and waiting for one; 0 is a server at rest, whose counters hold all it did."""
        return int((self.requests_processing or 0) + (self.requests_deferred or 0))


_NAMES = frozenset(each.name for each in fields(ServerMetrics)) - {"accepted_per_position"}


def read_metrics(text: str) -> ServerMetrics:
    """Read an exposition; families we do not know are passed over.

    Raises:
        UpstreamError: there is no llama.cpp sample in it, or one has no finite number. An empty or foreign text must
            not look like a server that did nothing.
    """
    values: dict[str, float] = {}
    positions: dict[int, float] = {}
    for line in text.splitlines():
        found = _SAMPLE.match(line)
        if found is None:
            continue
        name, labels, raw = found.groups()
        if name == _PER_POSITION:
            position = _POSITION.search(labels or "")
            if position is not None:
                positions[int(position[1])] = _number(name, raw)
        elif name in _NAMES and not labels:
            values[name] = _number(name, raw)
    if not values:
        raise UpstreamError(200, f"/metrics without a sample {_PREFIX}...: is this a llama-server with --metrics?")
    accepted = tuple(positions.get(number, 0.0) for number in range(max(positions, default=-1) + 1))
    return ServerMetrics(**values, accepted_per_position=accepted)


def _number(name: str, raw: str) -> float:
    try:
        value = float(raw)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UpstreamError(200, f"/metrics: {_PREFIX}{name} is {raw!r}, not a number")
    return value
