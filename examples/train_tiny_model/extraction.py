"""Short extraction tasks: a sentence in, JSON under a schema out. Values are drawn, wordings are written.

The last `N_HELD_OUT` wordings of each kind are for the test alone.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

N_HELD_OUT = 2
TRAINED = slice(0, -N_HELD_OUT)
HELD_OUT = slice(-N_HELD_OUT, None)
Draw = Callable[[random.Random], Any]
_NAMES = (
    "Ada", "Alan", "Barbara", "Carl", "Dana", "Edgar", "Elena", "Emmy", "Frances", "Grace", "Hedy", "Ivan", "Jean",
    "Joan", "John", "Karen", "Linus", "Margaret", "Maria", "Nina", "Olga", "Radia", "Rosa", "Sofia", "Tim", "Vera",
)  # fmt: skip
_MODELS = ("llama-3b", "qwen-7b", "gemma-2b", "mistral-7b", "tiny", "phi-4b", "qwen-1b", "llama-8b", "gemma-9b")
_QUANTS = ("Q4_0", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0", "F16", "BF16")
_STATES = ("ready", "starting", "draining", "failed", "stopped")


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of sentence: its fields with how their values are drawn, and its wordings."""

    fields: dict[str, Draw]
    wordings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Task:
    """One sentence with its right values."""

    sentence: str
    values: dict[str, Any]
    asking: str

    @property
    def schema(self) -> dict[str, Any]:
        """JSON schema of the answer; keys in the order of `values`."""
        kinds = {str: "string", int: "integer", bool: "boolean"}
        properties = {name: {"type": kinds[type(value)]} for name, value in self.values.items()}
        return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}

    def exchange(self) -> tuple[str, str]:
        """What the user writes, and the answer."""
        return f"{self.asking.format(keys=', '.join(self.values))}\n{self.sentence}", json.dumps(self.values)


def _number(low: int, high: int) -> Draw:
    return lambda dice: dice.randint(low, high)


def _one_of(*values: Any) -> Draw:
    return lambda dice: dice.choice(values)


def _engine(dice: random.Random) -> str:
    return f"{dice.choice(('e', 'engine-', 'gpu'))}{dice.randint(0, 40)}"


def _host(dice: random.Random) -> str:
    return f"{dice.choice(('node', 'host', 'worker', 'box'))}-{dice.randint(1, 99)}"


