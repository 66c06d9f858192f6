"""Results and figures of the familiar calls, without a fleet."""

import gc
import logging
import threading
import traceback

import pytest

from lltm_ray.errors import LltmRayError, UpstreamError
from lltm_ray.records import Completion, StreamEvent, Timings, Usage
from lltm_ray.sdk.figures import Figures
from lltm_ray.sdk.result import InferResult, InferStream, of_completion

END = StreamEvent(
    finish_reason="stop", usage=Usage(input_tokens=5, output_tokens=2), timings=Timings(predicted_n=2, predicted_ms=10)
)


def events(*texts, error=None, closed=None):
    try:
        for text in texts:
            yield StreamEvent(text=text, engine="engine-0")
        if error is not None:
            raise error
        yield END
    finally:
        if closed is not None:
            closed.append(True)


def test_a_stream_gives_its_pieces_as_they_come_and_then_the_whole():
    done, heard = [], []
    stream = InferStream(events("a", "b"), heard.append, done.append)
    assert next(stream) == "a"
    assert heard == ["a"]
    assert not done
    assert list(stream) == ["b"]
    result = stream.result
    assert (str(result), result.tokens_generated, result.prompt_tokens, result.finish_reason) == ("ab", 2, 5, "stop")
    assert result.tokens_per_sec == pytest.approx(200)
    assert 0 <= result.ttft_ms <= result.latency_ms
    assert done == [result]


def test_a_result_reads_what_is_left_of_its_stream():
    stream = InferStream(events("a", "b"), None, lambda _: None)
    assert stream.result.text == "ab"
    assert list(stream) == []


def test_an_error_ends_the_stream_and_keeps_what_came():
    pieces, done, problem = [], [], UpstreamError(400, "no")
    stream = InferStream(events("a", error=problem), pieces.append, done.append)
    with pytest.raises(UpstreamError) as caught:
        list(stream)
    assert caught.value is problem
    assert pieces == ["a"]
    assert list(stream) == []
    result = stream.result
    assert (result.received, result.success, result.tokens_generated) == ("a", False, 1)
    assert (result.error, result.error_message) == (problem, str(problem))
    assert done == [result]


def test_a_result_that_reads_a_failing_stream_keeps_the_error():
    stream = InferStream(events("a", error=UpstreamError(400, "no")), None, lambda _: None)
    assert (stream.result.received, stream.result.error_message) == ("a", "llama-server answered 400: no")


FAILED = InferResult(received="The first ha", latency_ms=1, error=UpstreamError(503, "busy"))


@pytest.mark.parametrize("read", [lambda result: result.text, InferResult.check])
def test_a_failed_result_cannot_pass_for_an_answer(read):
    with pytest.raises(UpstreamError) as caught:
        read(FAILED)
    assert caught.value is FAILED.error
    whole = InferResult(received="all", latency_ms=1)
    assert read(whole) in ("all", whole)


def test_a_failed_result_is_false():
    assert not FAILED
    assert InferResult(latency_ms=1), "an empty answer is one"


def test_a_failed_result_can_be_logged_and_says_so(caplog):
    logging.getLogger().warning("got %s", FAILED)
    assert caplog.messages == ["got <failed: llama-server answered 503: busy>"]
    assert f"{FAILED}" == str(FAILED) == "<failed: llama-server answered 503: busy>"
    assert "The first ha" not in str(FAILED)
    assert "The first ha" in repr(FAILED)
    assert str(InferResult(received="all", latency_ms=1)) == f"{InferResult(received='all', latency_ms=1)}" == "all"


def test_reading_a_failed_result_again_and_again_keeps_its_trace_short():
    lengths = []
    for _ in range(3):
        with pytest.raises(UpstreamError):
            _ = FAILED.text
        lengths.append(len(traceback.extract_tb(FAILED.error.__traceback__)))
    assert lengths == [3, 3, 3]


def test_a_stream_that_is_left_closes_its_request_and_is_counted():
    closed, done = [], []
    stream = InferStream(events("a", "b", closed=closed), None, done.append)
    next(stream)
    stream.close()
    assert closed == [True]
    assert [result.text for result in done] == ["a"]
    assert stream.result.finish_reason is None


