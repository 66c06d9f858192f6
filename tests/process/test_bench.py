"""`bench` against a real llama.cpp server, and a scripted one for the faults a real one won't show on demand."""

from __future__ import annotations

import asyncio
import gc
import itertools
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import uvloop

from lltm_ray.errors import LltmRayError, UpstreamError
from lltm_ray.load.result import LoadPlan
from lltm_ray.load.run import run_load
from lltm_ray.models.random_weights import ensure_random

BENCH = (sys.executable, "-c", "from lltm_ray.cli import main; main()", "bench")
KEY = "sesame"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Base URL of the embedded engine with the random model, four slots and an API key."""
    folder = tmp_path_factory.mktemp("llama")
    (folder / "keys").write_text(KEY + "\n", encoding="utf-8")
    argv = [sys.executable, "-m", "lltm_ray.llamacpp.embedded", "--model", str(ensure_random(folder)), "--port"]
    argv += ["0", "--host", "127.0.0.1", "--parallel", "4", "--ctx-size", "8192", "--threads-http", "16"]
    argv += ["--threads", "1", "--threads-batch", "1"]  # more spin against each other on a small machine
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([*argv, "--api-key-file", str(folder / "keys")], stdout=log, stderr=log)
        try:
            yield _address(process, folder / "log")
        finally:
            process.kill()
            process.wait()


def _address(process: subprocess.Popen[bytes], log: Path) -> str:
    """Where the server listens, once it serves."""
    deadline = time.monotonic() + 90
    while not (found := re.search(r"embedded: serving (\S+)\n", log.read_text(errors="replace"))):
        assert process.poll() is None, "the server ended"
        assert time.monotonic() < deadline, "the server did not become ready"
        time.sleep(0.05)
    return found[1]


Respond = Callable[[dict[str, Any], asyncio.StreamWriter], Awaitable[bool]]
"""Answers one request body; returns whether the connection may be used again."""


class Scripted:
    """A small HTTP server on this loop; probes (max_tokens 1, no stream) are always answered well."""

    def __init__(self, respond: Respond) -> None:
        self.respond = respond
        self.bodies: list[dict[str, Any]] = []
        self.open = 0
        self.url = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.open += 1
        try:
            while await self._one(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError):
            assert writer.get_extra_info("peername")  # the client is gone, which is what some tests are about
        finally:
            self.open -= 1
            writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(int(line[15:]) for line in head.lower().splitlines() if line.startswith(b"content-length:"))
        body = json.loads(await reader.readexactly(length))
        if body["max_tokens"] == 1 and not body["stream"]:
            words = len(body["messages"][0]["content"].split())
            whole(writer, {"choices": [], "usage": {"prompt_tokens": 10 + 2 * words, "completion_tokens": 1}})
            return True
        self.bodies.append(body)
        return await self.respond(body, writer)


@asynccontextmanager
async def scripted(respond: Respond) -> AsyncIterator[Scripted]:
    server = Scripted(respond)
    listener = await asyncio.start_server(server.serve, "127.0.0.1", 0)
    server.url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    try:
        yield server
    finally:
        listener.close()


def whole(writer: asyncio.StreamWriter, answer: dict[str, Any], status: str = "200 OK") -> None:
    body = json.dumps(answer).encode()
    writer.write(b"HTTP/1.1 %s\r\ncontent-length: %d\r\n\r\n%s" % (status.encode(), len(body), body))


def chunk(text: str) -> bytes:
    data = f"data: {text}\n\n".encode()
    return b"%x\r\n%s\r\n" % (len(data), data)


def delta(text: str | None, finish: str | None = None) -> bytes:
    choice = {"index": 0, "finish_reason": finish, "delta": {"content": text}}
    return chunk(json.dumps({"choices": [choice]}, separators=(",", ":")))


HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nx-lltm-engine: e7\r\ntransfer-encoding: chunked\r\n\r\n"
END = chunk("[DONE]") + b"0\r\n\r\n"


async def three_tokens(_body: dict[str, Any], writer: asyncio.StreamWriter) -> bool:
    writer.write(HEAD + delta(None) + delta("a") + delta("b") + delta("c") + delta(None, "stop") + END)
    await writer.drain()
    return True


def plan(url: str, **more: Any) -> LoadPlan:
    return LoadPlan(**({"url": url, "model": "m", "requests": 20, "concurrency": 4, "timeout_s": 60} | more))


def run_cli(*argv: str) -> dict[str, Any]:
    done = subprocess.run([*BENCH, *argv, "--json"], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def test_a_real_server_is_measured_over_streams_and_tokens_are_its_own_count(llama: str, tmp_path: Path) -> None:
    (tmp_path / "key").write_text(KEY, encoding="utf-8")
    common = ("--url", llama, "--api-key-file", str(tmp_path / "key"), "--requests", "40", "--concurrency", "4")
    result = run_cli(*common, "--max-tokens", "8", "--prompt-tokens", "100")
    assert (result["requests"], result["ok"], result["errors"]) == (40, 40, {})
    assert result["output_tokens"] == 40 * 8
    assert result["input_tokens"] / 40 == pytest.approx(100, rel=0.1)
    assert 0 < result["ttft_ms"]["p50"] < result["latency_ms"]["p50"] <= result["latency_ms"]["p99"]
    assert result["per_token_ms"]["p50"] > 0
    assert result["model"].endswith(".gguf")  # nobody named one: the first that the server lists


async def test_a_real_server_in_an_open_loop_without_streams(llama: str) -> None:
    result = await run_load(plan(llama, api_key=KEY, rate=50, requests=30, max_tokens=4, stream=False))
    assert (result.ok, result.errors) == (30, {})
    assert result.output_tokens == 30 * 4
    assert result.ttft_ms is None
    assert result.latency_ms is not None
    assert result.lateness_ms is not None


async def test_a_wrong_key_ends_with_the_servers_own_words(llama: str) -> None:
    with pytest.raises(UpstreamError) as caught:
        await run_load(plan(llama, api_key="wrong"))
    assert caught.value.http_status == 401


async def test_an_address_where_nobody_listens_is_one_clear_sentence() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))  # and does not listen
        with pytest.raises(LltmRayError, match=r"cannot reach http://127\.0\.0\.1:\d+: .*lltm-ray up"):
            await run_load(plan(f"http://127.0.0.1:{silent.getsockname()[1]}"))


async def test_events_are_counted_where_the_server_sends_no_usage_and_engines_are_named() -> None:
    async with scripted(three_tokens) as server:
        result = await run_load(plan(server.url))
    assert (result.ok, result.output_tokens, result.engines) == (20, 60, {"e7": 20})
    assert len(server.bodies) == 20


async def test_prompts_are_unique_from_their_first_words_on_and_sized_by_the_probes() -> None:
    async with scripted(three_tokens) as server:
        await run_load(plan(server.url, requests=100, prompt_tokens=50))
    prompts = [body["messages"][0]["content"].split() for body in server.bodies]
    assert len({tuple(words[:4]) for words in prompts}) == 100
    assert {len(words) for words in prompts} == {20}  # the script counts 10 tokens of template and 2 a word


async def test_a_stream_that_just_ends_is_an_error_although_its_http_is_whole() -> None:
    async def no_done(_body: dict[str, Any], writer: asyncio.StreamWriter) -> bool:
        writer.write(HEAD + delta("a") + b"0\r\n\r\n")
        return True

    async with scripted(no_done) as server:
        result = await run_load(plan(server.url))
    assert (result.ok, result.errors) == (0, {"truncated": 20})
    assert "[DONE]" in result.error_examples["truncated"]


async def test_each_fault_is_counted_under_its_own_name() -> None:
    async def faulty(body: dict[str, Any], writer: asyncio.StreamWriter) -> bool:
        match len(server.bodies) % 5:
            case 0:
                return await three_tokens(body, writer)
            case 1:
                whole(writer, {"error": {"message": "busy"}}, "503 Service Unavailable")
            case 2:
                writer.write(HEAD + delta("a"))  # then the connection breaks
            case 3:
                writer.write(HEAD + delta("a") + chunk('{"error":{"message":"out of memory"}}') + END)
            case 4:
                writer.write(HEAD + chunk("{") + END)
        await writer.drain()
        return False

    async with scripted(faulty) as server:
        result = await run_load(plan(server.url, concurrency=1))
    assert result.ok == 4
    assert result.errors == {"http 503": 4, "truncated": 4, "stream error": 4, "bad answer": 4}
    assert "out of memory" in result.error_examples["stream error"]
    assert "busy" in result.error_examples["http 503"]


async def test_a_kept_connection_that_was_closed_meanwhile_is_not_held_against_the_server() -> None:
    async def close_after(body: dict[str, Any], writer: asyncio.StreamWriter) -> bool:
        await three_tokens(body, writer)
        return False

    async with scripted(close_after) as server:
        result = await run_load(plan(server.url))
    assert (result.ok, result.errors) == (20, {})


async def test_a_server_that_hangs_up_on_a_fresh_connection_is_an_error() -> None:
    async def hang_up(_body: dict[str, Any], _writer: asyncio.StreamWriter) -> bool:
        return False

    async with scripted(hang_up) as server:
        result = await run_load(plan(server.url))
    assert result.errors == {"disconnected": 20}


async def test_a_silent_server_is_a_timeout() -> None:
    async def silent(_body: dict[str, Any], _writer: asyncio.StreamWriter) -> bool:
        await asyncio.sleep(100)
        return False

    async with scripted(silent) as server:
        result = await run_load(plan(server.url, requests=3, timeout_s=2))
    assert result.errors == {"timeout": 3}


def arrivals(*, seed: int, rate: float, count: int) -> list[float]:
    rng = random.Random(seed)
    return list(itertools.accumulate(rng.expovariate(rate) for _ in range(count)))


async def test_a_stalled_server_does_not_slow_the_open_loop_down() -> None:
    stalled_until = 0.0

    async def stalls_once(body: dict[str, Any], writer: asyncio.StreamWriter) -> bool:
        nonlocal stalled_until
        now = asyncio.get_running_loop().time()
        stalled_until = stalled_until or now + 0.6
        await asyncio.sleep(max(0.0, stalled_until - now))
        return await three_tokens(body, writer)

    async with scripted(stalls_once) as server:
        result = await run_load(plan(server.url, requests=None, duration_s=1.2, rate=100))
    assert result.ok == sum(due_s < 1.2 for due_s in arrivals(seed=plan(server.url).seed, rate=100, count=1000))
    assert result.latency_ms is not None
    assert result.latency_ms.p95 > 400  # a closed loop of any size would show one bad request a worker


async def test_the_same_seed_arrives_at_the_same_times_with_the_same_prompts() -> None:
    async def texts(seed: int) -> list[str]:
        async with scripted(three_tokens) as server:
            await run_load(plan(server.url, requests=None, duration_s=0.3, rate=200, seed=seed))
        return sorted(body["messages"][0]["content"] for body in server.bodies)

    first, again, other = await texts(1), await texts(1), await texts(2)
    assert first == again
    assert not set(first) & set(other)


async def test_a_duration_starts_nothing_later_but_waits_for_what_runs() -> None:
    async def slow(body: dict[str, Any], writer: asyncio.StreamWriter) -> bool:
        await asyncio.sleep(0.2)
        return await three_tokens(body, writer)

    async with scripted(slow) as server:
        result = await run_load(plan(server.url, requests=None, duration_s=0.5))
    assert 1 <= result.ok <= 12, "four workers, each with at most three starts within the time"
    assert (result.requests, result.cancelled) == (result.ok, 0)


async def test_a_stop_gives_the_partial_result_and_frees_the_servers_connections() -> None:
    stop = asyncio.Event()

    async def slow_after_eight(body: dict[str, Any], writer: asyncio.StreamWriter) -> bool:
        if len(server.bodies) > 8:
            if len(server.bodies) == 12:
                stop.set()
            await asyncio.sleep(100)
        return await three_tokens(body, writer)

    async with scripted(slow_after_eight) as server:
        result = await run_load(plan(server.url), stop=stop)
        assert (result.interrupted, result.ok, result.cancelled, result.errors) == (True, 8, 4, {})
        assert result.wall_s < 30, "nobody waits for an answer of its time"


async def test_a_run_leaves_no_task_and_no_connection_behind() -> None:
    async with scripted(three_tokens) as server:
        await run_load(plan(server.url, requests=300, concurrency=32))
        for _ in range(3000):
            if not server.open:
                break
            await asyncio.sleep(0.02)
        assert server.open == 0
    gc.collect()  # an unclosed session or response would warn here, and warnings are errors
    assert asyncio.all_tasks() == {asyncio.current_task()}


@dataclass
class Fast:
    url: str = ""
    busy: threading.Event = field(default_factory=threading.Event)
    """Set once so many streamed requests have come that some must have been answered."""


@pytest.fixture
def instant() -> Iterator[Fast]:
    """A server in a thread that answers at once, so that only the generator's own speed counts."""
    started, fast, loops, streams = threading.Event(), Fast(), [], itertools.count(1)
    body = delta("a") + delta(None, "stop") + END

    class Instant(asyncio.Protocol):
        def connection_made(self, transport: Any) -> None:
            self.transport, self.got = transport, b""

        def data_received(self, data: bytes) -> None:
            self.got += data
            if self.got.endswith(b"}"):
                probe = b'"stream": false' in self.got
                self.transport.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}" if probe else HEAD + body)
                if not probe and next(streams) > 10:
                    fast.busy.set()
                self.got = b""

    async def serve() -> None:
        loops.append((asyncio.get_running_loop(), asyncio.Event()))
        server = await asyncio.get_running_loop().create_server(Instant, "127.0.0.1", 0)
        fast.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        started.set()
        await loops[0][1].wait()
        server.close()

    thread = threading.Thread(target=lambda: uvloop.run(serve()))
    thread.start()
    started.wait(60)
    yield fast
    loops[0][0].call_soon_threadsafe(loops[0][1].set)
    thread.join(60)


@pytest.mark.timeout(300)
def test_the_generator_costs_less_than_four_times_the_cpu_of_a_bare_client(instant: Fast) -> None:
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("bench_against_bare.py")), instant.url],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 4, "times the bare client; both share the machine with the same neighbours"


def test_ctrl_c_prints_what_was_measured_until_then(instant: Fast) -> None:
    argv = [*BENCH, "--url", instant.url, "--model", "m", "--duration", "100", "--concurrency", "2", "--json"]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert instant.busy.wait(60)
    os.kill(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=50)
    assert process.returncode == 0, err
    result = json.loads(out)
    assert result["interrupted"]
    assert result["ok"] > 0
    assert result["wall_s"] < 50
