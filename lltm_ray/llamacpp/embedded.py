"""llama-server from the PyPI wheel `xllamacpp`: `python -m lltm_ray.llamacpp.embedded <llama-server's flags>`.

The same C++ HTTP server in a Python process, so that everything works without a build or a download. It takes what
`command.build_args` writes and, like llama-server, ends with exit code 1 and a line on stderr for anything else. Logs
are llama.cpp's own, on stderr.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn
from urllib.parse import urlsplit

import xllamacpp

from lltm_ray.llamacpp.command import ArgumentError, Value, read_args, read_loras

Setter = Callable[[Any, Any], None]
LOG_DRAIN_S = 0.2
"""llama.cpp logs from a thread of its own; after this long its reasons are written and ours is the last line."""


class StartError(Exception):
    """The server cannot start; the message is the last line on stderr."""


def _enum(kind: str, prefix: str) -> Callable[[Any], Any]:
    names = getattr(xllamacpp, kind)
    return lambda text: names[prefix + str(text).upper().replace("-", "_").replace("+", "_")]


def _to(path: str, convert: Callable[[Any], Any] = lambda value: value) -> Setter:
    """A setter of `params.<path>`, dots and all."""
    *parents, last = path.split(".")

    def put(params: Any, value: Any) -> None:
        for parent in parents:
            params = getattr(params, parent)
        setattr(params, last, convert(value))

    return put


_LOAD_MODE = {"dio": "direct_io"}
_FLASH = {"on": "enabled", "off": "disabled", "auto": "auto"}
_cache_type = _enum("ggml_type", "GGML_TYPE_")
_split = _enum("llama_split_mode", "LLAMA_SPLIT_MODE_")
_pooling = _enum("llama_pooling_type", "LLAMA_POOLING_TYPE_")
_reasoning = _enum("common_reasoning_format", "COMMON_REASONING_FORMAT_")
_load = _enum("llama_load_mode", "LLAMA_LOAD_MODE_")
_flash = _enum("llama_flash_attn_type", "LLAMA_FLASH_ATTN_TYPE_")
_speculative = _enum("common_speculative_type", "COMMON_SPECULATIVE_TYPE_")


def _set_loras(params: Any, text: Any) -> None:
    adapters = []
    for path, scale in read_loras(text):
        adapter = xllamacpp.CommonAdapterLoraInfo()
        adapter.path, adapter.scale = path, scale
        adapters.append(adapter)
    params.lora_adapters = adapters


def _set_reranking(params: Any, on: Any) -> None:
    if on:
        params.embedding = True
        params.pooling_type = _pooling("rank")


def _set_api_keys(params: Any, path: Any) -> None:
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise StartError(f"error: failed to open file '{path}': {error}") from error
    keys = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not keys:
        raise StartError(f"error: no key in '{path}': a server without one would be open to everybody")
    params.api_keys = keys


def _set_slot_folder(params: Any, path: Any) -> None:
    if not Path(path).is_dir():
        raise StartError(f"error: not a directory: {path}")
    params.slot_save_path = str(path).rstrip("/") + "/"  # llama.cpp appends the file's name as it is


def _set_speculative(params: Any, text: Any) -> None:
    try:
        params.speculative.types = [_speculative(name) for name in text.split(",")]
    except KeyError as error:
        raise ArgumentError(f"unknown speculative type: {text}") from error


def _refuse_gpu(flag: str) -> Setter:
    """For flags that only make sense with a GPU: 0 passes, and all of it where the wheel is a GPU build."""
    paths = {
        "--n-gpu-layers": "n_gpu_layers",
        "--main-gpu": "main_gpu",
        "--spec-draft-ngl": "speculative.draft.n_gpu_layers",
    }

    def put(params: Any, value: Any) -> None:
        if value and not has_gpu():
            raise StartError(
                f"error: {flag} {value}: the embedded engine is a CPU build; use {flag} 0, or a llama-server built for "
                "the GPU (LLAMA_SERVER_PATH)"
            )
        _to(paths[flag])(params, value)

    return put


def _set_tensor_split(params: Any, text: Any) -> None:
    if not has_gpu():
        raise StartError(
            f"error: --tensor-split {text}: the embedded engine is a CPU build and has no GPU to split over"
        )
    try:
        parts = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ArgumentError(f"error: --tensor-split {text}: must be numbers with commas between") from error
    params.tensor_split = parts + [0.0] * (len(params.tensor_split) - len(parts))


def has_gpu() -> bool:
    """Whether this build of the wheel can use a GPU of this machine."""
    kinds = xllamacpp.ggml_backend_dev_type
    gpus = (kinds.GGML_BACKEND_DEVICE_TYPE_GPU, kinds.GGML_BACKEND_DEVICE_TYPE_IGPU)
    return any(device["type"] in gpus for device in xllamacpp.get_device_info())


SETTERS: Mapping[str, Setter] = {
    "--alias": _to("model_alias", lambda name: {name}),
    "--api-key-file": _set_api_keys,
    "--batch-size": _to("n_batch"),
    "--cache-ram": _to("cache_ram_mib"),
    "--cache-reuse": _to("n_cache_reuse"),
    "--cache-type-k": _to("cache_type_k", _cache_type),
    "--cache-type-v": _to("cache_type_v", _cache_type),
    "--chat-template": _to("chat_template"),
    "--context-shift": _to("ctx_shift"),
    "--ctx-size": _to("n_ctx"),
    "--embeddings": _to("embedding"),
    "--fit": _to("fit_params", lambda text: text == "on"),
    "--flash-attn": _to("flash_attn_type", lambda text: _flash(_FLASH[text])),
    "--host": _to("hostnames", lambda text: text.split(",")),
    "--jinja": _to("use_jinja"),
    "--kv-unified": _to("kv_unified"),
    "--load-mode": _to("load_mode", lambda text: _load(_LOAD_MODE.get(text, text))),
    "--lora-scaled": _set_loras,
    "--main-gpu": _refuse_gpu("--main-gpu"),
    "--metrics": _to("endpoint_metrics"),
    "--mmproj": _to("mmproj.path"),
    "--model": _to("model.path"),
    "--n-gpu-layers": _refuse_gpu("--n-gpu-layers"),
    "--offline": _to("offline"),
    "--parallel": _to("n_parallel"),
    "--pooling": _to("pooling_type", _pooling),
    "--port": _to("port"),
    "--props": _to("endpoint_props"),
    "--reasoning-format": _to("reasoning_format", _reasoning),
    "--reranking": _set_reranking,
    "--rope-freq-base": _to("rope_freq_base"),
    "--rope-freq-scale": _to("rope_freq_scale"),
    "--sleep-idle-seconds": _to("sleep_idle_seconds"),
    "--slot-prompt-similarity": _to("slot_prompt_similarity"),
    "--slot-save-path": _set_slot_folder,
    "--slots": _to("endpoint_slots"),
    "--spec-draft-model": _to("speculative.draft.mparams.path"),
    "--spec-draft-n-max": _to("speculative.draft.n_max"),
    "--spec-draft-n-min": _to("speculative.draft.n_min"),
    "--spec-draft-ngl": _refuse_gpu("--spec-draft-ngl"),
    "--spec-draft-p-min": _to("speculative.draft.p_min"),
    "--spec-type": _set_speculative,
    "--split-mode": _to("split_mode", _split),
    "--swa-full": _to("swa_full"),
    "--tensor-split": _set_tensor_split,
    "--threads": _to("cpuparams.n_threads"),
    "--threads-batch": _to("cpuparams_batch.n_threads"),
    "--threads-http": _to("n_threads_http"),
    "--ubatch-size": _to("n_ubatch"),
    "--ui": _to("ui"),
    "--verbosity": _to("verbosity"),
    "--warmup": _to("warmup"),
}
"""Flag -> how it is put into llama.cpp's parameters. They are set one by one and never read all at once: dumping every
field of `CommonParams` has crashed the process."""


def build_params(values: Mapping[str, Value]) -> Any:
    """llama.cpp's parameters from `read_args`' answer.

    Raises:
        StartError: a file is unreadable, or a flag needs a GPU.
        ArgumentError: a value that llama.cpp does not know.
    """
    if "--model" not in values:
        raise StartError("error: --model is required")
    params = xllamacpp.CommonParams()
    for flag, value in values.items():
        SETTERS[flag](params, value)
    if params.embedding:
        params.n_batch = min(
            params.n_batch, params.n_ubatch
        )  # as llama-server does: a pooled input must fit one physical batch
    return params


def start(params: Any) -> Any:
    """Load the model and serve.

    Raises:
        StartError: the model cannot be loaded or the address is taken; llama.cpp's own lines say more.
    """
    path, port = params.model.path, params.port
    _check_readable(path)
    for host in params.hostnames:
        _check_free(host, port)
    try:
        server = xllamacpp.Server(params)
    except RuntimeError as error:
        time.sleep(LOG_DRAIN_S)
        raise StartError(
            f"error: failed to load model '{path}' or to serve it; see the lines above ({error})"
        ) from error
    served = urlsplit(server.listening_address).port
    if port not in (0, served):
        raise StartError(f"error: asked for port {port} but llama.cpp listens on {served}")
    return server


def _check_readable(path: str) -> None:
    try:
        with Path(path).open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise StartError(f"error: failed to open model '{path}': {error.strerror}") from error
    if magic != b"GGUF":
        raise StartError(f"error: failed to load model '{path}': not a GGUF file, it starts with {magic!r}")


def _check_free(host: str, port: int) -> None:
    """Bind and let go: llama.cpp reports a taken port only as 'failed to init'."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        raise StartError(f"error: couldn't bind HTTP server socket, {host}:{port}: {error.strerror}") from error


