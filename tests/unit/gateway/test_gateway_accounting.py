import json

from lltm_ray.gateway.accounting import TAIL_BYTES, Ends, RequestRecord, read_usage
from lltm_ray.records import Usage


def ends(*parts: bytes) -> bytes:
    kept = Ends()
    for part in parts:
        kept.add(part)
    return kept.join()


def test_usage_of_a_chat_answer_is_read_in_openais_words():
    body = (
        b'{"choices":[],"usage":{"completion_tokens":2,"prompt_tokens":26,"prompt_tokens_details":{"cached_tokens":9}}}'
    )
    assert read_usage(ends(body)) == Usage(input_tokens=26, output_tokens=2, cached_tokens=9)


def test_usage_of_a_stream_is_read_from_its_last_event_however_long_the_stream():
    events = [b'data: {"choices":[{"delta":{"content":"x"}}]}\n\n'] * 1000
    last = b'data: {"choices":[],"usage":{"completion_tokens":1000,"prompt_tokens":7,"total_tokens":1007}}\n\n'
    kept = ends(*events, last, b"data: [DONE]\n\n")
    assert read_usage(kept) == Usage(input_tokens=7, output_tokens=1000)
    assert len(kept) <= 2 * TAIL_BYTES + 1


def test_usage_of_a_stream_without_it_comes_from_timings():
    last = b'data: {"delta":{},"timings":{"cache_n":25,"prompt_n":1,"prompt_ms":1.4,"predicted_n":2}}\n\n'
    assert read_usage(ends(b"data: {}\n\n", last)) == Usage(input_tokens=26, output_tokens=2, cached_tokens=25)


def test_usage_of_an_anthropic_stream_joins_its_first_and_last_events():
    first = b'data: {"message":{"usage":{"cache_read_input_tokens":25,"input_tokens":1,"output_tokens":0}}}\n\n'
    middle = [b'data: {"type":"content_block_delta"}\n\n'] * 500
    last = b'data: {"type":"message_delta","usage":{"output_tokens":2}}\n\n'
    assert read_usage(ends(first, *middle, last)) == Usage(input_tokens=26, output_tokens=2, cached_tokens=25)


def test_generated_text_cannot_pass_for_a_count():
    text = json.dumps({"content": '"usage":{"prompt_tokens":9,"completion_tokens":9}'}).encode()
    assert read_usage(ends(text)) is None


def test_an_answer_without_counts_or_cut_in_the_middle_of_them_has_no_usage():
    assert read_usage(b"") is None
    assert read_usage(b'{"usage":{"prompt_tokens":2') is None
    assert read_usage(b'{"usage":null}') is None


def test_a_record_parses_its_counts_only_when_asked():
    record = RequestRecord(request_id="r", route="/completion", ends=b'{"timings":{"predicted_n":3,"prompt_n":4}}')
    assert record.timings is not None
    assert record.timings.predicted_n == 3
    assert record.usage == Usage(input_tokens=4, output_tokens=3)


def test_the_ends_of_one_large_part_are_bounded():
    assert len(ends(b"a" * 10**6)) == 2 * TAIL_BYTES + 1
