"""Numbers for people, with their units; a dash for what is not known, which is never 0."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from numbers import Real
from typing import Any

NOTHING = "–"
_TIMES = frozenset({"ratio", "residual_ratio", "slowed_ratio", "slowed_low", "prefill_ratio", "pace_ratio"})
"""Columns of "how many times as much"; other ratios and shares are parts of a whole."""
_CODES = frozenset({"status", "conversation", "throttle", "community", "slot", "depth"})
"""Whole numbers that are no amounts."""


def is_known(value: Any) -> bool:
    """Whether it is a finite number."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def digits(value: Any) -> str:
    """Three digits, or all of a larger number."""
    if not is_known(value):
        return NOTHING
    size = abs(value)
    if size >= 99.95 or float(value).is_integer():
        return f"{value:,.0f}"
    if size >= 0.0995:
        return f"{value:.1f}" if size >= 9.995 else f"{value:.2f}"
    return f"{value:.3g}"


def count(value: Any) -> str:
    """A number of things."""
    return f"{value:,.0f}" if is_known(value) else NOTHING


def percent(ratio: Any) -> str:
    """Of 0..1."""
    if not is_known(ratio):
        return NOTHING
    return f"{ratio * 100:.0f} %" if ratio == 0 or abs(ratio) > 0.9995 else f"{ratio * 100:.1f} %"


def times(ratio: Any) -> str:
    """How many times as much."""
    return f"{digits(ratio)}×" if is_known(ratio) else NOTHING


def seconds(value: Any) -> str:
    """A duration: the unit that leaves few digits."""
    if not is_known(value):
        return NOTHING
    size = abs(value)
    if size < 0.9995:
        return f"{value * 1000:.1f} ms" if 0 < size < 0.00995 else f"{value * 1000:.0f} ms"
    if size < 119.5:
        return f"{digits(value)} s"
    if size < 7200:
        minutes, rest = divmod(round(size), 60)
        return f"{'-' * (value < 0)}{minutes} min {rest} s"
    return f"{value / 3600:,.1f} h"


def joules(value: Any) -> str:
    """Energy."""
    if not is_known(value):
        return NOTHING
    if abs(value) >= 9999.5:
        return f"{digits(value / 1000)} kJ"
    return f"{digits(value * 1000)} mJ" if 0 < abs(value) < 0.0995 else f"{digits(value)} J"


def size(value: Any) -> str:
    """Bytes."""
    if not is_known(value):
        return NOTHING
    return f"{digits(value / 2**30)} GiB" if value >= 2**29 else f"{digits(value / 2**20)} MiB"


def moment(unix_nano: int) -> datetime:
    """A time in UTC, to the microsecond."""
    return datetime.fromtimestamp(unix_nano // 1_000_000_000, UTC).replace(microsecond=unix_nano // 1000 % 1_000_000)


def clock(unix_nano: Any) -> str:
    """Time of day in UTC; a dash for a time that is not known."""
    return f"{moment(int(unix_nano)):%H:%M:%S}" if is_known(unix_nano) and unix_nano > 0 else NOTHING


def window(start_unix_nano: int, end_unix_nano: int) -> str:
    """From when to when, in UTC; the day once where it is the same."""
    start, end = moment(start_unix_nano), moment(end_unix_nano)
    last = f"{end:%H:%M:%S}" if start.date() == end.date() else f"{end:%Y-%m-%d %H:%M:%S}"
    return f"{start:%Y-%m-%d %H:%M:%S} to {last} UTC"


def plain(text: Any) -> str:
    """Text that cannot steer a terminal or turn the direction of what follows it."""
    return "".join(each if each.isprintable() else "�" for each in str(text))


_BY_SUFFIX = (
    ("_unix_nano", clock),
    ("_per_s", digits),
    ("_s", seconds),
    ("_share", percent),
    ("_ratio", percent),
    ("_bytes", size),
    ("joules", joules),
    ("joules_per_token", joules),
    ("share", percent),
    ("utilization", percent),
    ("seconds", seconds),
)


def cell(column: str, value: Any) -> str:
    """A value of a table, said in the unit that its column's name tells."""
    if not isinstance(value, Real):
        parts = value if isinstance(value, (tuple, list)) else (value,)
        return ", ".join(plain(each) for each in parts) or NOTHING
    if column in _TIMES:
        return times(value)
    if column in _CODES:
        return f"{value:g}" if is_known(value) else NOTHING
    found = next((form for suffix, form in _BY_SUFFIX if column.endswith(suffix)), digits)
    return found(value)


def heading(column: str) -> str:
    """A column's name in words; its values carry their unit."""
    for suffix in ("_unix_nano", "_bytes", "_per_s", "_s", "_ratio", "_w", "_c"):
        if column.endswith(suffix):
            words, unit = column.removesuffix(suffix), {"_per_s": " / s", "_w": ", W", "_c": ", °C"}.get(suffix, "")
            return words.replace("_", " ") + unit
    return column.replace("_ms_token", ", ms a token").replace("_", " ")
