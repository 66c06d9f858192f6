"""A fleet without telemetry says so, whatever is asked."""

import pytest

from lltm_ray.actors.fleet import Fleet
from lltm_ray.actors.observe import FleetTelemetry
from lltm_ray.config import FleetConfig
from lltm_ray.errors import FleetError


@pytest.mark.parametrize(
    "ask",
    [
        FleetTelemetry.look,
        FleetTelemetry.requests,
        FleetTelemetry.metrics,
        FleetTelemetry.summary,
        FleetTelemetry.read_since,
        lambda telemetry: telemetry.timeline("r-1"),
    ],
)
def test_telemetry_that_is_off_is_told_apart_from_telemetry_that_has_nothing(ask):
    fleet = Fleet(config=FleetConfig(model="tiny", name="quiet"), run_id="", directory=None)
    with pytest.raises(FleetError, match=r"telemetry of fleet 'quiet' is off: .*telemetry\.enabled = true"):
        ask(FleetTelemetry(fleet))
