"""A report as text and as JSON says what was found, and no name in it can steer a terminal."""

from __future__ import annotations

import itertools
import json
import math
import re
from dataclasses import replace

import pytest

from lltm_ray.analytics import units
from lltm_ray.analytics.answer import Answer, Finding, table
from lltm_ray.analytics.html import to_html
from lltm_ray.analytics.html.figures import About
from lltm_ray.analytics.html.loads import headroom
from lltm_ray.analytics.text import to_json, to_text
from tests.unit.analytics.made_report import HOSTILE, LENGTH_S, START, empty_report, made_report


def test_the_worst_finding_comes_first_with_what_to_do_and_where_to_look():
    text = to_text(made_report())
    places = [
        text.index(part) for part in ("1. STRAGGLER", "lltm-ray drain", "lltm-ray explain req-0001", "2. INTERFERENCE")
    ]
    assert places == sorted(places)
    assert text.index("5. THROTTLED GPU") < text.index("Latency on the critical path")
    assert "2026-11-21 13:00:00 to 14:00:00 UTC: 25,310 requests, 152,000 spans" in text
    assert "Analysed with pandas in 1.83 s (cuDF is not usable here" in text
    assert all(len(line) <= 100 for line in text.splitlines())


def test_a_report_that_is_printed_is_its_text():
    assert str(made_report()) == to_text(made_report())


def told(kind, impact_s, explains=()):
    return Finding(kind=kind, subject="x", text="t", advice="a", impact_s=impact_s, explains=explains)


def of_findings(*findings):
    made = made_report()
    results = {name: replace(each, findings=()) for name, each in made.results.items()}
    results["prefixes"] = replace(results["prefixes"], findings=findings)
    return replace(made, results=results)


def test_what_another_finding_explains_comes_right_behind_it_and_counts_once():
    cause = told("cause", 60.0, explains=(("effect", "x"), ("absent", "x")))
    report = of_findings(told("effect", 100.0), told("other", 90.0), cause, told("last", 1.0))
    assert [each.kind for each in report.findings] == ["other", "cause", "effect", "last"]
    assert report.lost_s == 151
    text = to_text(report)
    assert "together at most 2 min 31 s" in text
    assert "3. EFFECT x: 100 s lost; explained by 2" in text
    assert 'Explained by <a href="#finding-2">' in to_html(report)


def test_a_finding_that_costs_far_more_than_what_would_explain_it_stands_by_itself():
    cause = told("cause", 40.0, explains=(("effect", "x"),))
    report = of_findings(told("effect", 100.0), cause)
    assert [each.kind for each in report.findings] == ["effect", "cause"]
    assert report.lost_s == 140


def test_findings_that_explain_each_other_are_both_counted():
    one, other = told("one", 5.0, explains=(("other", "x"),)), told("other", 6.0, explains=(("one", "x"),))
    assert of_findings(one, other).lost_s == 11


def test_figures_follow_the_findings():
    lines = to_text(made_report()).splitlines()
    assert any(line.split() == ["decode", "59.7", "%", "911", "ms", "3.30", "s"] for line in lines)
    assert any("Cache reuse" in line and "58.0 %" in line and "71.0 % could be" in line for line in lines)
    assert any("Queueing headroom" in line and "21.0 %" in line and "llama-8b" in line for line in lines)
    assert any("Joules per token" in line and "1.74 J" in line for line in lines)
    assert any("llama-8b: 7.03 requests/s in its busiest 14.2 s, knee at 8.50" in line for line in lines)


def with_models(**columns):
    """The made report, with other models' queues."""
    made = made_report()
    result = made.results["queueing"]
    models = result.answer.tables["models"].assign(**columns)
    tables = result.answer.tables | {"models": models}
    return replace(made, results={**made.results, "queueing": replace(result, answer=Answer(tables))})


WITHHELD = "qwen-32b: too few requests came to tell how busy it got, and how near to its knee"


