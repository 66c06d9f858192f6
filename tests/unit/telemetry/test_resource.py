"""Who tells: our word, unless the operator has another."""

import os
import socket

from lltm_ray import __version__
from lltm_ray.telemetry.resource import make_resource


def test_a_process_tells_its_service_host_and_sdk_but_not_its_command_line(monkeypatch):
    monkeypatch.delenv("OTEL_RESOURCE_ATTRIBUTES", raising=False)
    monkeypatch.delenv("OTEL_SERVICE_NAME", raising=False)
    told = make_resource().attributes
    ours = (told["service.name"], told["service.version"], told["host.name"], told["process.pid"])
    assert ours == ("lltm_ray", __version__, socket.gethostname(), os.getpid())
    assert told["telemetry.sdk.name"] == "opentelemetry"
    assert not [name for name in told if name.startswith("process.command")]


def test_each_start_is_another_instance():
    assert make_resource().attributes["service.instance.id"] != make_resource().attributes["service.instance.id"]


def test_the_operators_environment_wins_over_the_callers_attributes_and_those_over_ours(monkeypatch):
    monkeypatch.setenv("OTEL_SERVICE_NAME", "llm-a")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "service.name=other,deployment.environment.name=prod,host.name=h")
    told = make_resource({"service.name": "mine", "host.name": "mine", "service.namespace": "mine"}).attributes
    assert [told[name] for name in ("service.name", "host.name", "service.namespace")] == ["llm-a", "h", "mine"]
    assert told["deployment.environment.name"] == "prod"
