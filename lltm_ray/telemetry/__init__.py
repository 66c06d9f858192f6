"""What the fleet did, told in OpenTelemetry's words.

Flow: processes that do the work append plain rows (`rows`) and ship them in parcels (`outbox`); the telemetry actor
keeps them (`store`), makes spans of them (`spans`), records metrics (`instruments`) and hands both to `exporters`.
For programs: `instrument` and `trace` tell of their own calls, `summarize` reads rows; loaded on first use.
No Ray here; `opentelemetry.sdk` nowhere else. May import `config`, `records`, `_optional`, `_watch`, `errors`.
"""

from __future__ import annotations

import importlib
from typing import Any

_WHERE = {
    "instrument": "lltm_ray.telemetry.instrumentation",
    "summarize": "lltm_ray.telemetry.summary",
    "timeline_frame": "lltm_ray.telemetry.summary",
    "trace": "lltm_ray.telemetry.user_spans",
    "uninstrument": "lltm_ray.telemetry.instrumentation",
}

__all__ = sorted(_WHERE)  # noqa: PLE0605 - the table above is the list


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)
