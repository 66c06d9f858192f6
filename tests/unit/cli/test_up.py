"""`lltm-ray up`: its options become settings of the engines; and what a signal, or a lost Ray, makes of it."""

import os
import signal
import time
from importlib import import_module

import pytest
from typer.testing import CliRunner

from lltm_ray.actors.runstate import RunState, started_at
from lltm_ray.cli import app
from lltm_ray.config import FleetConfig
from lltm_ray.llamacpp.command import build_args, read_args

UP = import_module("lltm_ray.cli.up")


def up(*words):
    return CliRunner().invoke(app, ["up", *words])


def test_how_a_model_is_split_over_gpus_is_an_option_and_reaches_llama_server(monkeypatch, tmp_path):
    fleets, file = [], tmp_path / "fleet.toml"

    def note(fleet, **_):
        fleets.append(fleet)

    monkeypatch.setattr(UP, "_run", note)
    file.write_text('[engine]\nsplit_mode = "row"\nmain_gpu = 1\n')
    done = up("--config", str(file), "--split-mode", "none", "--tensor-split", "3, 1.5", "--main-gpu", "0")
    assert done.exit_code == 0, done.output
    paths = {"model_path": "/m.gguf", "alias": "m", "api_key_file": None}
    flags = read_args(build_args(fleets[0].engine, host="127.0.0.1", port=1, **paths))
    assert [flags[name] for name in ("--split-mode", "--tensor-split", "--main-gpu")] == ["none", "3.0,1.5", 0]
    assert up("--config", str(file)).exit_code == 0
    assert (fleets[1].engine.split_mode, fleets[1].engine.main_gpu) == ("row", 1), "what is left out is the file's"


@pytest.mark.parametrize(
    ("option", "value", "told"),
    [
        ("--split-mode", "sideways", "must be one of none, layer, row, tensor"),
        ("--tensor-split", "3:1", "must be a number for each of an engine's GPUs, e.g. 3,1"),
        ("--tensor-split", "3,-1", "parts must be finite"),
        ("--tensor-split", "0,0", "not all 0"),
        ("--main-gpu", "-1", "main_gpu"),
    ],
)
def test_a_split_that_cannot_be_is_refused_in_words(option, value, told):
    done = up(option, value)
    assert done.exit_code == 2
    assert told in " ".join(done.stderr.split())


class Left(Exception):
    """The process would have ended with this code."""


@pytest.fixture
def leave(monkeypatch, tmp_path):
    """Ends as where Ray is lost, and returns the exit code."""

    def end(code):
        raise Left(code)

    monkeypatch.setenv("LLTM_RAY_CACHE", str(tmp_path))
    monkeypatch.setattr(UP, "end_lost", lambda: None)
    monkeypatch.setattr(UP.os, "_exit", end)

    def leave_lost(stop):
        with pytest.raises(Left) as left:
            UP._leave_lost("f", stop)
        return left.value.args[0]

    return leave_lost


def test_a_lost_ray_is_success_only_just_after_a_signal(leave):
    now, long_ago, never = UP._Stop(), UP._Stop(), UP._Stop()
    now.set()
    long_ago.set()
    long_ago.asked_s = time.monotonic() - 60
    assert [leave(stop) for stop in (now, long_ago, never)] == [0, 1, 1], "a signal, a drain that broke, a crash"


def test_a_lost_ray_takes_only_its_own_fleet_out_of_the_books(leave):
    RunState.of_this_process("f", "a", None, holds_fleet=True).save()
    leave(UP._Stop())
    assert RunState.load("f") is None
    other = os.getppid()
    running = RunState(name="f", ray_address="a", endpoint="", pid=other, pid_started=started_at(other))
    running.save()
    leave(UP._Stop())
    assert RunState.load("f") == running


@pytest.fixture
def handlers():
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.parametrize("first", [signal.SIG_DFL, signal.SIG_IGN], ids=["terminal", "nohup"])
def test_a_closed_terminal_while_starting_undoes_the_start_as_sigterm_does(monkeypatch, handlers, first):
    seen = []

    class Cluster:
        @staticmethod
        def start(*_args, **_options):
            seen.extend(map(signal.getsignal, (signal.SIGTERM, signal.SIGHUP)))

    monkeypatch.setattr(UP, "Cluster", Cluster)
    signal.signal(signal.SIGHUP, first)
    UP._start(FleetConfig())
    undo = signal.default_int_handler
    assert seen == [undo, undo if first == signal.SIG_DFL else first]
    stop = UP._Stop()
    UP._hear_signals(stop)
    signal.raise_signal(signal.SIGTERM)
    assert stop.is_fresh