def watch_signals() -> int:
    """From now on SIGTERM and SIGINT make the returned pipe readable.

    Python's handler only marks the signal, and the kernel may give it to any of llama.cpp's threads; the wake-up pipe
    reaches the main thread either way.
    """
    readable, writable = os.pipe()
    os.set_blocking(writable, False)
    signal.set_wakeup_fd(writable)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _ignore)
    return readable


def _ignore(_number: int, _frame: FrameType | None) -> None:
    """The wake-up pipe carries the news."""


def _say(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def _leave(code: int) -> NoReturn:
    # C++ destructors wait for running requests, which may take minutes; memory and sockets go with the process.
    sys.stdout.flush()
    os._exit(code)


def main(argv: Sequence[str]) -> NoReturn:
    """Serve until SIGTERM or SIGINT, then end with 0; with 1 for arguments that cannot be used or a failed start.

    While a model loads llama.cpp holds the interpreter lock, so until "serving" is logged only a signal's default
    action can end the process at once, and its exit status then is that signal.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    if "--version" in argv:
        sys.stdout.write(f"version: {version('xllamacpp')} (xllamacpp, embedded)\n")
        _leave(0)
    try:
        server = start(build_params(read_args(argv)))
    except (ArgumentError, StartError) as error:
        _say(str(error))
        _leave(1)
    signalled = watch_signals()
    _say(f"embedded: serving {server.listening_address}")
    select.select([signalled], [], [])
    _say("embedded: stopped by a signal")
    _leave(0)


if __name__ == "__main__":
    main(sys.argv[1:])
