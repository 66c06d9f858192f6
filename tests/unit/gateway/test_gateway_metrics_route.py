"""`/metrics` is legal in both formats, whether telemetry answers or not."""

from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_open
from prometheus_client.parser import text_string_to_metric_families as parse

from lltm_ray.gateway.dashboard.feed import TelemetryUnavailableError
from lltm_ray.gateway.fleet_routes import FleetRoutes

LOOK = {"router": {"models": {}, "engines": {}, "waiting": {}}, "ledger": {"written": 3, "drift_tokens": {}}}
LOOK["ledger"] |= dict.fromkeys(("dropped", "unbalanced", "recovered", "write_errors", "unprotected"), 0)  # type: ignore[operator]


class Telemetry:
    def __init__(self, *, is_away: bool) -> None:
        self._is_away = is_away

    async def metrics(self, *, is_open: bool) -> bytes:
        if self._is_away:
            raise TelemetryUnavailableError("telemetry does not answer: TimeoutError")
        return b"# TYPE a gauge\na 1.0\n" + (b"# EOF\n" if is_open else b"")


async def scrape(*, is_away: bool, accept: bytes) -> tuple[bytes, str]:
    routes = FleetRoutes(Any, Any, Any, lambda: LOOK, Telemetry(is_away=is_away))  # type: ignore[arg-type]
    told: dict[str, Any] = {}

    async def reply(status: int, body: bytes, *, content_type: bytes) -> None:
        told.update(status=status, body=body, content_type=content_type)

    await routes.build()["GET", "/metrics"](SimpleNamespace(headers=[(b"accept", accept)], reply=reply))  # type: ignore[arg-type]
    assert told["status"] == 200
    return told["content_type"], told["body"].decode()


@pytest.mark.parametrize("is_away", [False, True])
async def test_both_formats_are_legal_and_say_whether_telemetry_answers(is_away: bool) -> None:
    kind, text = await scrape(is_away=is_away, accept=b"text/plain")
    plain = {family.name: family for family in parse(text)}
    assert kind.startswith(b"text/plain")
    open_kind, open_text = await scrape(is_away=is_away, accept=b"application/openmetrics-text;q=0.9")
    families = {family.name: family for family in parse_open(open_text)}
    assert open_kind.startswith(b"application/openmetrics-text")
    for found in (plain, families):
        assert found["lltm_telemetry_up"].samples[0].value == (0 if is_away else 1)
        assert ("a" in found) != is_away
        assert found["lltm_ledger_entries"].samples
