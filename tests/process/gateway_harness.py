"""What the gateway's tests share: real servers, the gateway in this loop, and an upstream that misbehaves on demand."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import gguf
import numpy as np

from lltm_ray.actors.launch import adapters_of
from lltm_ray.config import LLAMA_CPP_SIMILARITY_RATIO, EngineConfig, GatewayConfig, LoraAdapter
from lltm_ray.gateway.app import GatewayApp
from lltm_ray.gateway.auth import ApiKeys
from lltm_ray.gateway.server import serve
from lltm_ray.gateway.session_store import SessionStore
from lltm_ray.gateway.slot_files import SlotFiles
from lltm_ray.gateway.trace import Tracing
from lltm_ray.models.random_weights import RandomShape
from lltm_ray.records import EngineInfo, EngineState, FleetStatus
from lltm_ray.routing.ledger import Ledger
from lltm_ray.routing.router import Router

SLOTS = 2
MODEL = "tiny"
CHAT = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "hello"}],
    "max_tokens": 8,
    "temperature": 0,
    "seed": 1,
}
VOLATILE = {"id", "created", "created_at", "completed_at", "timings", "id_slot", "cached_tokens", "modified_at"}
VOLATILE |= {"cache_read_input_tokens", "input_tokens_details", "prompt_tokens_details"}
"""What differs in the same answer from one run to the next."""
# The child ends when its stdin does, so it cannot outlive the tests however they die.
_CHILD = """
import os, sys, xllamacpp
p = xllamacpp.CommonParams()
p.model.path, p.port, p.hostnames, p.api_keys = sys.argv[1], 0, ["127.0.0.1"], ["engine-key"]
p.n_parallel, p.n_ctx, p.n_threads_http = int(sys.argv[2]), 8192 * int(sys.argv[2]), 16
p.slot_save_path, p.slot_prompt_similarity = sys.argv[3], float(sys.argv[4])
adapters = [xllamacpp.CommonAdapterLoraInfo() for _ in sys.argv[5:]]
for adapter, given in zip(adapters, sys.argv[5:]):
    adapter.path, scale = given.rsplit(":", 1)
    adapter.scale = float(scale)
if adapters:
    p.lora_adapters, p.cache_ram_mib = adapters, 0