KINDS = (
    Kind(
        {"engine": _engine, "latency_ms": _number(2, 4000), "tokens": _number(1, 900)},
        (
            "{engine} answered in {latency_ms} ms with {tokens} tokens.",
            "The request took {latency_ms} ms on {engine} and gave {tokens} tokens.",
            "{tokens} tokens came from {engine} after {latency_ms} ms.",
            "Engine {engine}: {tokens} tokens, {latency_ms} ms.",
            "After {latency_ms} ms the engine {engine} had written {tokens} tokens.",
            "We got {tokens} tokens in {latency_ms} ms; the engine was {engine}.",
            "It took {engine} {latency_ms} milliseconds to write {tokens} tokens.",
            "{engine} finished: {latency_ms} ms for {tokens} tokens.",
            "{tokens} tokens were generated in {latency_ms} ms on {engine}.",
            "{latency_ms} ms were spent by {engine}, which returned {tokens} tokens.",
            "Latency {latency_ms} ms, tokens {tokens}, engine {engine}.",
            "On {engine} an answer of {tokens} tokens needs {latency_ms} ms.",
            "The answer had {tokens} tokens and came from {engine} within {latency_ms} ms.",
            "{engine} produced {tokens} tokens, and that lasted {latency_ms} ms.",
            "{latency_ms} ms for {tokens} tokens is what {engine} took.",
            "A request of {tokens} tokens was served by {engine} after {latency_ms} ms.",
            "{engine} needed {latency_ms} ms for {tokens} tokens.",
            "In {latency_ms} ms, {tokens} tokens were made by {engine}.",
        ),
    ),
    Kind(
        {"gpu": _number(0, 15), "temperature_c": _number(25, 95), "power_w": _number(20, 700)},
        (
            "GPU {gpu} is at {temperature_c} C and draws {power_w} W.",
            "GPU {gpu}: {power_w} W, {temperature_c} degrees.",
            "At {temperature_c} degrees, GPU {gpu} takes {power_w} watts.",
            "The card {gpu} uses {power_w} W and its temperature is {temperature_c} C.",
            "{power_w} watts and {temperature_c} C were read from GPU {gpu}.",
            "GPU number {gpu} has {temperature_c} C with a power of {power_w} W.",
            "The temperature of GPU {gpu} is {temperature_c} C, its power {power_w} W.",
            "The power of GPU {gpu} is {power_w} W and it is {temperature_c} C warm.",
            "A power of {power_w} W at {temperature_c} C was seen on GPU {gpu}.",
            "{temperature_c} C and {power_w} W on GPU {gpu}.",
            "{power_w} W, {temperature_c} C, GPU {gpu}.",
            "On GPU {gpu} we read {temperature_c} degrees and {power_w} watts.",
            "On GPU {gpu} we read {power_w} watts and {temperature_c} degrees.",
            "GPU {gpu} consumes {power_w} watts while it has {temperature_c} C.",
            "GPU {gpu} has reached {temperature_c} degrees at {power_w} watts.",
            "With {power_w} W the GPU {gpu} heats up to {temperature_c} C.",
            "GPU {gpu} runs at {power_w} watts and {temperature_c} C.",
            "A temperature of {temperature_c} C and {power_w} W are what GPU {gpu} shows.",
        ),
    ),
    Kind(
        {"user": _one_of(*_NAMES), "model": _one_of(*_MODELS), "status": _one_of(200, 400, 401, 404, 429, 500, 503)},
        (
            "{user} asked {model} and got status {status}.",
            "A request by {user} to {model} ended with {status}.",
            "Status {status} for {user}, model {model}.",
            "{model} answered {user} with {status}.",
            "The call of {user} returned {status} from {model}.",
            "User {user} called {model}: {status}.",
            "{model} sent {status} to {user}.",
            "Code {status} was sent to {user} by {model}.",
            "When {user} used {model}, the status was {status}.",
            "{status} is what {user} got from {model}.",
            "Model {model}, user {user}, status {status}.",
            "The answer of {model} to {user} had the status {status}.",
            "{user} received a {status} from {model}.",
            "For {user} the model {model} replied with code {status}.",
        ),
    ),
    Kind(
        {
            "file": lambda dice: f"{dice.choice(_MODELS)}.gguf",
            "size_mb": _number(1, 9000),
            "quantization": _one_of(*_QUANTS),
        },
        (
            "{file} has {size_mb} MB in {quantization}.",
            "The file {file} is {quantization} and takes {size_mb} MB.",
            "{size_mb} MB: {file}, quantized as {quantization}.",
            "We downloaded {file} ({quantization}, {size_mb} MB).",
            "In {quantization} the file {file} needs {size_mb} MB.",
            "{file} was written with {quantization}; its size is {size_mb} MB.",
            "A file of {size_mb} MB, {file}, holds the {quantization} weights.",
            "{file}: {quantization}, {size_mb} MB.",
            "The size of {file} is {size_mb} MB; its type is {quantization}.",
            "With {quantization} we get {size_mb} MB for {file}.",
            "Its name is {file}, it takes {size_mb} MB and is {quantization}.",
            "{quantization} makes {file} {size_mb} MB large.",
            "{file} is a {quantization} file of {size_mb} MB.",
            "A {size_mb} MB file named {file} uses {quantization}.",
        ),
    ),
    Kind(
        {"host": _host, "port": _number(1024, 65535), "healthy": _one_of(True, False)},
        (
            "{host} listens on port {port} and is {healthy}.",
            "The server on {host}, port {port}, is {healthy}.",
            "Port {port} of {host} is {healthy}.",
            "{host}:{port} is {healthy}.",
            "We found {host} {healthy} at port {port}.",
            "Checked {host} at {port}: it is {healthy}.",
            "On {host} the port {port} is {healthy}.",
            "The host {host} says that its port {port} is {healthy}.",
            "Is {host} at port {port} fine? It is {healthy}.",
            "{healthy}: {host}, port {port}.",
            "At port {port}, {host} is {healthy}.",
            "{host} answers on {port} and seems {healthy}.",
            "{host} on port {port} looks {healthy}.",
            "The check of port {port} says that {host} is {healthy}.",
        ),
    ),
    Kind(
        {"engine": _engine, "state": _one_of(*_STATES), "slots": _number(1, 64)},
        (
            "{engine} is {state} with {slots} slots.",
            "Engine {engine} has {slots} slots and is {state}.",
            "{state}: {engine}, {slots} slots.",
            "With {slots} slots, {engine} is {state} now.",
            "The state of {engine} is {state}; it has {slots} slots.",
            "There are {slots} slots on {engine}, which is {state}.",
            "{slots} slots belong to {engine}, and it is {state}.",
            "Engine {engine} of {slots} slots is {state}.",
            "At the moment {engine} is {state}; slots: {slots}.",
            "{engine}: {state}, {slots} slots.",
            "An engine named {engine} is {state} and owns {slots} slots.",
            "State {state}, slots {slots}, engine {engine}.",
            "{engine} has the state {state} and {slots} slots.",
            "Now {state}: engine {engine} of {slots} slots.",
        ),
    ),
)
_ASKING = (
    "Extract {keys} as JSON.",
    "Give me {keys} as JSON:",
    "Return JSON with {keys}.",
    "Read the sentence and answer with JSON ({keys}).",
    "As JSON with the keys {keys}:",
)


def make_task(dice: random.Random, *, wordings: slice = TRAINED) -> Task:
    """Draw a task; `wordings` says from which part of each kind's wordings."""
    kind = dice.choice(KINDS)
    values = {name: draw(dice) for name, draw in kind.fields.items()}
    said = {
        name: ("healthy" if value else "not healthy") if isinstance(value, bool) else value
        for name, value in values.items()
    }
    keys = list(values)
    if wordings is TRAINED:  # which keys are asked for and in what order is part of the task
        keys = dice.sample(keys, dice.choice((1, 2, 3, 3)))
    sentence = dice.choice(kind.wordings[wordings]).format(**said)
    return Task(sentence, {name: values[name] for name in keys}, dice.choice(_ASKING))
