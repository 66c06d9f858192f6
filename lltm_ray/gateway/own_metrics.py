"""What the gateway itself adds to `/metrics`, in Prometheus' text format, from what `/lltm/status` shows."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

_MODEL_COUNTERS = (
    ("requests", "Requests answered by an engine."),
    ("rejected", "Requests refused for want of a slot."),
    ("prompt_tokens", "Prompt tokens of answered requests, cached ones included."),
    ("cached_tokens", "Prompt tokens found cached."),
    ("predicted_cached_tokens", "Prompt tokens that the router expected to be found cached."),
    ("generated_tokens", "Tokens generated."),
    ("delivered_tokens", "Tokens whose text clients were sent."),
)
_SLOTS = (
    ("claimed_slots", "slots_busy", "Slots claimed here."),
    ("owned_slots", "slots_total", "Slots that are this gateway's."),
)
_COUNTER = re.compile(rb"(?m)^(# (?:HELP|TYPE) \w+?)_total(?= )")
_LEDGER_COUNTERS = ("written", "dropped", "unbalanced", "recovered", "write_errors", "unprotected")


def own_metrics(look: Mapping[str, Any]) -> str:
    """Families `lltm_gateway_*` and `lltm_ledger_*`.

    Args:
        look: what `/lltm/status` shows.
    """
    router = look["router"]
    models, engines = router["models"], router["engines"]
    lines: list[str] = []
    for name, text in _MODEL_COUNTERS:
        samples = ((f'model="{_escape(model)}"', each[name]) for model, each in models.items())
        lines += _family(f"lltm_gateway_{name}_total", "counter", text, samples)
    errors = ((f'model="{_escape(model)}"', each["residency"]["median_error_ratio"]) for model, each in models.items())
    text = "Median of |predicted - found| cached tokens over prompt tokens, latest requests."
    lines += _family("lltm_gateway_reuse_error_ratio", "gauge", text, errors)
    waiting = ((f'model="{_escape(model)}"', router["waiting"].get(model, 0)) for model in models)
    lines += _family("lltm_gateway_waiting_requests", "gauge", "Requests that wait for a slot.", waiting)
    for name, field, text in _SLOTS:
        samples = ((f'engine="{_escape(engine)}"', row[field]) for engine, row in engines.items())
        lines += _family(f"lltm_gateway_{name}", "gauge", text, samples)
    return "".join([*lines, *_ledger(look["ledger"])])


def as_open_metrics(text: bytes) -> bytes:
    """The same families for OpenMetrics, where a counter's family goes without its samples' `_total`."""
    return _COUNTER.sub(rb"\1", text)


def _ledger(ledger: Mapping[str, Any]) -> list[str]:
    if not ledger:
        return []
    events = ((f'event="{name}"', ledger[name]) for name in _LEDGER_COUNTERS)
    lines = _family("lltm_ledger_entries_total", "counter", "Requests in the account, by what became of them.", events)
    drift = (
        (f'engine="{_escape(engine)}",kind="{kind}"', tokens)
        for engine, both in ledger["drift_tokens"].items()
        for kind, tokens in zip(("prompt", "generated"), both, strict=True)
    )
    text = "An idle engine's own token counters minus the account's; 0 is expected."
    return lines + _family("lltm_ledger_drift_tokens", "gauge", text, drift)


def _family(name: str, kind: str, text: str, samples: Iterable[tuple[str, float]]) -> list[str]:
    lines = [f"{name}{{{labels}}} {value}\n" for labels, value in samples]
    return [f"# HELP {name} {text}\n# TYPE {name} {kind}\n", *lines] if lines else []


def _escape(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