# Rounding in f16 lets the same greedy text come out otherwise now and then, as other requests share the batch.
p.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
p.cache_type_k = p.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
p.cpuparams.n_threads = p.cpuparams_batch.n_threads = 1  # more spin against each other on a small machine
p.endpoint_metrics = p.endpoint_slots = p.endpoint_props = True
server = xllamacpp.Server(p)
print(server.listening_address, flush=True)
sys.stdin.read()
os._exit(0)
"""


@dataclass(frozen=True)
class Engine:
    """A real llama.cpp server as the directory would show it."""

    info: EngineInfo
    process: subprocess.Popen[str]

    @property
    def headers(self) -> dict[str, str]:
        """For asking it directly."""
        return {"authorization": f"Bearer {self.info.api_key}"}


@contextlib.contextmanager
def real_engine(
    name: str,
    model: Path,
    log_dir: Path,
    *,
    slots: int = SLOTS,
    lora: Sequence[LoraAdapter] = (),
    similarity: float = LLAMA_CPP_SIMILARITY_RATIO,
) -> Iterator[Engine]:
    """Start a server and wait until it serves; it saves slots in a folder of its own."""
    folder = log_dir / f"{name}-slots"
    folder.mkdir(exist_ok=True)
    with (
        (log_dir / f"{name}.log").open("w") as log,
        subprocess.Popen(
            [
                sys.executable,
                "-c",
                _CHILD,
                str(model),
                str(slots),
                f"{folder}/",
                str(similarity),
                *(f"{x.path}:{x.scale}" for x in lora),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        ) as process,
    ):
        try:
            url = process.stdout.readline().strip()
            assert url.startswith("http://"), (log_dir / f"{name}.log").read_text()[-2000:]
            info = engine_info(name, url, process.pid, slots=slots)
            info = info.with_(slot_folder=str(folder), n_ctx=8192 * slots, cache_ram_tokens=2**20)  # 8 GiB by default
            info = info.with_(slot_similarity_ratio=similarity)
            if lora:
                info = info.with_(adapters=adapters_of(EngineConfig(lora=tuple(lora))), cache_ram_tokens=0)
            yield Engine(info, process)
        finally:
            process.kill()


def write_adapter(path: Path, seed: int = 0, rank: int = 4) -> None:
    """A LoRA adapter for the attention of the random model, strong enough to change what it says."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(rank))
    random, width = np.random.default_rng(seed), RandomShape().n_embd
    for tensor in ("attn_q", "attn_output"):
        for name, shape in {"lora_a": (rank, width), "lora_b": (width, rank)}.items():
            values = (random.standard_normal(shape) / 2).astype(np.float32)
            writer.add_tensor(f"blk.0.{tensor}.weight.{name}", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def infos(engines: Iterable[Engine]) -> list[EngineInfo]:
    """As the directory's table."""
    return [engine.info for engine in engines]


def engine_info(name: str, url: str, pid: int = 1, *, model: str = MODEL, slots: int = SLOTS) -> EngineInfo:
    """A ready engine."""
    return EngineInfo(
        name=name,
        model=model,
        state=EngineState.READY,
        url=url,
        api_key="engine-key",
        slots_total=slots,
        server_pid=pid,
    )


async def until(condition: Callable[[], object], *running: asyncio.Future[Any], timeout_s: float = 60.0) -> None:
    """Wait until it holds; fails at once if one of those that must bring it about has ended before."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        for each in running:
            assert not each.done(), f"it ended before it came to that: {each}"
        assert time.monotonic() < deadline, "it did not come to that"
        await asyncio.sleep(0.002)


@dataclass(frozen=True)
class Gateway:
    """A running gateway and a client session on it."""

    url: str
    app: GatewayApp
    router: Router
    http: aiohttp.ClientSession
    stop: asyncio.Event
    task: asyncio.Task[None]

    @property
    def port(self) -> int:
        """Its real port."""
        return int(self.url.rpartition(":")[2])

    def claims(self) -> dict[str, int]:
        """Busy slots by engine, as the router counts them."""
        return {name: row["slots_busy"] for name, row in self.router.snapshot()["engines"].items()}

    def waiting(self) -> int:
        """Requests in the queue."""
        return sum(self.router.snapshot()["waiting"].values())

    async def slots(self, engine: Engine) -> list[dict[str, Any]]:
        """As the engine itself tells them."""
        async with self.http.get(f"{engine.info.url}/slots", headers=engine.headers) as reply:
            return await reply.json()

    async def until_decoding(self, engine: Engine, *running: asyncio.Future[Any], timeout_s: float = 60.0) -> None:
        """Wait until one of the engine's slots has generated something; fails if who asked for it has ended before."""
        async with asyncio.timeout(timeout_s):
            while not any(
                each["is_processing"] and each["next_token"][0]["n_decoded"] for each in await self.slots(engine)
            ):
                for each in running:
                    assert not each.done(), f"it ended before it was seen: {each}"
                await asyncio.sleep(0.005)

    async def until_free(self, engine: Engine, busy: int = 0, timeout_s: float = 60.0) -> None:
        """Wait until so many slots work; whether they were freed or came to their end, `was_cut_off` tells."""
        async with asyncio.timeout(timeout_s):
            while sum(each["is_processing"] for each in await self.slots(engine)) != busy:
                await asyncio.sleep(0.02)

    async def was_cut_off(self, engine: Engine) -> bool:
        """Whether the engine had more to say in the last answer that it began, of those that it works at no more."""
        ended = [each for each in await self.slots(engine) if not each["is_processing"] and "next_token" in each]
        return bool(max(ended, key=lambda each: each["id_task"])["next_token"][0]["has_next_token"])

    async def idle(self, timeout_s: float = 60.0) -> None:
        """Wait until no slot is claimed, nobody waits and no request runs."""
        await until(
            lambda: not (any(self.claims().values()) or self.waiting() or self.app.running), timeout_s=timeout_s
        )


@contextlib.asynccontextmanager
async def gateway(
    *engines: EngineInfo,
    keys: tuple[str, ...] = (),
    ledger: Ledger | None = None,
    files: SlotFiles | None = None,
    sessions: SessionStore | None = None,
    tracing: Tracing | None = None,
    **settings: object,
) -> AsyncIterator[Gateway]:
    """Run the app on uvicorn in this loop; at the end every claim must be gone. The ledger stays open."""
    config = GatewayConfig(**({"port": 0, "drain_timeout_s": 5.0} | settings))
    router = Router(config.queue_limit, config.queue_timeout_s)
    router.update(engines)
    app = GatewayApp(
        router=router,
        config=config,
        keys=ApiKeys(keys),
        status=lambda: FleetStatus(name="test", engines=router.engines()),
        ledger=ledger,
        files=files,
        sessions=sessions,
        tracing=tracing,
        account=lambda: ledger.counters if ledger else {},
    )
    port: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    stop = asyncio.Event()
    task = asyncio.create_task(serve(app, config, ready=port.set_result, stop=stop))
    await asyncio.wait((port, task), return_when=asyncio.FIRST_COMPLETED)
    if task.done():
        await task
    async with aiohttp.ClientSession() as http:
        running = Gateway(f"http://127.0.0.1:{port.result()}", app, router, http, stop, task)
        try:
            yield running
            await running.idle()
        finally:
            await http.close()
            stop.set()
            await task


Script = Callable[[bytes, asyncio.StreamWriter], Awaitable[None]]


class FakeEngine:
    """A server that does to each request what its script says; only for faults that a real one will not show."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.requests: list[bytes] = []
        self.connections = 0
        self.broken: OSError | None = None

    async def __aenter__(self) -> FakeEngine:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self._writers: set[asyncio.StreamWriter] = set()
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._server.close()
        for writer in list(self._writers):
            writer.transport.abort()
        await asyncio.sleep(0)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.reader = reader
        self._writers.add(writer)
        try:
            while (request := await read_request(reader)) is not None:
                self.requests.append(request)
                await self.script(request, writer)
                await writer.drain()
        except OSError as error:
            self.broken = error
        finally:
            self._writers.discard(writer)
            writer.close()


async def read_request(reader: asyncio.StreamReader) -> bytes | None:
    """Head and body of the next request; None when the client is gone."""
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
    length = next((line.split(b":")[1] for line in head.split(b"\r\n") if line.startswith(b"content-length:")), b"0")
    return head + await reader.readexactly(int(length))


def whole(body: bytes, *, status: int = 200, length: int | None = None) -> bytes:
    """An answer with a Content-Length, which may lie."""
    said = len(body) if length is None else length
    return b"HTTP/1.1 %d X\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (status, said, body)


STREAM_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def event(data: bytes) -> bytes:
    """One SSE event as one HTTP chunk."""
    text = b"data: %s\n\n" % data
    return b"%x\r\n%s\r\n" % (len(text), text)


async def raw(gate: Gateway, data: bytes, timeout_s: float = 60.0) -> bytes:
    """Send bytes as they are and read until the gateway closes; what came before a reset is lost."""
    reader, writer = await asyncio.open_connection("127.0.0.1", gate.port)
    try:
        writer.write(data)
        async with asyncio.timeout(timeout_s):
            return await reader.read()
    except ConnectionError:
        return b""
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