def headroom_of(report):
    """The text's lines of it as one, and what is said instead of a note in other lines."""
    lines = to_text(report).splitlines()
    assert all(len(line) <= 100 for line in lines)
    (place,) = [place for place, line in enumerate(lines) if "Queueing headroom" in line]
    column = lines[place].index(": ") - len("llama-8b")
    more = itertools.takewhile(lambda line: not line[:column].strip(), lines[place + 1 :])
    value = lines[place].removeprefix("    Queueing headroom").split("  ")
    return " ".join([*(each.strip() for each in value if each), *(line.strip() for line in more if line)])


def hovered(report):
    """The chart's headroom of the first model."""
    result = report.results["queueing"]
    about = About(frozenset(each.subject for each in result.findings), 0, 1)
    bars, *_ = headroom(result.answer, about)["data"]
    (said,) = [said for said in bars["hovertext"] if "llama-8b" in said]
    return re.search(r"headroom: (?:<[^>]*>)*([^<]*)", said)[1]


def test_headroom_of_few_requests_is_withheld_and_said_why():
    names = ("headroom_ratio", "headroom_low_ratio", "headroom_high_ratio", "busiest_per_s", "busiest_s")
    few = with_models(requests=[12, 30], arrivals_per_s=[0.004, 0.01], **dict.fromkeys(names, math.nan))
    assert headroom_of(few) == f"– {WITHHELD}"
    page = to_html(few)
    assert WITHHELD in page
    assert "0.01 a second on average" in page
    assert "too few requests to tell" in page
    (models,) = [
        each["tables"]["models"] for each in json.loads(to_json(few))["analyses"] if each["analysis"] == "queueing"
    ]
    assert [row["headroom_ratio"] for row in models] == [None, None]
    bars, *_ = headroom(few.results["queueing"].answer, About(frozenset(), 0, 1))["data"]
    assert bars["x"] == [0.004, 0.01]


def test_headroom_is_that_of_the_model_that_has_least_of_those_that_are_known():
    some = with_models(headroom_ratio=[math.nan, 1.25], busiest_per_s=[math.nan, 0.4])
    assert "qwen-32b: 0.40 requests/s in its busiest 4 min 10 s, knee at 0.90" in headroom_of(some)
    none = with_models(headroom_ratio=math.nan, knee_per_s=math.nan)
    assert "Queueing headroom" not in to_text(none)


KNEE = "knee at 8.50 (the load from which waits grow fast). "
WAITED = "; in that stretch they waited 120 ms on average."


@pytest.mark.parametrize(
    ("low", "ratio", "high", "value", "said"),
    [
        (0.04, 0.21, 0.44, "21.0 %", "21.0 % more could come before they do (likely 4 to 44 %)"),
        (-0.1, 0.21, 0.44, "21.0 %", "21.0 % more could come before they do, or none (likely 0 to 44 %)"),
        (0.7, 1.25, 1.9, "125 %", "2.25 times as much could come before they do (likely 70 to 190 %)"),
        (7.0, 9.5, 12.0, "950 %", "10.5 times as much could come before they do (likely 700 to over 1,000 %)"),
        (9.0, 18.8, 25.0, "over 1,000 %", "Over 10 times as much could come before they do (likely 900 to over 1,000"),
        (12.0, 18.8, 25.0, "over 1,000 %", "Over 10 times as much could come before they do; in that"),
        (-0.4, -0.2, -0.1, "-20.0 %", "More came than that; in"),
        (-0.4, -0.2, 0.1, "-20.0 %", "More came than that, or nearly (likely -40 to 10 %)"),
    ],
)
@pytest.mark.parametrize("is_found", [True, False])
def test_a_headroom_is_told_with_its_range_and_in_words(low, ratio, high, value, said, is_found):
    made = with_models(
        headroom_ratio=[ratio, math.nan], headroom_low_ratio=[low, math.nan], headroom_high_ratio=[high, math.nan]
    )
    found = replace(told("saturation", 1.0), subject="llama-8b")
    result = replace(made.results["queueing"], findings=(found,) if is_found else ())
    made = replace(made, results={**made.results, "queueing": result})
    value = value if is_found or ratio > 0 else "none"
    shown = headroom_of(made)
    assert shown.startswith(f"{value} llama-8b: 7.03 requests/s in its busiest 14.2 s, {KNEE}{said}")
    assert shown.endswith(WAITED)
    tile = to_html(made).partition("<h2>Queueing headroom</h2>")[2].partition("</article>")[0]
    assert ("problem" in tile) == (high < 0 and is_found)
    assert f"<b>{value}</b>" in tile
    assert hovered(made).startswith(value)
    assert ("likely" in hovered(made)) == ("likely" in shown)


