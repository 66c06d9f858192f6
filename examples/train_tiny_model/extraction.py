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
            "{engine}, {tokens} tokens, {latency_ms} ms.",
            "It was {engine} that wrote {tokens} tokens in {latency_ms} ms.",
            "Within {latency_ms} ms we had {tokens} tokens from {engine}.",
            "For {tokens} tokens {engine} took {latency_ms} ms.",
            "The {tokens} tokens of {engine} cost {latency_ms} ms.",
            "From {engine} came {tokens} tokens; waiting time {latency_ms} ms.",
            "{latency_ms} milliseconds passed until {engine} had sent {tokens} tokens.",
            "During {latency_ms} ms the engine {engine} streamed {tokens} tokens.",
            "{tokens} tokens in {latency_ms} ms: that was {engine}.",
            "In {latency_ms} milliseconds {engine} completed a reply of {tokens} tokens.",
            "Tokens: {tokens}; engine: {engine}; latency: {latency_ms} ms.",
            "Our client saw {tokens} tokens, {latency_ms} ms, from {engine}.",
            "A reply by {engine} lasted {latency_ms} ms and held {tokens} tokens.",
            "By {engine}: {latency_ms} ms, {tokens} tokens.",
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
            "GPU {gpu}, {temperature_c} C, {power_w} W.",
            "Card {gpu}: {temperature_c} C at {power_w} watts.",
            "Temperature {temperature_c} C, power {power_w} W, GPU {gpu}.",
            "The meter of GPU {gpu} says {power_w} W, its sensor {temperature_c} C.",
            "We measured {power_w} W on GPU {gpu}, which is {temperature_c} C warm.",
            "A temperature of {temperature_c} C was read from GPU {gpu} at {power_w} W.",
            "{temperature_c} degrees and {power_w} watts are the values of GPU {gpu}.",
            "While GPU {gpu} draws {power_w} W, it is {temperature_c} degrees warm.",
            "Power: {power_w} W; temperature: {temperature_c} C; GPU: {gpu}.",
            "Device {gpu} stands at {temperature_c} C and consumes {power_w} W.",
            "It is {temperature_c} C on GPU {gpu}, with {power_w} W drawn.",
            "For GPU {gpu} the log has {temperature_c} C and {power_w} W.",
            "{power_w} W go into GPU {gpu}, whose temperature is {temperature_c} C.",
            "GPU {gpu} needs {power_w} W; {temperature_c} C is its temperature.",
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
            "{user}, {model}, {status}.",
            "{status}: {user} had asked {model}.",
            "With {status} the model {model} answered {user}.",
            "{model} was called by {user}; the status was {status}.",
            "To {user} the model {model} returned {status}.",
            "From {model}, {user} got back {status}.",
            "{user} sent a prompt to {model} and saw {status}.",
            "A {status} came back when {user} called {model}.",
            "The status was {status} after {user} had used {model}.",
            "It was {user} who asked {model}; code {status}.",
            "Status: {status}; user: {user}; model: {model}.",
            "The reply to {user} was {status}, sent by {model}.",
            "{user} tried {model}: the answer was {status}.",
            "By {model}, {user} was given status {status}.",
            "On behalf of {user} we called {model} and {status} was returned.",
            "The user {user} met a {status} at {model}.",
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
            "{file}, {size_mb} MB, {quantization}.",
            "{quantization}, {size_mb} MB, {file}.",
            "The model file {file} has {quantization} weights and {size_mb} MB.",
            "On disk {file} takes {size_mb} MB as {quantization}.",
            "Stored as {quantization}, {file} is {size_mb} MB large.",
            "{size_mb} MB of {quantization} weights lie in {file}.",
            "Of type {quantization} and {size_mb} MB: that is {file}.",
            "There is {file} with {size_mb} MB; it is quantized to {quantization}.",
            "File: {file}; type: {quantization}; size: {size_mb} MB.",
            "We wrote {file} in {quantization}, and it became {size_mb} MB.",
            "Its {size_mb} MB make {file} a {quantization} model.",
            "{file} weighs {size_mb} MB, because it is {quantization}.",
            "The {quantization} version is {file}, {size_mb} MB.",
            "How large is {file}? In {quantization} it is {size_mb} MB.",
            "For {file} the disk gives {size_mb} MB; the weights are {quantization}.",
            "You find {size_mb} MB in {file}, type {quantization}.",
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
            "{host}, port {port}: {healthy}.",
            "{port} on {host}: {healthy}.",
            "Now {host} is {healthy}; its port is {port}.",
            "The machine {host} with port {port} was {healthy}.",
            "It is {healthy}, the server {host} at port {port}.",
            "A probe of {host}:{port} found it {healthy}.",
            "Our monitor calls {host} {healthy}; it asked port {port}.",
            "Host: {host}; port: {port}; state: {healthy}.",
            "Through port {port} we see that {host} is {healthy}.",
            "The service at {host}:{port} was {healthy} today.",
            "State of {host} on port {port}: {healthy}.",
            "{host} has port {port} open and is {healthy}.",
            "When asked at {port}, {host} turned out {healthy}.",
            "Port {port} was tried, and {host} is {healthy}.",
            "{healthy} is what {host} is, and {port} is its port.",
            "On port {port} there is {host}, which is {healthy}.",
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
            "{engine}, {slots} slots, {state}.",
            "{slots} slots, {state}, {engine}.",
            "{engine} went {state} with its {slots} slots.",
            "Right now {slots} slots are on {engine}; its state is {state}.",
            "The directory lists {engine} as {state} with {slots} slots.",
            "It is {state}: engine {engine}, which has {slots} slots.",
            "Engine: {engine}; slots: {slots}; state: {state}.",
            "{engine} offers {slots} slots and its state is {state}.",
            "Of the engines, {engine} with {slots} slots is {state}.",
            "Status shows {engine} as {state}; slots {slots}.",
            "{slots} slots are what {engine} has, and it is {state}.",
            "We saw {engine} {state}, and it had {slots} slots.",
            "As {state} we list {engine}, which has {slots} slots.",
            "{engine} became {state}; it has {slots} slots.",
            "With the state {state}, {engine} holds {slots} slots.",
            "How is {engine}? It is {state} and has {slots} slots.",
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
_AROUND = ("{}", "{}", "{}", "Log: {}", "Note: {}", "Monitor says: {}", "{} That is all.", "Hello. {}", "{} Thanks.")
"""What stands about a sentence in training, where there may be something."""


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
    if wordings is TRAINED:
        sentence = dice.choice(_AROUND).format(sentence)
    return Task(sentence, {name: values[name] for name in keys}, dice.choice(_ASKING))
