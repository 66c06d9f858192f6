"""Ctrl-C while an answer comes: whoever else has the signal keeps it."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator

import pytest

from lltm_ray.cli.chat import _Interrupts


@pytest.fixture(autouse=True)
def handler() -> Iterator[None]:
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_dropped_interrupt_is_remembered_and_the_handler_comes_back() -> None:
    before = signal.getsignal(signal.SIGINT)
    with _Interrupts() as interrupts:
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            interrupts.check()
    assert signal.getsignal(signal.SIGINT) is before


def test_an_ignored_signal_stays_ignored() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with _Interrupts() as interrupts:
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        os.kill(os.getpid(), signal.SIGINT)
        interrupts.check()
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_off_the_main_thread_the_signal_is_left_alone() -> None:
    before, seen = signal.getsignal(signal.SIGINT), []

    def ask() -> None:
        with _Interrupts() as interrupts:
            interrupts.check()
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert seen == [before]


def test_a_handler_that_python_does_not_know_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    look, before = signal.getsignal, signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(signal, "getsignal", lambda _number: None)  # as it is in a program that embeds Python
    with _Interrupts() as interrupts:
        interrupts.check()
        assert look(signal.SIGINT) is before
    assert look(signal.SIGINT) is before
