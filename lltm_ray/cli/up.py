"""`lltm-ray up`: start a fleet, in the foreground until Ctrl-C or detached."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.live import Live
from rich.table import Table

from lltm_ray.actors.lost import end_lost, watch_ray
from lltm_ray.actors.runstate import RunState
from lltm_ray.cli._output import ERR, OUT, errors_end_the_command, tell_if_demonstration
from lltm_ray.config import SPLIT_MODES, FleetConfig, build, read_environment
from lltm_ray.driver import Cluster
from lltm_ray.errors import ConfigError, FleetError
from lltm_ray.records import FleetStatus

DETACH_TIMEOUT_S = 3600.0
_READY_ENV = "LLTM_RAY_UP_READY_FD"
"""Set for the background copy of `up --detach`: the pipe on which it says how it went."""
_TOGETHER_S = 5.0
"""A Ray that is lost so soon after a signal got the same one."""


class _Stop(threading.Event):
    """Set by the signal that asks for a drain."""

    asked_s = -math.inf
    """When the last one came, in monotonic seconds."""

    def set(self) -> None:
        self.asked_s = time.monotonic()
        super().set()

    @property
    def is_fresh(self) -> bool:
        """Whether it came just now."""
        return time.monotonic() - self.asked_s < _TOGETHER_S


@errors_end_the_command()
def up(
    model: Annotated[
        str | None, typer.Option(help="tiny, random, a catalogue name, a path, repo:file[@revision].")
    ] = None,
    engines: Annotated[int | None, typer.Option(help="How many llama-servers to start with.")] = None,
    min_engines: Annotated[int | None, typer.Option(help="Never fewer llama-servers than this.")] = None,
    max_engines: Annotated[int | None, typer.Option(help="Never more; 0 to start with needs it.")] = None,
    idle_timeout: Annotated[float | None, typer.Option(help="Seconds without requests until they are stopped.")] = None,
    gpu_share: Annotated[float | None, typer.Option(help="GPUs per engine: 0, a fraction, or a whole number.")] = None,
    n_parallel: Annotated[int | None, typer.Option(help="Slots per engine.")] = None,
    ctx: Annotated[int | None, typer.Option(help="Context tokens per engine, shared by its slots.")] = None,
    split_mode: Annotated[
        str | None, typer.Option(help=f"How an engine's GPUs share a model: {', '.join(SPLIT_MODES)}.")
    ] = None,
    tensor_split: Annotated[str | None, typer.Option(help="Parts of an engine's GPUs, e.g. 3,1.")] = None,
    main_gpu: Annotated[int | None, typer.Option(help="GPU of an engine, from 0, for --split-mode none.")] = None,
    host: Annotated[str | None, typer.Option(help="Address to bind; anything but loopback needs keys.")] = None,
    port: Annotated[int | None, typer.Option(help="Port of the endpoint; 0 takes a free one.")] = None,
    api_key_file: Annotated[Path | None, typer.Option(help="File with one API key a line.")] = None,
    name: Annotated[str | None, typer.Option(help="The fleet's name, for several on one cluster.")] = None,
    pooling: Annotated[str | None, typer.Option(help="Pooling of embeddings: mean, cls, last, rank.")] = None,
    embeddings: Annotated[bool, typer.Option("--embeddings", help="Serve embeddings.")] = False,
    memory_limit_gib: Annotated[float | None, typer.Option(help="Memory an engine may plan with, GiB.")] = None,
    llama_server: Annotated[Path | None, typer.Option(help="Path of llama-server.")] = None,
    config: Annotated[Path | None, typer.Option(help="TOML file; options given here win over it.")] = None,
    detach: Annotated[bool, typer.Option("--detach", help="Return when the fleet is ready; stop with down.")] = False,
) -> None:
    """Start a fleet and serve it: one line with the endpoint when it is ready; Ctrl-C drains and ends it.

    Joins the Ray cluster of RAY_ADDRESS when there is one, else starts Ray on this machine.
    """
    settings = {
        "name": name,
        "model": model,
        "engines": engines,
        "min_engines": min_engines,
        "max_engines": max_engines,
        "idle_timeout_s": idle_timeout,
        "gpu_share": gpu_share,
        "llama_server": str(llama_server) if llama_server else None,
        "memory_limit_bytes": int(memory_limit_gib * 2**30) if memory_limit_gib else None,
        "engine": {
            "n_parallel": n_parallel,
            "n_ctx": ctx,
            "split_mode": split_mode,
            "tensor_split": _parts(tensor_split) if tensor_split else None,
            "main_gpu": main_gpu,
            "embeddings": embeddings or None,
            "pooling": pooling,
        },
        "gateway": {"host": host, "port": port, "api_key_file": str(api_key_file) if api_key_file else None},
    }
    given = _given(settings)
    fleet = FleetConfig.from_toml(config, **given) if config else build(FleetConfig, given)
    _run(fleet, detach=detach)


def _run(fleet: FleetConfig, *, detach: bool) -> None:
    state = RunState.load(fleet.name)
    if state is not None and state.pid:  # one without a process lives on a Ray cluster, which knows best
        raise FleetError(f"fleet {fleet.name!r} runs already: lltm-ray down --name {fleet.name}, or another --name")
    if read_environment().ray_address:
        _up_on_cluster(fleet, detach=detach)
    elif detach:
        _detach()
    else:
        _up_here(fleet)


def _given(settings: dict[str, Any]) -> dict[str, Any]:
    """Without what the user left out, so that the file or the defaults decide."""
    kept = {name: _given(value) if isinstance(value, dict) else value for name, value in settings.items()}
    return {name: value for name, value in kept.items() if value is not None and value != {}}


def _parts(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError("tensor_split", text, "must be a number for each of an engine's GPUs, e.g. 3,1") from None


def _up_here(fleet: FleetConfig) -> None:
    """Ray and the fleet live in this process."""
    stop = _Stop()
    watch_ray(lambda: _leave_lost(fleet.name, stop))
    with _start(fleet) as cluster:
        _hear_signals(stop)
        state = _state(cluster, holds_fleet=True)
        state.save()
        try:
            _tell_ready(state, foreground=True)
            stop.wait()
            ERR.print("draining …")
        finally:
            state.forget()


def _leave_lost(name: str, stop: _Stop) -> None:
    """End what is left when Ray was ended, as by a signal to the whole process group, and this process.

    At once, for its main thread may be in a call that waits for Ray, and Ray's own end takes 15 s then.
    """
    was_asked = stop.is_fresh  # else Ray broke by itself, perhaps in the middle of a drain
    end_lost()
    state = RunState.load(name)
    if state is not None and state.pid == os.getpid():  # while this one starts, another one of this name may run
        state.forget()
    with suppress(OSError):  # the terminal may be closed
        ERR.show_cursor()
        ERR.print("Ray, which was started here, was ended: the fleet ended without a drain")
    os._exit(0 if was_asked else 1)


def _up_on_cluster(fleet: FleetConfig, *, detach: bool) -> None:
    """The fleet lives on a Ray cluster that somebody else keeps."""
    cluster = _start(fleet, detached=detach)
    stop = _Stop()
    _hear_signals(stop)
    state = _state(cluster, holds_fleet=not detach)
    state.save()
    _tell_ready(state, foreground=not detach)
    if detach:
        cluster.close()
        return
    try:
        stop.wait()
        ERR.print("draining …")
    finally:
        cluster.stop()
        state.forget()


def _state(cluster: Cluster, *, holds_fleet: bool) -> RunState:
    return RunState.of_this_process(cluster.name, cluster.ray_address, cluster.endpoint, holds_fleet=holds_fleet)


def _start(fleet: FleetConfig, **options: Any) -> Cluster:
    _handle(signal.default_int_handler, signal.SIGTERM, signal.SIGHUP)  # ended while starting: undo what was started
    told = ", ".join(f"{model.engines} engine(s) of {model.name}" for model in fleet.served())
    ERR.print(f"starting {told} …")
    tell_if_demonstration(*(model.model for model in fleet.served()))
    with Live(console=ERR, refresh_per_second=5, transient=True) as live:
        return Cluster.start(fleet, on_progress=lambda status: live.update(_progress(status)), **options)


def _progress(status: FleetStatus) -> Table:
    table = Table.grid(padding=(0, 2))
    for engine in status.engines:
        table.add_row(engine.name, str(engine.state), engine.detail)
    return table


def _hear_signals(stop: _Stop) -> None:
    """From now on SIGINT, SIGTERM and a closed terminal ask for a drain; a second SIGINT does not wait for it."""

    def ask(_number: int, _frame: Any) -> None:
        stop.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    _handle(ask, signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def _handle(handler: Callable[[int, Any], None], *numbers: signal.Signals) -> None:
    for number in numbers:
        if signal.getsignal(number) is not signal.SIG_IGN or number != signal.SIGHUP:  # nohup
            signal.signal(number, handler)


def _tell_ready(state: RunState, *, foreground: bool) -> None:
    line = f"{state.name} is ready at {state.endpoint or 'the driver API (it has no gateway)'}"
    ready_fd = os.environ.get(_READY_ENV)
    if ready_fd:
        with os.fdopen(int(ready_fd), "w") as pipe:
            pipe.write(line)
        return
    OUT.print(line + ("  (Ctrl-C drains and stops)" if foreground else ""))


def _detach() -> None:
    """Run this same command in the background, in a session of its own, and wait for its word."""
    log = read_environment().cache_dir / "logs" / "up.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    reader, writer = os.pipe()
    arguments = [argument for argument in sys.argv[1:] if argument != "--detach"]
    with log.open("ab") as sink:
        start = sink.tell()
        child = subprocess.Popen(
            [sys.executable, "-m", "lltm_ray.cli", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=sink,
            start_new_session=True,
            pass_fds=(writer,),
            env=os.environ | {_READY_ENV: str(writer)},
        )
    os.close(writer)
    ERR.print(f"starting in the background; its log is {log}", soft_wrap=True)
    with os.fdopen(reader) as pipe:
        line = pipe.read()  # ends when the child says so, or ends
    if line:
        OUT.print(line)
        return
    deadline = time.monotonic() + 10
    while child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    with log.open("rb") as sink:
        sink.seek(start)
        ERR.print(sink.read().decode("utf-8", "replace").strip(), markup=False)
    raise typer.Exit(child.returncode or 1)
