"""Real llama.cpp servers for the peers: the very command line that lltm_ray's own engines get."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import gguf
import numpy as np

from lltm_ray.config import EngineConfig
from lltm_ray.llamacpp.command import build_args
from lltm_ray.models.random_weights import RandomShape, write_random

from . import install
from .peers import Peer, front
from .processes import Running, StartError, free_port, running

ENGINES, SLOTS, SLOT_TOKENS = 4, 4, 4096
SHAPE = RandomShape(n_embd=128, n_layer=4, n_ff=384, n_ctx=8192)
"""Small enough for a laptop's CPU, large enough that prefill costs: about 0.15 ms a token, one token a character."""
SOFTENING = 0.4
SETTINGS: dict[str, Any] = {
    "n_ctx": SLOTS * SLOT_TOKENS,
    "n_parallel": SLOTS,
    "n_threads": 1,
    "n_threads_batch": 1,
    "n_threads_http": 64,
    "cache_ram_mib": 512,
    # Rounding in f16 lets the same greedy text come out otherwise, one in fifteen, as other requests share the batch.
    "flash_attn": "off",
    "cache_type_k": "f32",
    "cache_type_v": "f32",
}


@dataclass(frozen=True)
class Server:
    """One llama-server, whoever runs it."""

    url: str
    pid: int
    key: str = ""

    def get(self, path: str, body: Any = None, timeout_s: float = 30.0) -> Any:
        """A JSON answer, or text where it is none."""
        data = None if body is None else json.dumps(body).encode()
        headers = {"content-type": "application/json", "authorization": f"Bearer {self.key}"}
        request = urllib.request.Request(self.url + path, data, headers)
        with urllib.request.urlopen(request, timeout=timeout_s) as answer:
            text = answer.read().decode()
        return json.loads(text) if text[:1] in "{[" else text

    def counters(self) -> dict[str, float]:
        """Totals since its start: `prompt_tokens_total` (computed, not reused), `tokens_predicted_total`, ..."""
        try:
            lines = self.get("/metrics").splitlines()
        except OSError:  # killed in this run
            return {}
        pairs = (line.split() for line in lines if line.startswith("llamacpp:") and "{" not in line)
        return {name.removeprefix("llamacpp:"): float(value) for name, value in pairs}

    def busy(self) -> int:
        """Slots at work."""
        try:
            return sum(slot["is_processing"] for slot in self.get("/slots"))
        except OSError:
            return 0


@dataclass(frozen=True)
class Fleet:
    """Real engines behind one peer."""

    peer: Peer
    ports: tuple[int, ...]
    """Where clients go."""
    servers: tuple[Server, ...]
    front_pid: int | None

    def total(self, name: str) -> float:
        """A counter, summed over the servers."""
        return sum(server.counters().get(name, 0.0) for server in self.servers)


def model(shape: RandomShape = SHAPE) -> Path:
    """The model's file, made on first use."""
    path = install.CACHE / f"bench-{shape.n_embd}-{shape.n_head}-{shape.n_layer}-{shape.n_ff}-{SOFTENING}.gguf"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_suffix(".part")
        write_random(scratch, shape)
        _soften(scratch)
        scratch.replace(path)
    return path


def _soften(path: Path) -> None:
    """Scale queries and keys down: with the sharp attention of the built-in model a rounding error grows to another
    greedy text now and then, and texts could not be compared."""
    reader = gguf.GGUFReader(path, "r+")
    for tensor in reader.tensors:
        if "attn_q" in tensor.name or "attn_k" in tensor.name:
            np.multiply(tensor.data, SOFTENING, out=tensor.data)
    reader.data.flush()


@contextlib.contextmanager
def servers(
    folder: Path, count: int = ENGINES, *, shape: RandomShape = SHAPE, **changes: Any
) -> Iterator[tuple[Server, ...]]:
    """Fresh servers without a key.

    Raises:
        StartError: one did not start.
    """
    with contextlib.ExitStack() as stack:
        started = [stack.enter_context(_server(folder / f"engine-{i}.log", shape, changes)) for i in range(count)]
        for process, server in started:
            _until_healthy(process, server)
        yield tuple(server for _, server in started)


@contextlib.contextmanager
def _server(log: Path, shape: RandomShape, changes: dict[str, Any]) -> Iterator[tuple[Running, Server]]:
    port = free_port()
    config = EngineConfig(**SETTINGS | changes)
    args = build_args(
        config,
        model_path=str(model(shape)),
        host="127.0.0.1",
        port=port,
        alias="bench",
        api_key_file=None,
        n_gpu_layers=0,
    )
    with running([sys.executable, "-m", "lltm_ray.llamacpp.embedded", *args], log) as process:
        yield process, Server(f"http://127.0.0.1:{port}", process.pid)


def _until_healthy(process: Running, server: Server, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline and process.process.poll() is None:
        try:
            server.get("/health", timeout_s=5.0)
            return
        except (OSError, urllib.error.URLError):
            time.sleep(0.05)
    raise StartError(f"an engine did not start: {process.tail()}")


@contextlib.contextmanager
def fleet(peer: Peer, folder: Path) -> Iterator[Fleet]:
    """Fresh engines with this peer before them; lltm_ray runs its own, started with the same settings.

    Raises:
        StartError: something could not be installed or started.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if peer.name == "lltm_ray":
        with _own_fleet(peer, folder) as ours:
            yield ours
        return
    with (
        servers(folder, slot_prompt_similarity=peer.similarity) as behind,
        front(peer, folder, tuple(server.url for server in behind), SLOTS) as target,
    ):
        yield Fleet(peer, target.ports, behind, target.process.pid if target.process else None)


@contextlib.contextmanager
def _own_fleet(peer: Peer, folder: Path) -> Iterator[Fleet]:
    script = Path(__file__).with_name("ours.py")
    engine = SETTINGS | {"slot_prompt_similarity": peer.similarity}
    argv = [sys.executable, str(script), "fleet", str(model()), str(ENGINES), json.dumps(engine)]
    with running(argv, folder / "fleet.log", {"RAY_ADDRESS": "", "RAY_DEDUP_LOGS": "0"}, talks=True) as process:
        told = json.loads(process.first_line())
        behind = tuple(Server(each["url"], each["pid"], each["key"]) for each in told["engines"])
        yield Fleet(peer, (urlsplit(told["url"]).port or 0,), behind, told["pid"])
        assert process.process.stdin is not None
        process.process.stdin.close()  # it stops its fleet and Ray in good order
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.process.wait(20)


def settings() -> dict[str, Any]:
    """For the report."""
    return {"engines": ENGINES, **SETTINGS, "model": asdict(SHAPE)}