def test_requests_that_hardly_waited_past_the_knee_are_told_as_such():
    past = {"headroom_low_ratio": -0.4, "headroom_ratio": -0.2, "headroom_high_ratio": -0.1}
    said = "More came than that, yet they waited only 99 ms on average: they came evenly, or"
    assert f"{said} not for long." in headroom_of(with_models(**past, busiest_wait_s=0.099))
    assert "only" not in headroom_of(with_models(busiest_wait_s=0.099))


def test_a_load_too_light_to_tell_a_knee_is_told_as_such():
    wide = {"knee_low_per_s": [7.5, 0.8], "knee_high_per_s": [20.0, 1.0]}
    said = "llama-8b: 7.03 requests/s in its busiest 14.2 s, knee somewhere from 7.50 to 20 (the load from which waits"
    why = "grow fast): too little was seen to tell it closer"
    assert headroom_of(with_models(**wide)).startswith(f"21.0 % {said} {why}. 21.0 % more could come")
    names = ("headroom_ratio", "headroom_low_ratio", "headroom_high_ratio")
    withheld = with_models(**wide, **dict.fromkeys(names, math.nan))
    assert headroom_of(withheld) == f"– {said} {why}. How near that is cannot be told."
    bars, *_ = headroom(withheld.results["queueing"].answer, About(frozenset(), 0, 1))["data"]
    assert "likely 7.50 to 20" in bars["hovertext"][0]


@pytest.mark.parametrize(("ratio", "value"), [(0.0, "–"), (-0.02, "–"), (0.3, "30.0 %")])
def test_a_knee_that_only_what_was_served_tells_is_a_lower_bound(ratio, value):
    served = {key: [7.03, 0.9] for key in ("knee_low_per_s", "knee_per_s", "knee_high_per_s", "seen_per_s")}
    ratios = {key: [ratio, 1.25] for key in ("headroom_low_ratio", "headroom_ratio", "headroom_high_ratio")}
    shown = headroom_of(with_models(**served, **ratios))
    knee = "knee at 7.03 or more: so much was served without long waits."
    assert shown.startswith(f"{value} llama-8b: 7.03 requests/s in its busiest 14.2 s, {knee}")
    assert ("How much more could come before they do was not seen" in shown) == (value == "–")
    assert hovered(with_models(**served, **ratios)).startswith(value)
    assert "-" not in shown.removeprefix(value).replace("llama-8b", "")


def test_a_load_that_no_part_of_the_window_exceeds_is_told_as_that_of_all_of_it():
    whole = with_models(busiest_s=LENGTH_S)
    assert f"21.0 % llama-8b: 7.03 requests/s all through the window, {KNEE}" in headroom_of(whole)


def test_reuse_beyond_what_hashes_show_is_not_called_possible():
    made = made_report()
    result = made.results["prefixes"]
    assert result.answer is not None
    better = replace(result, answer=Answer(result.answer.tables, {"reused_ratio": 0.8, "reusable_ratio": 0.7}))
    text = to_text(replace(made, results={**made.results, "prefixes": better}))
    assert "80.0 %" in text
    assert "could be" not in text


def test_nothing_found_is_told_with_what_was_looked_at():
    made = made_report()
    clean = replace(made, results={name: replace(each, findings=()) for name, each in made.results.items()})
    assert "Nothing found in 25,310 requests: 12 of 12 analyses ran." in to_text(clean)
    assert "there was nothing to judge" in to_text(empty_report())


