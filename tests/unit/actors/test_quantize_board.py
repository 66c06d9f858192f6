"""When a quantization ends itself: when it is told to, or the board has died; no Ray."""

import time
from threading import Event
from types import SimpleNamespace

import ray

from lltm_ray.actors import quantize

BOARD = SimpleNamespace(tell=SimpleNamespace(remote=lambda *said: said))


def until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_a_board_that_is_away_for_a_moment_ends_no_job_and_one_that_died_does(monkeypatch):
    answers = [ray.exceptions.ActorUnavailableError("away", None), ray.exceptions.GetTimeoutError(), False]
    asked, died = [], Event()

    def get(said, timeout):
        asked.append(said)
        if not answers and died.is_set():
            raise ray.exceptions.ActorDiedError
        answer = answers.pop(0) if answers else False
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(quantize.ray, "get", get)
    monkeypatch.setattr(quantize, "TELL_EVERY_S", 0.001)
    with quantize._listening(BOARD, 7) as (moved, cancel):
        moved("output.weight", 3, 9)
        until(lambda: (7, "output.weight", 3, 9) in asked and not answers)
        assert not cancel.is_set()
        died.set()
        assert cancel.wait(60)
