import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest
import requests
import xllamacpp
from gateway_harness import write_adapter

from lltm_ray.config import EngineConfig, LoraAdapter
from lltm_ray.llamacpp import embedded
from lltm_ray.llamacpp.command import FLAGS, ArgumentError, build_args, read_args
from lltm_ray.models.random_weights import RandomShape

KEY = "a-key-only-in-a-file"
WIDTH = RandomShape().n_embd


@pytest.fixture
def model(tiny_gguf: Path) -> Path:
    return tiny_gguf


class Child:
    """A running embedded server, its address once it is ready, and its log."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self.process, self.url, self.log = process, "", log

    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {KEY}"}

    def get(self, path: str) -> requests.Response:
        return requests.get(self.url + path, headers=self.headers(), timeout=60)

    def post(self, path: str, body: dict[str, Any], **options: Any) -> requests.Response:
        return requests.post(self.url + path, json=body, headers=self.headers(), timeout=60, **options)

    def wait_ready(self) -> None:
        deadline = time.monotonic() + 90
        while not (found := re.search(r"embedded: serving (\S+)\n", self.log.read_text())):
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, "not ready:\n" + self.log.read_text()
            time.sleep(0.02)
        self.url = found[1]
        assert self.get("/health").ok

    def stop(self, number: signal.Signals = signal.SIGTERM) -> tuple[int, float]:
        """Exit code, and seconds it took."""
        began = time.monotonic()
        self.process.send_signal(number)
        return self.process.wait(60), time.monotonic() - began


def command(*args: str) -> list[str]:
    return [sys.executable, "-m", "lltm_ray.llamacpp.embedded", *args]


def arguments(model: Path, folder: Path, config: EngineConfig | None = None, port: int = 0) -> list[str]:
    key_file = folder / "keys"
    key_file.write_text(f"# engines\n{KEY}\n")
    return build_args(
        config or EngineConfig(n_ctx=2048, n_parallel=2),
        model_path=str(model),
        host="127.0.0.1",
        port=port,
        alias="tiny-model",
        api_key_file=str(key_file),
        n_gpu_layers=0,
    )


@contextmanager
def serving(model: Path, folder: Path, config: EngineConfig | None = None) -> Iterator[Child]:
    log = folder / "log"
    with log.open("wb") as out:
        process = subprocess.Popen(command(*arguments(model, folder, config)), stdout=out, stderr=out)
    child = Child(process, log)
    try:
        child.wait_ready()
        yield child
    finally:
        process.kill()
        process.wait()


def run(*args: str) -> tuple[int, str]:
    """Exit code and the last line on stderr of a server that should not start."""
    done = subprocess.run(command(*args), capture_output=True, text=True, timeout=100, check=False)
    return done.returncode, done.stderr.strip().splitlines()[-1]


def test_it_serves_with_the_name_slots_and_settings_it_was_given(model: Path, tmp_path: Path) -> None:
    with serving(model, tmp_path) as child:
        answer = child.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 5})
        assert answer.json()["usage"]["completion_tokens"] == 5
        props = child.get("/props").json()
        assert (props["model_path"], props["model_alias"], props["total_slots"]) == (str(model), "tiny-model", 2)
        assert [slot["n_ctx"] for slot in child.get("/slots").json()] == [1024, 1024]
        assert "llamacpp:prompt_tokens_total" in child.get("/metrics").text
        assert child.stop()[0] == 0
    text = child.log.read_text()
    assert "model loaded" in text
    assert KEY not in text


def test_the_key_file_is_enforced_and_no_key_shows_in_ps(model: Path, tmp_path: Path) -> None:
    with serving(model, tmp_path) as child:
        assert requests.get(child.url + "/health", timeout=60).status_code == 200
        for path in ("/v1/models", "/props", "/slots", "/metrics"):
            assert requests.get(child.url + path, timeout=60).status_code == 401
        assert requests.post(child.url + "/completion", json={"prompt": "x"}, timeout=60).status_code == 401
        assert child.post("/completion", {"prompt": "x", "n_predict": 1}).status_code == 200
        shown = subprocess.run(
            ["ps", "-ww", "-o", "args=", "-p", str(child.process.pid)], capture_output=True, check=True
        )
        assert b"--api-key-file" in shown.stdout
        assert KEY.encode() not in shown.stdout


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_an_idle_server_with_exit_code_0_at_once(
    model: Path, tmp_path: Path, number: signal.Signals
) -> None:
    for _ in range(5):  # who shares the machine may hold it up, but not every time
        with serving(model, tmp_path) as child:
            code, seconds = child.stop(number)
        assert code == 0
        if seconds < 1:
            return
    raise AssertionError(seconds)


def test_sigterm_during_long_streams_ends_the_server_at_once_and_breaks_the_streams(
    model: Path, tmp_path: Path
) -> None:
    ended: list[str] = []

    def read(child: Child, begun: threading.Event) -> None:
        body = {"prompt": "x", "n_predict": 10**6, "ignore_eos": True, "stream": True}
        try:
            with child.post("/completion", body, stream=True) as answer:
                for _ in answer.iter_lines():
                    begun.set()
            ended.append("complete")
        except requests.RequestException:
            ended.append("broken")

    config = EngineConfig(n_ctx=2048, n_parallel=2, context_shift=True)
    with serving(model, tmp_path, config) as child:
        events = [threading.Event() for _ in range(2)]
        readers = [threading.Thread(target=read, args=(child, event)) for event in events]
        for reader in readers:
            reader.start()
        assert all(event.wait(60) for event in events)
        code, seconds = child.stop()
        for reader in readers:
            reader.join(60)
    assert (code, ended) == (0, ["broken", "broken"])
    assert seconds < 30, "streams like these last for minutes"


def test_sigterm_while_the_model_is_read_ends_the_process_at_once(tmp_path: Path) -> None:
    pipe = tmp_path / "slow.gguf"
    os.mkfifo(pipe)
    process = subprocess.Popen(command(*arguments(pipe, tmp_path)), stderr=subprocess.DEVNULL)
    feeding = open_when_read(pipe)
    try:
        feeding.write(b"GGUF")  # the first look at the file is answered; llama.cpp then waits for its own
        feeding.close()
        time.sleep(0.3)
        process.terminate()
        assert process.wait(60) == -signal.SIGTERM, "it would wait for the file for ever"
    finally:
        process.kill()
        process.wait()


def open_when_read(pipe: Path) -> IO[bytes]:
    return pipe.open("wb")  # blocks until the child opens the other end


@pytest.mark.parametrize("kind", ["garbage", "truncated", "missing", "folder"])
def test_a_model_that_cannot_be_loaded_ends_it_with_a_clear_last_line(model: Path, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "bad.gguf"
    if kind == "garbage":
        path.write_bytes(bytes(range(256)) * 50)
    elif kind == "truncated":
        path.write_bytes(model.read_bytes()[:200_000])
    elif kind == "folder":
        path.mkdir()
    code, line = run(*arguments(path, tmp_path))
    assert code == 1
    why = {
        "garbage": "not a GGUF",
        "truncated": "see the lines above",
        "missing": "No such file",
        "folder": "directory",
    }
    assert "error: failed to" in line
    assert str(path) in line
    assert why[kind] in line


def test_a_taken_port_ends_it_and_nothing_is_served_elsewhere(model: Path, tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        code, line = run(*arguments(model, tmp_path, port=port))
    assert code == 1
    assert line == f"error: couldn't bind HTTP server socket, 127.0.0.1:{port}: Address already in use"


def test_a_port_taken_by_another_server_of_ours_ends_it_too(model: Path, tmp_path: Path) -> None:
    with serving(model, tmp_path) as child:
        code, line = run(*arguments(model, tmp_path, port=int(child.url.rpartition(":")[2])))
        assert code == 1
        assert "Address already in use" in line
        assert child.get("/health").ok


@pytest.mark.parametrize(
    ("extra", "why"),
    [
        (["--grammar", "root"], "error: invalid argument: --grammar"),
        (["--n-gpu-layers", "1"], "the embedded engine is a CPU build"),
        (["--main-gpu", "1"], "the embedded engine is a CPU build"),
        (["--spec-draft-ngl", "9"], "the embedded engine is a CPU build"),
        (["--tensor-split", "1,1"], "no GPU to split over"),
        (["--spec-type", "magic"], "unknown speculative type: magic"),
        (["--slot-save-path", "/nowhere"], "not a directory"),
        (["--api-key-file", "/nowhere"], "failed to open file"),
        (["--api-key-file", "/dev/null"], "no key in"),
        (["--cache-type-k", "q2_k"], "is not one of"),
    ],
)
def test_what_it_cannot_do_ends_it_with_exit_code_1_and_one_line(model: Path, extra: list[str], why: str) -> None:
    code, line = run("--model", str(model), *extra)
    assert code == 1
    assert why in line


def test_a_model_is_required() -> None:
    assert run("--port", "0") == (1, "error: --model is required")


def test_embeddings_are_pooled_over_the_whole_input(model: Path, tmp_path: Path) -> None:
    config = EngineConfig(n_ctx=1024, n_parallel=1, embeddings=True, pooling="mean")
    with serving(model, tmp_path, config) as child:
        body = {"input": ["hello", "another text"]}
        vectors = [item["embedding"] for item in child.post("/v1/embeddings", body).json()["data"]]
    assert [len(vector) for vector in vectors] == [WIDTH, WIDTH]
    assert [round(float(np.linalg.norm(vector)), 3) for vector in vectors] == [1.0, 1.0]
    assert vectors[0] != vectors[1]


def test_every_cpu_setting_is_taken_by_the_real_server(model: Path, tmp_path: Path) -> None:
    config = EngineConfig(
        n_ctx=2048,
        n_parallel=2,
        n_batch=256,
        n_ubatch=64,
        split_mode="none",
        flash_attn="off",
        cache_type_k="bf16",
        cache_type_v="f32",
        kv_unified=True,
        cache_ram_mib=16,
        cache_reuse=8,
        swa_full=True,
        context_shift=True,
        slot_prompt_similarity=0.5,
        n_threads=1,
        n_threads_batch=1,
        n_threads_http=9,
        use_mmap=False,
        model_draft=str(model),
        draft_max=4,
        draft_min=1,
        draft_p_min=0.0,
        n_gpu_layers_draft=0,
        chat_template="chatml",
        jinja=False,
        reasoning_format="deepseek-legacy",
        rope_freq_base=20000.0,
        rope_freq_scale=0.5,
        slot_save_path=str(tmp_path),
        sleep_idle_s=600,
        warmup=False,
    )
    with serving(model, tmp_path, config) as child:
        body = {"prompt": "hello", "n_predict": 16, "temperature": 0, "id_slot": 0}
        timings = child.post("/completion", body).json()["timings"]
        assert timings["draft_n"] > 0
        assert [slot["n_ctx"] for slot in child.get("/slots").json()] == [2048, 2048]
        assert child.post("/slots/0?action=save", {"filename": "saved.bin"}).json()["n_saved"] > 0
        messages = {"messages": [{"role": "user", "content": "hi"}]}
        assert child.post("/apply-template", messages).json()["prompt"].startswith("<|im_start|>user")
        assert child.stop()[0] == 0
    assert (tmp_path / "saved.bin").stat().st_size > 0
    assert "n_threads = 1" in child.log.read_text()


def test_adapters_are_loaded_with_their_scales(model: Path, tmp_path: Path) -> None:
    paths = [tmp_path / "a.gguf", tmp_path / "b.gguf"]
    for path in paths:
        write_adapter(path)
    config = EngineConfig(n_ctx=512, lora=(LoraAdapter(path=str(paths[0]), scale=0.5), LoraAdapter(path=str(paths[1]))))
    with serving(model, tmp_path, config) as child:
        shown = child.get("/lora-adapters").json()
    assert [(item["path"], item["scale"]) for item in shown] == [(str(paths[0]), 0.5), (str(paths[1]), 1.0)]


def test_it_tells_its_version() -> None:
    done = subprocess.run(command("--version"), capture_output=True, text=True, timeout=100, check=True)
    assert done.stdout.startswith("version: 20")


def test_every_flag_we_can_write_has_a_setter() -> None:
    assert set(embedded.SETTERS) == {flag.negates or name for name, flag in FLAGS.items()}


def test_parameters_hold_what_the_arguments_said(tmp_path: Path) -> None:
    config = EngineConfig(
        lora=(LoraAdapter(path="/a.gguf", scale=0.5),), use_mlock=True, reranking=True, flash_attn="on", n_ubatch=32
    )
    params = embedded.build_params(read_args(arguments(Path("/m.gguf"), tmp_path, config, port=8081)))
    assert [(adapter.path, adapter.scale) for adapter in params.lora_adapters] == [("/a.gguf", 0.5)]
    assert params.load_mode == xllamacpp.llama_load_mode.LLAMA_LOAD_MODE_MMAP_MLOCK
    assert params.pooling_type == xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_RANK
    assert params.flash_attn_type == xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_ENABLED
    assert (params.port, params.hostnames, params.api_keys, params.n_batch) == (8081, ["127.0.0.1"], [KEY], 32)
    assert (params.ui, params.fit_params, params.offline, params.embedding) == (False, False, True, True)


def test_a_flag_without_its_value_is_an_argument_error() -> None:
    with pytest.raises(ArgumentError, match="expected value"):
        embedded.build_params(read_args(["--model"]))