def test_an_analysis_that_failed_is_told_even_where_nothing_was_found():
    failing = replace(empty_report(error="KeyError: \x1b]0;owned\x07"), requests=5)
    text = to_text(failing)
    assert "but only 0 of 12 analyses ran" in text
    assert "The analysis of prefixes failed: KeyError" in text
    assert "\x1b" not in text


def test_no_name_steers_the_terminal():
    text = to_text(made_report(tenant=HOSTILE))
    assert "alert(1)" in text
    assert [each for each in text if not each.isprintable() and each != "\n"] == []


def test_json_has_everything_and_null_for_what_is_not_known():
    def refuse(name: str) -> float:
        raise AssertionError(name)

    made = made_report(tenant=HOSTILE)
    told = json.loads(to_json(made), parse_constant=refuse)
    assert [each["kind"] for each in told["findings"]] == [each.kind for each in made.findings]
    assert told["findings"][1]["subject"] == HOSTILE
    assert told["findings"][0]["evidence"] == list(made.findings[0].evidence)
    assert [each["analysis"] for each in told["analyses"]] == list(made.results)
    gpus = next(each for each in told["analyses"] if each["analysis"] == "GPU and energy")["tables"]["gpus"]
    assert gpus[0]["slowed_ratio"] is None
    assert gpus[1]["evidence"] == list(made.findings[4].evidence)
    assert told["timelines"][made.findings[0].evidence[0]][0]["span"] == "request"
    assert told["rows"] == made.rows
    assert told["analyses"][0]["ms"] == made.results["self time"].ms


def test_json_of_a_failed_analysis_holds_its_error():
    told = json.loads(to_json(empty_report(error="MemoryError")))
    assert {(each["error"], len(each["tables"])) for each in told["analyses"]} == {("MemoryError", 0)}


def test_ids_with_line_ends_stay_on_their_line():
    made = made_report()
    result = made.results["anomalies"]
    finding = replace(result.findings[0], evidence=("a\nb",), subject="x\ny", text="one\ntwo")
    frame = table({"trace_id": ["a\nb"], "request_id": ["c\nd"]})
    odd = replace(result, findings=(finding,), answer=Answer({"requests": frame}))
    text = to_text(replace(made, results={"anomalies": odd}))
    assert "STRAGGLER x�y" in text
    assert "lltm-ray explain c�d" in text


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (units.seconds(0.0004), "0.4 ms"),
        (units.seconds(0.0), "0 ms"),
        (units.seconds(0.25), "250 ms"),
        (units.seconds(61.2), "61.2 s"),
        (units.seconds(754), "12 min 34 s"),
        (units.seconds(719.7), "12 min 0 s"),
        (units.seconds(-754), "-12 min 34 s"),
        (units.seconds(9000), "2.5 h"),
        (units.seconds(math.nan), "–"),
        (units.percent(0.5), "50.0 %"),
        (units.percent(1.0), "100 %"),
        (units.times(1.794), "1.79×"),
        (units.joules(0.0021), "2.10 mJ"),
        (units.joules(2.3e6), "2,300 kJ"),
        (units.size(3 * 2**30), "3 GiB"),
        (units.digits(math.inf), "–"),
        (units.digits(12_345.6), "12,346"),
        (units.clock(0), "–"),
        (units.clock(START + 1_500_000_000), "13:00:01"),
        (units.window(START, START + 60_000_000_000), "2026-11-21 13:00:00 to 13:01:00 UTC"),
        (units.window(START, START + 86_400_000_000_000), "2026-11-21 13:00:00 to 2026-11-22 13:00:00 UTC"),
        (units.cell("error_ratio", 0.05), "5.0 %"),
        (units.cell("ratio", 1.5), "1.50×"),
        (units.cell("arrivals_per_s", 7.03), "7.03"),
        (units.cell("reasons", ("power", "heat\x07")), "power, heat�"),
        (units.heading("decode_ms_token"), "decode, ms a token"),
        (units.heading("p95_s"), "p95"),
    ],
)
def test_a_figure_is_told_in_its_unit(found: str, expected: str):
    assert found == expected
