"""Metrics of samples: GPUs, machines, llama-servers and their processes, queues; read when somebody reads metrics.

Names: https://opentelemetry.io/docs/specs/semconv/system/ (`hw.*`, `process.*`, `system.*`); what they
lack is `lltm.*` and `llamacpp.*`.
Fractions are 0..1, sizes bytes, energy joules. What a device does not tell is not observed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, Final, NamedTuple

from opentelemetry.metrics import Observation

from lltm_ray.telemetry import semconv as names
from lltm_ray.telemetry.health import Meter
from lltm_ray.telemetry.rows import GpuRow, NodeRow, QueueRow, ServerRow
from lltm_ray.telemetry.samples import THROTTLES, Samples

_Labels = dict[str, Any]
_Value = float | int | None


class _Sampled(NamedTuple):
    """A metric that is a function of one sample; several of one name differ by their labels."""

    name: str
    kind: str
    unit: str
    text: str
    value: Callable[[Any], _Value]
    labels: Mapping[str, str] = {}


def _field(name: str) -> Callable[[Any], _Value]:
    return lambda row: getattr(row, name)


def _over(part: str, whole: str) -> Callable[[Any], _Value]:
    def ratio(row: Any) -> _Value:
        share, all_ = getattr(row, part), getattr(row, whole)
        return share / all_ if share is not None and all_ else None

    return ratio


def _bit(bits: int) -> Callable[[Any], _Value]:
    return lambda row: None if row.throttle is None else int(bool(row.throttle & bits))


_TASK = "hw.gpu.task"
_DIRECTION = "network.io.direction"

GPU_METRICS: Final = (
    _Sampled(
        "hw.gpu.utilization",
        "gauge",
        "1",
        "Time with a kernel running",
        _field("utilization_ratio"),
        {_TASK: "general"},
    ),
    _Sampled("hw.gpu.utilization", "gauge", "1", "", _field("encoder_ratio"), {_TASK: "encoder"}),
    _Sampled("hw.gpu.utilization", "gauge", "1", "", _field("decoder_ratio"), {_TASK: "decoder"}),
    _Sampled("hw.gpu.memory.limit", "up_down_counter", "By", "Size of the GPU's memory", _field("memory_total_bytes")),
    _Sampled("hw.gpu.memory.usage", "up_down_counter", "By", "GPU memory in use", _field("memory_used_bytes")),
    _Sampled(
        "hw.gpu.memory.utilization", "gauge", "1", "GPU memory in use", _over("memory_used_bytes", "memory_total_bytes")
    ),
    _Sampled("hw.gpu.io", "counter", "By", "Bytes over PCIe", _field("pcie_sent_bytes"), {_DIRECTION: "transmit"}),
    _Sampled("hw.gpu.io", "counter", "By", "", _field("pcie_received_bytes"), {_DIRECTION: "receive"}),
    _Sampled("hw.errors", "counter", "{error}", "ECC errors", _field("ecc_corrected"), {"error.type": "corrected"}),
    _Sampled("hw.errors", "counter", "{error}", "", _field("ecc_uncorrected"), {"error.type": "uncorrected"}),
    _Sampled("hw.power", "gauge", "W", "Power drawn now", _field("power_w")),
    _Sampled("hw.energy", "counter", "J", "Energy since the driver was loaded", _field("energy_j")),
    _Sampled("hw.temperature", "gauge", "Cel", "Temperature", _field("temperature_c")),
    _Sampled("lltm.gpu.power_limit", "gauge", "W", "Power limit enforced now", _field("power_limit_w")),
    *(
        _Sampled(
            "lltm.gpu.throttled",
            "gauge",
            "{throttle}",
            "1 while the clocks are held down, by reason",
            _bit(bits),
            {"reason": reason},
        )
        for reason, bits in THROTTLES.items()
    ),
)
SERVER_METRICS: Final = (
    _Sampled("lltm.slots.busy", "gauge", "{slot}", "Slots that work", _field("slots_busy")),
    _Sampled("lltm.slots.limit", "gauge", "{slot}", "Slots there are", _field("slots_total")),
    _Sampled("lltm.context.usage", "gauge", "{token}", "Tokens that slots hold", _field("context_used_tokens")),
    _Sampled("lltm.context.limit", "gauge", "{token}", "Tokens that slots have room for", _field("context_tokens")),
    _Sampled("lltm.engine.restarts", "counter", "{restart}", "Times its server was started again", _field("restarts")),
    _Sampled(
        "lltm.gpu.process.memory", "gauge", "By", "GPU memory of the server's process", _field("gpu_memory_bytes")
    ),
    _Sampled("lltm.gpu.process.share", "gauge", "By", "GPU memory its share allows", _field("gpu_memory_share_bytes")),
    _Sampled("llamacpp.requests.processing", "gauge", "{request}", "Requests in slots", _field("processing")),
    _Sampled(
        "llamacpp.requests.deferred", "gauge", "{request}", "Requests that wait in llama-server", _field("deferred")
    ),
    _Sampled(
        "llamacpp.busy_slots_per_decode",
        "gauge",
        "{slot}",
        "Mean batch, since it started",
        _field("busy_slots_per_decode"),
    ),
    _Sampled("process.cpu.time", "counter", "s", "CPU time of the server's process", _field("cpu_s")),
    _Sampled("process.memory.usage", "up_down_counter", "By", "Its resident memory", _field("memory_bytes")),
    _Sampled("process.memory.virtual", "up_down_counter", "By", "Its virtual memory", _field("virtual_bytes")),
    _Sampled("process.thread.count", "up_down_counter", "{thread}", "Its threads", _field("threads")),
    _Sampled(
        "process.unix.file_descriptor.count",
        "up_down_counter",
        "{file_descriptor}",
        "Its open files",
        _field("open_files"),
    ),
)
COUNTED_METRICS: Final = {
    "prompt_tokens": ("llamacpp.prompt.tokens", "{token}", "Prompt tokens computed"),
    "prompt_tokens_cached": ("llamacpp.prompt.tokens.cached", "{token}", "Prompt tokens found cached"),
    "prompt_seconds": ("llamacpp.prompt.time", "s", "Time in prompts"),
    "predicted_tokens": ("llamacpp.predicted.tokens", "{token}", "Tokens generated"),
    "predicted_seconds": ("llamacpp.predicted.time", "s", "Time in generation"),
    "decodes": ("llamacpp.decodes", "{call}", "Calls of llama_decode"),
    "draft_tokens": ("llamacpp.draft.tokens", "{token}", "Draft tokens"),
    "draft_accepted": ("llamacpp.draft.accepted", "{token}", "Draft tokens that were accepted"),
}
"""llama.cpp's own counters, by field of `ServerRow`; they go on over a server's restart."""
NODE_METRICS: Final = (
    _Sampled("system.cpu.utilization", "gauge", "1", "Of all CPUs", _field("cpu_ratio")),
    _Sampled("system.cpu.logical.count", "gauge", "{cpu}", "CPUs", _field("cpus")),
    _Sampled("system.memory.usage", "up_down_counter", "By", "Memory in use", _field("memory_used_bytes")),
    _Sampled("system.memory.limit", "up_down_counter", "By", "Memory there is", _field("memory_total_bytes")),
    _Sampled("system.cpu.load_average.1m", "gauge", "{process}", "Load average of a minute", _field("load_1m")),
)
QUEUE_METRICS: Final = (
    _Sampled("lltm.queue.waiting", "gauge", "{request}", "Requests that wait for a slot", _field("waiting")),
    _Sampled("lltm.queue.running", "gauge", "{request}", "Requests in slots", _field("running")),
    _Sampled(
        "lltm.queue.predicted_wait", "gauge", "s", "Of the request that would join now", _field("predicted_wait_s")
    ),
)


def observe_samples(meter: Meter, samples: Samples) -> None:
    """Make every metric above read the latest samples."""
    _observe(meter, GPU_METRICS, samples.gpus.values, _gpu_labels)
    _observe(meter, SERVER_METRICS, samples.servers.values, _server_labels)
    _observe(meter, NODE_METRICS, samples.nodes.values, _node_labels)
    _observe(meter, QUEUE_METRICS, samples.queues.values, _queue_labels)
    for field, (name, unit, text) in COUNTED_METRICS.items():
        meter.observe(name, "counter", unit, text, partial(_totals, samples, field))


def _observe(
    meter: Meter,
    metrics: Iterable[_Sampled],
    rows: Callable[[], Iterable[Any]],
    labels: Callable[[Any], _Labels],
) -> None:
    named: dict[str, list[_Sampled]] = {}
    for metric in metrics:
        named.setdefault(metric.name, []).append(metric)
    for name, parts in named.items():

        def read(_: object, parts: list[_Sampled] = parts) -> Iterator[Observation]:
            for row in list(rows()):
                own = labels(row)
                for part in parts:
                    value = part.value(row)
                    if value is not None:
                        yield Observation(value, {**own, **part.labels})

        meter.observe(name, parts[0].kind, parts[0].unit, parts[0].text, read)


def _totals(samples: Samples, field: str, _: object) -> Iterator[Observation]:
    for engine, row in samples.servers.copy().items():
        value = samples.total(engine, field)
        if value is not None:
            yield Observation(value, _server_labels(row))


def _gpu_labels(row: GpuRow) -> _Labels:
    return {"hw.id": row.uuid, "hw.type": "gpu", "hw.name": row.name, "hw.vendor": "NVIDIA", names.NODE: row.node}


def _server_labels(row: ServerRow) -> _Labels:
    return {names.ENGINE: row.engine, names.REQUEST_MODEL: row.model}


def _node_labels(row: NodeRow) -> _Labels:
    return {names.NODE: row.node, "host.ip": row.address}


def _queue_labels(row: QueueRow) -> _Labels:
    return {"lltm.gateway": row.gateway, names.REQUEST_MODEL: row.model}
