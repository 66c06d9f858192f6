"""Samples become metrics under the conventions' names and units; what is absent is not observed."""

from typing import Any

import pytest
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.resources import Resource

from lltm_ray.telemetry.hardware import GPU_METRICS, observe_samples
from lltm_ray.telemetry.instruments import Instruments
from lltm_ray.telemetry.profiles import PROFILES
from lltm_ray.telemetry.samples import Samples
from tests.unit.telemetry.rows_made import gpu_row, node_row, queue_row, server_row

SECOND = 1_000_000_000


class Metrics:
    """What a reader would export."""

    def __init__(self, samples: Samples) -> None:
        self._reader = InMemoryMetricReader()
        instruments = Instruments(Resource({}), next(iter(PROFILES.values())), [self._reader])
        observe_samples(instruments, samples)

    def read(self) -> dict[str, Any]:
        data = self._reader.get_metrics_data()
        scopes = [scope for resource in data.resource_metrics for scope in resource.scope_metrics] if data else []
        return {metric.name: metric for scope in scopes for metric in scope.metrics}

    def values(self, name: str, *labels: str) -> dict[Any, float]:
        found = self.read()
        points = found[name].data.data_points if name in found else ()
        return {tuple(point.attributes[label] for label in labels): point.value for point in points}


@pytest.fixture
def samples() -> Samples:
    return Samples()


@pytest.fixture
def metrics(samples: Samples) -> Metrics:
    return Metrics(samples)


def test_a_gpu_is_told_in_fractions_bytes_watts_and_joules(samples: Samples, metrics: Metrics) -> None:
    samples.add("gpus", [gpu_row(throttle=0x4), gpu_row(uuid="GPU-2", power_w=None, energy_j=None, throttle=None)])
    assert metrics.values("hw.gpu.utilization", "hw.id", "hw.gpu.task") == {
        ("GPU-1", "general"): 0.5,
        ("GPU-2", "general"): 0.5,
    }
    assert metrics.values("hw.gpu.memory.utilization", "hw.id")["GPU-1",] == 0.25
    assert metrics.values("hw.power", "hw.id") == {("GPU-1",): 70.0}
    assert metrics.values("hw.energy", "hw.id") == {("GPU-1",): 1000.0}
    throttled = metrics.values("lltm.gpu.throttled", "hw.id", "reason")
    assert throttled["GPU-1", "power_cap"] == 1
    assert throttled["GPU-1", "thermal_hardware"] == 0
    assert not [key for key in throttled if key[0] == "GPU-2"]


def test_units_and_kinds_are_the_conventions(samples: Samples, metrics: Metrics) -> None:
    samples.add("gpus", [gpu_row()])
    found = metrics.read()
    assert {name: found[name].unit for name in ("hw.energy", "hw.power", "hw.temperature", "hw.gpu.memory.usage")} == {
        "hw.energy": "J",
        "hw.power": "W",
        "hw.temperature": "Cel",
        "hw.gpu.memory.usage": "By",
    }
    assert found["hw.energy"].data.is_monotonic
    assert not found["hw.gpu.memory.usage"].data.is_monotonic


def test_every_gpu_metric_is_described_once(samples: Samples, metrics: Metrics) -> None:
    described = {metric.name for metric in GPU_METRICS if metric.text}
    assert described == {metric.name for metric in GPU_METRICS}
    samples.add("gpus", [gpu_row()])
    assert set(metrics.read()) <= described


def test_llama_cpp_counters_go_on_over_a_restart(samples: Samples, metrics: Metrics) -> None:
    samples.add("servers", [server_row(at_unix_nano=SECOND)])
    samples.add("servers", [server_row(at_unix_nano=2 * SECOND, predicted_tokens=5.0, server_pid=42)])
    assert metrics.values("llamacpp.predicted.tokens", "lltm.engine") == {("engine-0",): 205.0}
    assert "llamacpp.draft.tokens" not in metrics.read()


def test_machines_and_queues_are_told(samples: Samples, metrics: Metrics) -> None:
    samples.add("nodes", [node_row()])
    samples.add("queues", [queue_row()])
    assert metrics.values("system.cpu.utilization", "lltm.node") == {("n1",): 0.5}
    assert metrics.values("lltm.queue.waiting", "lltm.gateway", "gen_ai.request.model") == {("gateway-0", "tiny"): 3}


def test_what_is_gone_is_no_longer_observed(samples: Samples, metrics: Metrics) -> None:
    samples.add("gpus", [gpu_row(at_unix_nano=SECOND)])
    assert "hw.power" in metrics.read()
    samples.forget(100.0)
    assert "hw.power" not in metrics.read()
