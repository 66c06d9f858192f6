"""W3C trace context is read as the recommendation says and written as it came."""

import pytest

from lltm_ray.telemetry.context import derive_span_id, new_span_id, new_trace_id, read_traceparent, write_traceparent

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


@pytest.mark.parametrize(
    ("header", "flags"),
    [
        (f"00-{TRACE}-{SPAN}-01", 1),
        (f"00-{TRACE}-{SPAN}-00", 0),
        (f"00-{TRACE}-{SPAN}-03", 3),
        (f"01-{TRACE}-{SPAN}-01-what-a-later-version-adds", 1),
        (f"  00-{TRACE}-{SPAN}-01 ", 1),
    ],
)
def test_a_legal_header_is_read(header: str, flags: int) -> None:
    found = read_traceparent(header, "vendor=1")
    assert found is not None
    assert (found.trace_id, found.span_id, found.flags, found.state) == (TRACE, SPAN, flags, "vendor=1")
    assert found.is_sampled == bool(flags & 1)


@pytest.mark.parametrize(
    "header",
    [
        "",
        "junk",
        f"ff-{TRACE}-{SPAN}-01",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE.upper()}-{SPAN}-01",
        f"00-{TRACE}-{SPAN}-01-more",
        f"00-{TRACE}-{SPAN}",
        f"00-{TRACE[:-1]}-{SPAN}-01",
    ],
)
def test_anything_else_begins_a_new_trace(header: str) -> None:
    assert read_traceparent(header) is None


def test_what_is_written_is_read_again() -> None:
    trace_id, span_id = new_trace_id(), new_span_id()
    assert read_traceparent(write_traceparent(trace_id, span_id, 3)) == (trace_id, span_id, 3, "")


def test_derived_ids_are_stable_and_distinct() -> None:
    ids = {derive_span_id(SPAN, number) for number in range(1, 100)}
    assert len(ids | {SPAN}) == 100
    assert all(len(each) == 16 for each in ids)
    assert derive_span_id(SPAN, 3) == derive_span_id(SPAN, 3)


def test_ids_are_new_each_time() -> None:
    assert len({new_trace_id() for _ in range(1000)}) == 1000
