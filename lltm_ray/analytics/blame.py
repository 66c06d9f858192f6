"""Whose an error is: the fleet's, its load's, or the client's."""

from __future__ import annotations

from typing import Any

from lltm_ray.analytics.frames import Array
from lltm_ray.analytics.trace import Names, Trace

OURS, LOAD, CLIENT, GONE, DEADLINE = range(5)
"""Whose error a class is; `DEADLINE`: the time that a request was given was up."""
_GONE = frozenset({"client_gone", "client gone"})
_LOAD = frozenset({"overloaded_error", "429", "refused"})
_DEADLINE = frozenset({"deadline", "timeout_error", "timeout", "504"})
_CLIENT = frozenset(
    {
        *("invalid_request_error", "authentication_error", "not_supported_error", "model_not_found", "not_found_error"),
        *("permission_error", "exceed_context_size_error", "400", "401", "403", "404", "405", "413", "415", "422"),
        "501",
    }
)


def error_kinds(names: Names) -> list[int]:
    """Code of an error -> `OURS`, `LOAD`, `CLIENT`, `GONE` or `DEADLINE`."""
    sets = ((_GONE, GONE), (_LOAD, LOAD), (_CLIENT, CLIENT), (_DEADLINE, DEADLINE))
    return [next((kind for known, kind in sets if name in known), OURS) for name in names.error]


def classes_of(trace: Trace, error: Any, classes: list[int]) -> Array:
    """Whose each error is; -1 where there is none."""
    xp = trace.engine.xp
    return xp.asarray([*classes, -1], dtype="int64")[trace.engine.array(error)]
