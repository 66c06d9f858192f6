"""A supervised llama-server: the real embedded engine, killed, frozen, starved and asked nicely."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from contextlib import asynccontextmanager

import pytest
from gateway_harness import FakeEngine, whole

from lltm_ray.config import EngineConfig
from lltm_ray.errors import ConfigError, EngineNotReadyError, EngineStartError
from lltm_ray.llamacpp import process as module
from lltm_ray.llamacpp.command import build_args
from lltm_ray.llamacpp.process import ServerProcess, ServerSpec, free_port
from lltm_ray.records import EngineState

KEY = "0123456789abcdef"
LONG = {"max_tokens": 20_000, "ignore_eos": True}


@pytest.fixture
def make_spec(tiny, tmp_path):
    key_file = tmp_path / "key"
    key_file.write_text(KEY)

    def make(model=tiny, argv=None, **changes):
        def embedded(port):
            args = build_args(
                EngineConfig(n_ctx=65_536, n_parallel=2, n_threads=1, n_threads_batch=1),
                model_path=str(model),
                host="127.0.0.1",
                port=port,
                alias="tiny",
                api_key_file=str(key_file),
            )
            return [sys.executable, "-m", "lltm_ray.llamacpp.embedded", *args]

        settings = {
            "name": "e",
            "key_file": key_file,
            "argv": argv or embedded,
            "host": "127.0.0.1",
            "model_path": str(model),
        }
        return ServerSpec(**settings | {"api_key": KEY, "log_path": tmp_path / "e.log", **changes})

    return make


@asynccontextmanager
async def running(spec, on_change=lambda _: None):
    server = ServerProcess(spec, on_change)
    try:
        yield server
    finally:
        await server.stop()


def is_alive(pid):
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


async def until(condition, timeout_s=60.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "did not come true in time"
        await asyncio.sleep(0.02)


async def test_it_starts_answers_and_leaves_nothing_behind(make_spec):
    async with running(make_spec()) as server:
        ready = await server.ensure_ready()
        assert (ready.state, ready.restarts) == (EngineState.READY, 0)
        answer = await server.client.chat([{"role": "user", "content": "hi"}], max_tokens=4)
        assert answer.usage.output_tokens == 4
    assert not is_alive(ready.pid)
    assert server.snapshot().state is EngineState.STOPPED


async def test_a_killed_server_comes_back_on_its_own(make_spec):
    async with running(make_spec()) as server:
        first = await server.ensure_ready()
        os.kill(first.pid, signal.SIGKILL)
        await until(lambda: server.snapshot().state is not EngineState.READY)
        with pytest.raises(EngineNotReadyError):
            _ = server.client
        second = await server.ensure_ready()
        assert second.pid != first.pid
        assert second.restarts == 1
        assert await server.client.tokenize("still here")


async def test_a_frozen_server_is_found_and_replaced(make_spec, monkeypatch):
    monkeypatch.setattr(module, "HEALTH_EVERY_S", 0.2)
    monkeypatch.setattr(module, "HUNG_AFTER_S", 1.0)
    seen = []
    async with running(make_spec(), lambda now: seen.append(now.detail)) as server:
        first = await server.ensure_ready()
        os.kill(first.pid, signal.SIGSTOP)
        await until(lambda: server.snapshot().restarts)
        assert any("no answer to /health for 1 s" in detail for detail in seen), seen
        assert (await server.ensure_ready()).pid != first.pid
        assert not is_alive(first.pid)


async def test_a_short_stall_is_survived(make_spec, monkeypatch):
    monkeypatch.setattr(module, "HEALTH_EVERY_S", 0.2)
    monkeypatch.setattr(module, "HUNG_AFTER_S", 60.0)
    async with running(make_spec()) as server:
        first = await server.ensure_ready()
        os.kill(first.pid, signal.SIGSTOP)
        await asyncio.sleep(1.5)
        os.kill(first.pid, signal.SIGCONT)
        await asyncio.sleep(1.0)
        assert await server.client.tokenize("still here")
        assert (server.snapshot().pid, server.snapshot().restarts) == (first.pid, 0)


async def test_an_impossible_command_line_is_told_and_wedges_nothing(make_spec):
    def impossible(port):
        raise ConfigError("served_name", "a,b", "no commas")

    async with running(make_spec(argv=impossible)) as server:
        with pytest.raises(EngineStartError, match="no commas"):
            await server.ensure_ready()
        with pytest.raises(EngineStartError, match="no commas"):
            await server.ensure_ready()
    async with running(make_spec(argv=lambda port: ["/bin/true\0"])) as server:
        with pytest.raises(EngineStartError, match="cannot start"):
            await server.ensure_ready()


async def test_a_broken_model_is_told_with_exit_code_and_log(make_spec, tmp_path):
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + b"\0" * 100)
    async with running(make_spec(model=broken)) as server:
        with pytest.raises(EngineStartError) as caught:
            await server.ensure_ready()
    assert caught.value.exit_code == 1
    assert "broken.gguf" in caught.value.log_tail


async def test_a_split_that_the_server_does_not_have_is_told_with_its_remedy(make_spec):
    refuses = ["/bin/sh", "-c", "echo 'error loading model: device CUDA0 does not support split buffers'; exit 1"]
    async with running(make_spec(argv=lambda _: refuses)) as server:
        with pytest.raises(EngineStartError, match="exit code 1: this llama-server has no row split; use split_mode="):
            await server.ensure_ready()


async def test_a_missing_executable_is_told(make_spec):
    async with running(make_spec(argv=lambda port: ["/nonexistent/llama-server"])) as server:
        with pytest.raises(EngineStartError):
            await server.ensure_ready()
        assert server.snapshot().state is EngineState.FAILED


async def test_a_server_that_never_answers_is_ended_at_its_deadline(make_spec):
    async with running(make_spec(argv=lambda port: ["sleep", "100"], start_timeout_s=0.5)) as server:
        with pytest.raises(EngineStartError, match=r"not ready after 0\.5 s"):
            await server.ensure_ready()
        assert server.snapshot().pid is None


async def test_a_server_of_another_model_on_our_port_is_not_ours(make_spec, tmp_path, tiny):
    other = tmp_path / "other.gguf"
    other.write_bytes(tiny.read_bytes())
    spec = make_spec(model=other, model_path=str(tiny))
    async with running(spec) as server:
        with pytest.raises(EngineStartError, match=r"serves .*other\.gguf"):
            await server.ensure_ready()


@pytest.mark.parametrize("has_keys", [True, False])
async def test_a_port_that_somebody_else_took_first_costs_another_start_and_no_more(
    make_spec, server, monkeypatch, has_keys
):
    async def answer(_request, writer):
        writer.write(whole(b"{}"))

    async with FakeEngine(answer) as other, running(make_spec()) as process:
        taken = server.url if has_keys else other.url
        chosen = [int(taken.rpartition(":")[2])]
        monkeypatch.setattr(module, "free_port", lambda host: chosen.pop() if chosen else free_port(host))
        ready = await process.ensure_ready()
        assert (ready.state, ready.restarts, chosen) == (EngineState.READY, 0, [])
        assert ready.url != taken
        assert await process.client.tokenize("with our key")


async def test_a_server_that_never_tells_its_model_is_started_once_more_and_given_up(make_spec, monkeypatch):
    async def answer(_request, writer):
        writer.write(whole(b"{}"))

    async with FakeEngine(answer) as other, running(make_spec()) as process:
        port, chosen = int(other.url.rpartition(":")[2]), []
        monkeypatch.setattr(module, "free_port", lambda host: chosen.append(port) or port)
        with pytest.raises(EngineStartError, match="serves"):
            await process.ensure_ready()
        assert len(chosen) == 2


async def test_draining_lets_a_running_answer_finish(make_spec):
    async with running(make_spec()) as server:
        await server.ensure_ready()
        answer = server.client.complete_stream("go", max_tokens=400, ignore_eos=True)
        await anext(answer)  # it runs
        stop = asyncio.create_task(server.stop(drain_s=100))
        events = [event async for event in answer]
        assert events[-1].usage.output_tokens == 400
        await stop


async def test_a_drain_does_not_wait_for_ever(make_spec):
    async with running(make_spec()) as server:
        await server.ensure_ready()
        answer = server.client.complete_stream("go", **LONG)
        await anext(answer)  # it runs
        async with asyncio.timeout(30):  # nobody reads the answer: it would not end
            await server.stop(drain_s=0.3)
        with pytest.raises(Exception, match=r"ended|broke"):
            _ = [event async for event in answer]


async def test_nothing_starts_again_after_it_was_stopped_for_good(make_spec):
    async with running(make_spec()) as server:
        await server.ensure_ready()
        await server.stop()
        with pytest.raises(EngineNotReadyError):
            await server.ensure_ready()


def test_the_server_dies_with_its_parent_however_that_dies(make_spec, tmp_path, tiny):
    script = f"""
import asyncio, sys
from pathlib import Path
from lltm_ray.llamacpp.process import ServerProcess, ServerSpec, free_port
argv = lambda port: [sys.executable, "-m", "lltm_ray.llamacpp.embedded", "--model", model, "--port", str(port)]
log = Path({str(tmp_path / "child.log")!r})
model = {str(tiny)!r}
spec = ServerSpec(name="e", argv=argv, host="127.0.0.1", model_path=model, api_key="", key_file=log, log_path=log)
async def main():
    server = ServerProcess(spec)
    print((await server.ensure_ready()).pid, flush=True)
    await asyncio.sleep(60)
asyncio.run(main())
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as parent:
        pid = int(parent.stdout.readline())
        assert is_alive(pid)
        parent.kill()
    deadline = time.monotonic() + 60
    while is_alive(pid):
        assert time.monotonic() < deadline, "an orphan is left"
        time.sleep(0.02)
