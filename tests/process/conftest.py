"""Real llama.cpp servers as child processes on a model of 0.5 MB, shared by the tests of this folder.

`server`, `embedding_server`, `rerank_server` live for the session; `spawn_server` starts one for a test that breaks it.
`faces` makes clients: each test that asks for it runs on the blocking client and on the async one.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from failover_harness import write_model
from gateway_harness import Engine, real_engine

from lltm_ray.config import SIMILARITY_RATIO
from lltm_ray.llamacpp.client import AsyncLlamaClient, LlamaClient
from lltm_ray.models.random_weights import RandomShape, ensure_random, write_random
from lltm_ray.records import EngineInfo

# The child ends when its stdin does, so it cannot outlive the tests however they die.
_CHILD = """
import json, os, sys
import xllamacpp
settings = json.loads(sys.argv[1])
params = xllamacpp.CommonParams()
params.model.path = settings.pop("model")
params.hostnames = ["127.0.0.1"]
pooling = settings.pop("pooling", None)
if pooling:
    params.embedding = True
    params.pooling_type = xllamacpp.llama_pooling_type["LLAMA_POOLING_TYPE_" + pooling]
for name, value in settings.items():
    setattr(params, name, value)
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1  # more spin against each other on a small machine
server = xllamacpp.Server(params)
print(server.listening_address, flush=True)
sys.stdin.read()
os._exit(0)
"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whoever waits here says sooner what did not come to be; on a busy machine servers take minutes."""
    for item in items:
        if item.path.parent == Path(__file__).parent and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(300))


@dataclass(frozen=True)
class RunningServer:
    """A live llama-server: `url` and `api_key` for a client, `slot_dir` where it saves slots."""

    url: str
    api_key: str
    slot_dir: Path
    process: subprocess.Popen[str]

    @property
    def credentials(self) -> dict[str, str]:
        """What a client's constructor wants."""
        return {"url": self.url, "api_key": self.api_key}


Spawn = Callable[..., RunningServer]


@contextmanager
def running_server(model: Path, slot_dir: Path, **settings: Any) -> Iterator[RunningServer]:
    """Start a server, wait until it listens, end it; `settings` are fields of xllamacpp's CommonParams."""
    defaults: dict[str, Any] = {
        "model": str(model),
        "port": 0,
        "n_parallel": 4,
        "n_ctx": 4 * 32_768,
        "n_threads_http": 24,  # a stream holds one for its whole life
        "endpoint_metrics": True,
        "endpoint_slots": True,
        "endpoint_props": True,
        "api_keys": ["secret"],
        "slot_save_path": f"{slot_dir}/",
    }
    arguments = [sys.executable, "-c", _CHILD, json.dumps(defaults | settings)]
    log = slot_dir / "server.log"
    with (
        log.open("w") as stderr,
        subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True) as process,
    ):
        try:
            url = process.stdout.readline().strip()
            assert url.startswith("http://"), log.read_text()[-2000:]
            yield RunningServer(url, (defaults | settings)["api_keys"][0], slot_dir, process)
        finally:
            process.kill()


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The random model with a context long enough for generations that take seconds."""
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    write_random(path, RandomShape(n_ctx=32_768))
    return path


@pytest.fixture(scope="session")
def server(tiny_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server with four slots of 32 k tokens."""
    with running_server(tiny_gguf, tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture(scope="session")
def embedding_server(tiny_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server that answers embeddings (mean pooling)."""
    with running_server(tiny_gguf, tmp_path_factory.mktemp("embedding"), n_ctx=2048, pooling="MEAN") as running:
        yield running


@pytest.fixture(scope="session")
def rerank_server(tiny_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server that ranks documents (rank pooling)."""
    with running_server(tiny_gguf, tmp_path_factory.mktemp("rerank"), n_ctx=2048, pooling="RANK") as running:
        yield running


@pytest.fixture
def spawn_server(tiny_gguf: Path, tmp_path: Path) -> Iterator[Spawn]:
    """Start servers for this test alone; they are ended after it."""
    with ExitStack() as stack:

        def spawn(**settings: Any) -> RunningServer:
            return stack.enter_context(running_server(tiny_gguf, tmp_path, **settings))

        yield spawn


Faces = Callable[..., "Face"]


class Face:
    """Either client behind one awaitable call, so that each test runs on both; a stream comes as a list."""

    def __init__(self, kind: str, **settings: Any) -> None:
        self.client: Any = LlamaClient(**settings) if kind == "sync" else AsyncLlamaClient(**settings)

    async def __call__(self, name: str, *args: Any, **kwargs: Any) -> Any:
        method = getattr(self.client, name)
        if isinstance(self.client, AsyncLlamaClient):
            if name.endswith("_stream"):
                return [event async for event in method(*args, **kwargs)]
            return await method(*args, **kwargs)
        if name.endswith("_stream"):
            return await asyncio.to_thread(lambda: list(method(*args, **kwargs)))
        return await asyncio.to_thread(method, *args, **kwargs)

    async def close(self) -> None:
        if isinstance(self.client, AsyncLlamaClient):
            await self.client.aclose()
        else:
            self.client.close()


@pytest.fixture(params=["sync", "async"])
async def faces(request: pytest.FixtureRequest) -> AsyncIterator[Faces]:
    """Makes clients of one kind, and closes them."""
    made: list[Face] = []

    def make(**settings: Any) -> Face:
        made.append(Face(request.param, **settings))
        return made[-1]

    yield make
    for face in made:
        await face.close()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in model."""
    return ensure_random(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def pair(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Engine, ...]]:
    """Two real servers for a gateway to stand before."""
    with ExitStack() as stack:
        folder = tmp_path_factory.mktemp("engines")
        yield tuple(stack.enter_context(real_engine(name, tiny, folder)) for name in ("e0", "e1"))


@pytest.fixture(scope="module")
def heirs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[EngineInfo, ...]]:
    """An engine of four slots, and the one that is started when it is gone: so alike that it restores its slots."""
    folder = tmp_path_factory.mktemp("engines")
    model = write_model(folder / "tiny.gguf")
    with ExitStack() as stack:
        started = [
            stack.enter_context(real_engine(name, model, folder, slots=4, similarity=SIMILARITY_RATIO))
            for name in ("e0", "e1")
        ]
        yield tuple(each.info.with_(slot_seal="the same model and settings") for each in started)
