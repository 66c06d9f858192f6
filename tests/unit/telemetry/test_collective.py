"""Metrics of collective calls, from spans that anybody may have named."""

import json

import pytest
from prometheus_client.parser import text_string_to_metric_families

from lltm_ray.config import TelemetryConfig
from lltm_ray.telemetry.batch import pack
from lltm_ray.telemetry.rows import SpanRow
from lltm_ray.telemetry.service import TelemetryService

TOLD = {"operation": "send", "backend": "gloo", "nbytes": 8, "seconds": 0.5, "bus_bytes_s": 16.0}
CALL = SpanRow(
    trace_id="1" * 32,
    span_id="2" * 16,
    parent_span_id="",
    name="collective send",
    kind="internal",
    start_unix_nano=1,
    end_unix_nano=2,
    error_type="",
    error="",
    engine="",
    attributes=json.dumps({f"lltm.collective.{name}": value for name, value in TOLD.items()}),
)


def counted(rows):
    service = TelemetryService(TelemetryConfig(), None)
    service.put("collectives", {"spans": pack("spans", rows)}, {})
    families = text_string_to_metric_families(service.metrics().decode())
    found = {each.name: each.value for family in families for each in family.samples if "collective" in each.name}
    service.close()
    return found


@pytest.mark.parametrize(
    "changes",
    [
        {"attributes": "{}"},
        {"attributes": "[1]"},
        {"name": "collective bargaining"},
        {"name": "collective recv"},
        {"attributes": CALL.attributes.replace("0.5", '"long"')},
    ],
)
def test_a_programs_own_span_breaks_nothing_and_is_no_call(changes):
    assert counted([CALL._replace(**changes), CALL])["lltm_collective_calls_total"] == 1


def test_a_call_that_failed_is_counted_as_that_only():
    seen = counted([CALL, CALL._replace(error_type="CollectiveError", error="rank 1 died")])
    assert (seen["lltm_collective_calls_total"], seen["lltm_collective_failures_total"]) == (1, 1)
    assert seen["lltm_collective_bytes_total"] == 8
