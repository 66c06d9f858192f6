from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lltm_ray.errors import UpstreamError
from lltm_ray.llamacpp.metrics import ServerMetrics, read_metrics

TEXT = """# HELP llamacpp:prompt_tokens_total Number of prompt tokens processed, excluding cached tokens
# TYPE llamacpp:prompt_tokens_total counter
llamacpp:prompt_tokens_total 1.23457e+06
# HELP llamacpp:prompt_tokens_cached_total Number of prompt tokens reused from the cache
# TYPE llamacpp:prompt_tokens_cached_total counter
llamacpp:prompt_tokens_cached_total 512
llamacpp:prompt_seconds_total 0.0421
llamacpp:tokens_predicted_total 4096
llamacpp:tokens_predicted_seconds_total 1e-06
llamacpp:n_decode_total 77
llamacpp:n_tokens_max 2048
llamacpp:prompt_tokens_seconds 0
llamacpp:requests_processing 2
llamacpp:requests_deferred 3
llamacpp:n_busy_slots_per_decode 1.5
llamacpp:spec_decode_num_accepted_tokens_per_pos_total{position="0"} 9
llamacpp:spec_decode_num_accepted_tokens_per_pos_total{position="1"} 4
llamacpp:of_a_later_build_total 5
process_cpu_seconds_total 12
"""


def test_a_scrape_is_read_by_the_servers_own_names():
    seen = read_metrics(TEXT)
    assert seen.prompt_tokens_total == 1_234_570
    assert (seen.prompt_tokens_cached_total, seen.tokens_predicted_total, seen.n_decode_total) == (512, 4096, 77)
    assert (seen.prompt_seconds_total, seen.tokens_predicted_seconds_total) == (0.0421, 1e-6)
    assert seen.accepted_per_position == (9, 4)
    assert seen.busy == 5


def test_what_a_build_does_not_say_is_none_and_not_zero():
    seen = read_metrics(TEXT)
    assert seen.prompt_tokens_seconds == 0
    assert seen.predicted_tokens_seconds is None
    assert seen.spec_decode_num_drafts_total is None


@pytest.mark.parametrize("text", ["", "# HELP nothing\n", "vllm:prompt_tokens_total 3\n", '{"error":{"code":501}}'])
def test_a_text_of_someone_else_is_no_server_that_did_nothing(text):
    with pytest.raises(UpstreamError, match="--metrics"):
        read_metrics(text)


@pytest.mark.parametrize("raw", ["nan", "inf", "-inf", "many"])
def test_a_counter_without_a_finite_number_is_refused_by_name(raw):
    with pytest.raises(UpstreamError, match=r"tokens_predicted_total is '.*', not a number"):
        read_metrics(f"llamacpp:tokens_predicted_total {raw}\n")


@given(st.text(max_size=200))
def test_text_around_the_samples_changes_nothing(text):
    around = text.replace("llamacpp:", "")
    assert read_metrics(f"{around}\nllamacpp:n_decode_total 1\n{around}") == ServerMetrics(n_decode_total=1)
