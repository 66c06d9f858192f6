from lltm_ray.gateway.exposition import label_sample, merge_metrics

TEXT = """# HELP llamacpp:n_total Things.
# TYPE llamacpp:n_total counter
llamacpp:n_total 5
# HELP llamacpp:busy Busy
# TYPE llamacpp:busy gauge
llamacpp:busy{slot="0"} 1 1700000000
"""


def test_samples_get_their_engine_and_families_stay_whole_with_one_head():
    assert merge_metrics([("a", TEXT), ("b", TEXT.replace("5", "6"))]).splitlines() == [
        "# HELP llamacpp:n_total Things.",
        "# TYPE llamacpp:n_total counter",
        'llamacpp:n_total{engine="a"} 5',
        'llamacpp:n_total{engine="b"} 6',
        "# HELP llamacpp:busy Busy",
        "# TYPE llamacpp:busy gauge",
        'llamacpp:busy{engine="a",slot="0"} 1 1700000000',
        'llamacpp:busy{engine="b",slot="0"} 1 1700000000',
    ]


def test_histogram_samples_stay_with_their_family():
    text = '# TYPE h histogram\nh_bucket{le="+Inf"} 1\nh_sum 2\nh_count 1\n'
    assert merge_metrics([("a", text), ("b", text)]).splitlines() == [
        "# TYPE h histogram",
        'h_bucket{engine="a",le="+Inf"} 1',
        'h_sum{engine="a"} 2',
        'h_count{engine="a"} 1',
        'h_bucket{engine="b",le="+Inf"} 1',
        'h_sum{engine="b"} 2',
        'h_count{engine="b"} 1',
    ]


def test_empty_label_sets_spaces_in_labels_and_odd_names_are_kept_right():
    assert label_sample("m{} 1", "engine", "a") == 'm{engine="a"} 1'
    assert label_sample('m{x="a b"} 1', "engine", "a") == 'm{engine="a",x="a b"} 1'
    assert label_sample("m 1", "engine", 'q"\\\n') == 'm{engine="q\\"\\\\\\n"} 1'


def test_no_engine_gives_no_text():
    assert merge_metrics([]) == ""
