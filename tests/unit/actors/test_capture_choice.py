"""Whether prompts and answers are captured is the choice of who starts the fleet, not of the processes in it."""

from typing import Any

import pytest

from lltm_ray.actors.fleet import start_fleet
from lltm_ray.actors.front import _tracing
from lltm_ray.actors.sender import Sender
from lltm_ray.config import FleetConfig, TelemetryConfig
from lltm_ray.errors import ConfigError
from lltm_ray.serve import build_app
from lltm_ray.telemetry.content import VARIABLE, settle_content


@pytest.mark.parametrize(("here", "chosen"), [("span_only", False), ("", True), ("no_content", True)])
def test_a_gateways_own_environment_has_no_say(monkeypatch: pytest.MonkeyPatch, here: str, chosen: bool) -> None:
    monkeypatch.setenv(VARIABLE, here)
    tracing = _tracing(Sender("f", "gateway"), TelemetryConfig(capture_content=chosen))
    assert tracing is not None
    assert (tracing.capture is not None) == chosen


@pytest.mark.parametrize(("word", "wanted"), [("span_only", True), ("event_only", False), (None, False)])
def test_a_serve_application_carries_its_builders_choice(
    monkeypatch: pytest.MonkeyPatch, word: str | None, wanted: bool
) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    if word is not None:
        monkeypatch.setenv(VARIABLE, word)
    _, holder, telemetry = tuple[Any, ...](build_app(FleetConfig(model="tiny"))._bound_deployment.init_args)
    assert telemetry.capture_content is wanted
    assert holder._bound_deployment.init_args[0].telemetry == telemetry


def test_a_wrong_word_stops_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "span-only")
    with pytest.raises(ConfigError, match="span-only"):
        start_fleet(FleetConfig(model="tiny"))
    with pytest.raises(ConfigError, match="span-only"):
        build_app({"model": "tiny"})


@pytest.mark.parametrize(
    "settled", [None, TelemetryConfig(enabled=False), TelemetryConfig(capture_content=True), TelemetryConfig()]
)
def test_only_what_is_left_open_is_asked_of_the_environment(settled: TelemetryConfig | None) -> None:
    found = settle_content(settled, {VARIABLE: "span_only"})
    is_open = settled is not None and settled.enabled and settled.capture_content is None
    assert (found is settled) != is_open
    assert not is_open or (found is not None and found.capture_content is True)