def test_a_stream_that_is_dropped_closes_its_request_without_the_garbage_collector():
    closed, done = [], []
    gc.disable()
    try:
        for piece in InferStream(events("a", "b", closed=closed), None, done.append):
            assert piece == "a"
            break
        assert closed == [True]
    finally:
        gc.enable()
    assert [result.success for result in done] == [True]


@pytest.mark.parametrize("problem", [ConnectionError("gone"), KeyboardInterrupt()])
def test_a_stream_that_breaks_is_no_success(problem):
    done = []
    stream = InferStream(events("a", error=problem), None, done.append)
    with pytest.raises(type(problem)):
        list(stream)
    assert (stream.result.received, stream.result.success) == ("a", False)
    assert stream.result.error_message == (str(problem) or "KeyboardInterrupt")
    assert done == [stream.result]


def test_a_callback_that_fails_ends_the_request():
    closed = []
    stream = InferStream(events("a", "b", closed=closed), int, lambda _: None)
    with pytest.raises(ValueError, match="invalid literal"):
        next(stream)
    assert closed == [True]
    assert not stream.result.success


def test_a_stream_that_was_never_read_has_no_answer():
    stream = InferStream(events("a"), None, lambda _: None)
    stream.close()
    assert (stream.result.received, stream.result.success) == ("", False)
    with pytest.raises(LltmRayError, match="never read"):
        stream.result.check()


def test_a_result_of_a_whole_answer_has_its_figures():
    timings = Timings(ttft_s=0.25, predicted_n=4, predicted_ms=100)
    result = of_completion(Completion(text="x", timings=timings, engine="engine-1"), 1.5)
    assert (result.latency_ms, result.ttft_ms, result.tokens_per_sec, result.engine) == (1500, 250, 40, "engine-1")
    assert result.success
    assert result.error_message is None


def result(latency_ms, tokens=10, ttft_ms=None, error=None):
    return InferResult(latency_ms=latency_ms, ttft_ms=ttft_ms, usage=Usage(output_tokens=tokens), error=error)


def test_figures_of_nothing_are_zeros():
    summary = Figures(10).summary()
    assert summary["throughput"]["total_requests"] == 0
    assert summary["latency"]["sample_count"] == 0
    assert summary["throughput"]["tokens_per_sec"] == 0


def test_concurrent_requests_add_up_in_the_rates():
    now = [100.0]
    figures = Figures(10, clock=lambda: now[0])
    now[0] = 102.0
    for _ in range(4):
        figures.add(result(2000))
    throughput = figures.summary()["throughput"]
    assert throughput["tokens_per_sec"] == pytest.approx(20)
    assert throughput["requests_per_sec"] == pytest.approx(2)


def test_a_stream_that_ends_while_figures_are_counted_is_counted_too():
    figures = Figures(10)

    class Interrupted(InferResult):
        @property
        def success(self):
            figures.add(result(1))  # as the garbage collector would in the midst of `add`
            return True

    counting = threading.Thread(target=figures.add, args=(Interrupted(latency_ms=5),), daemon=True)
    counting.start()
    counting.join(10)
    assert not counting.is_alive()
    assert figures.summary()["throughput"]["total_requests"] == 3


def test_percentiles_are_numpys_and_of_answers_alone():
    figures = Figures(200)
    for latency_ms in range(1, 101):
        figures.add(result(latency_ms, ttft_ms=latency_ms / 2))
    figures.add(result(1e6, error=UpstreamError(500, b"")))
    summary = figures.summary()
    assert summary["latency"] == pytest.approx(
        {"mean": 50.5, "p50": 50.5, "p95": 95.05, "p99": 99.01, "min": 1, "max": 100, "sample_count": 100}
    )
    assert summary["ttft"]["max"] == 50
    assert (summary["throughput"]["total_requests"], summary["throughput"]["failed_requests"]) == (101, 1)


def test_figures_keep_a_bounded_number_and_count_from_any_thread():
    figures = Figures(50)
    workers = [threading.Thread(target=lambda: [figures.add(result(1)) for _ in range(500)]) for _ in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    summary = figures.summary()
    assert summary["throughput"]["total_requests"] == 4000
    assert summary["throughput"]["total_tokens"] == 40_000
    assert summary["latency"]["sample_count"] == 50
    figures.reset()
    assert figures.summary()["throughput"]["total_tokens"] == 0
