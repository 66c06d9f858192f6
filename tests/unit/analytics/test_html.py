"""The page of a report: one file, each chart or the reason why not, links that lead somewhere, no foreign script."""

from __future__ import annotations

import base64
import json
from dataclasses import replace
from hashlib import sha256
from html.parser import HTMLParser
from importlib.resources import files
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lltm_ray.analytics.compare import Comparison, Mix, Row
from lltm_ray.analytics.html import to_html
from lltm_ray.analytics.html.charts import CHARTS
from lltm_ray.analytics.html.figures import label
from lltm_ray.analytics.html.graphs import forest, layered
from tests.unit.analytics.made_report import ANALYSES, HOSTILE, empty_report, made_report

PLOTLY = (files("plotly.package_data") / "plotly.min.js").read_text(encoding="utf-8")
MOST_BYTES = 2_000_000
"""Of all but Plotly."""


class Page(HTMLParser):
    """What a browser would find in it."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.scripts: list[str] = []
        self.text: list[str] = []
        self._open = ""
        self.feed(text.replace(PLOTLY, "PLOTLY", 1))  # 5 MB that a parser in Python takes seconds for
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        self._open = tag if tag in ("script", "style") else ""
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._open = ""

    def handle_data(self, data: str) -> None:
        if self._open == "script":
            self.scripts[-1] += data
        elif not self._open:
            self.text.append(data)

    def all(self, name: str) -> list[str]:
        """An attribute, wherever it is."""
        return [attributes[name] for _, attributes in self.elements if name in attributes]

    @property
    def said(self) -> str:
        return " ".join(" ".join(self.text).split())

    @property
    def figures(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.scripts[0], parse_constant=_refuse)
        return found


def _refuse(name: str) -> float:
    raise AssertionError(name)


def strings(value: Any) -> list[str]:
    """All of a figure's texts."""
    if isinstance(value, dict):
        return [text for each in value.values() for text in strings(each)]
    if isinstance(value, list):
        return [text for each in value for text in strings(each)]
    return [value] if isinstance(value, str) else []


@pytest.fixture(scope="module")
def page() -> Page:
    return Page(to_html(made_report()))


def test_every_chart_is_drawn_and_told_as_a_table(page: Page):
    assert set(page.figures) == {chart.key for chart in CHARTS}
    assert sorted(page.all("data-chart")) == sorted(chart.key for chart in CHARTS)
    assert page.said.count("As a table") == len(CHARTS) + len(made_report().timelines)
    assert all(figure["data"] and figure["height"] > 50 for figure in page.figures.values())


def test_every_analysis_has_a_chart():
    assert {chart.analysis for chart in CHARTS} == set(ANALYSES)


def test_a_finding_leads_to_its_chart_and_to_the_spans_of_its_evidence(page: Page):
    ids = page.all("id")
    links = [href[1:] for href in page.all("href") if href.startswith("#")]
    assert len(ids) == len(set(ids))
    assert set(links) <= set(ids)
    for wanted in ("chart-stragglers", "chart-interference", "chart-prefixes", "chart-failures", "chart-tracks"):
        assert wanted in links
    assert {f"trace-{n}" for n in range(1, len(made_report().timelines) + 1)} <= set(links)
    assert {"finding-1", "finding-5"} <= set(links)


def test_one_file_asks_for_nothing_and_runs_only_its_own_scripts(page: Page):
    assert [href for href in page.all("href") if not href.startswith(("#", "data:"))] == []
    assert page.all("src") == []
    policy = next(attributes["content"] for _, attributes in page.elements if "http-equiv" in attributes)
    assert page.scripts[1] == "PLOTLY"
    scripts = (PLOTLY, page.scripts[2])
    hashes = [base64.b64encode(sha256(script.encode()).digest()).decode() for script in scripts]
    assert all(f"'sha256-{each}'" in policy for each in hashes)
    assert policy.startswith("default-src 'none'")
    assert "unsafe-inline'" not in policy.split("script-src")[1].split(";")[0]


@pytest.mark.parametrize("engines", [4, 24])
def test_the_file_stays_small(engines: int):
    text = to_html(made_report(engines=engines, slots=8, points=120))
    assert text.count(PLOTLY) == 1
    assert len(text.replace(PLOTLY, "").encode()) < MOST_BYTES


def test_hostile_names_stay_text():
    evil = Page(to_html(made_report(tenant=HOSTILE)))
    plain = Page(to_html(made_report()))
    assert len(evil.scripts) == 3
    assert evil.scripts[1:] == plain.scripts[1:]
    assert [tag for tag, _ in evil.elements] == [tag for tag, _ in plain.elements]
    assert [name for _, attributes in evil.elements for name in attributes if name.startswith("on")] == []
    assert "<script>alert(1)</script>" in evil.said
    shown = [text for text in strings(evil.figures) if "script" in text]
    assert shown
    assert [text for text in shown if "<script" in text or "<img" in text] == []


def test_a_hostile_error_fleet_and_reason_stay_text():
    report = replace(empty_report(error=HOSTILE), fleet=HOSTILE, reason=HOSTILE, engine=HOSTILE)
    page = Page(to_html(report))
    assert [tag for tag, _ in page.elements if tag == "img"] == []
    assert len(page.scripts) == 3
    assert page.figures == {}


def test_what_cannot_be_drawn_says_why():
    nothing = Page(to_html(empty_report()))
    assert nothing.all("data-chart") == []
    for chart in CHARTS:
        assert f"No data: {chart.nothing}." in nothing.said
    assert "there was nothing to judge" in nothing.said
    failed = Page(to_html(empty_report(error="MemoryError: 8 GiB")))
    assert failed.said.count("No data: the analysis failed: MemoryError: 8 GiB.") == len(CHARTS)
    gone = Page(to_html(replace(empty_report(), results={})))
    assert gone.said.count("did not run") == len(CHARTS)


def test_rows_that_left_memory_are_told():
    page = Page(to_html(replace(made_report(), missed_rows=1234)))
    assert "1,234 rows had left memory before they were read" in page.said


def test_only_what_a_finding_names_is_drawn_in_the_colour_of_findings(page: Page):
    stragglers = page.figures["stragglers"]["data"][0]
    names = page.figures["stragglers"]["layout"]["yaxis"]["ticktext"]
    red = [name for name, colour in zip(names, stragglers["marker"]["color"], strict=True) if colour == "var(--bad)"]
    assert red == ["engine-3"]


def test_tracks_share_one_time_axis(page: Page):
    tracks = page.figures["tracks"]
    assert {trace.get("xaxis", "x") for trace in tracks["data"]} == {"x"}
    assert len({trace["yaxis"] for trace in tracks["data"]}) == 6
    slowed = [trace for trace in tracks["data"] if "text" in trace]
    assert [any(each is not None for each in trace["y"]) for trace in slowed] == [False, True]


def test_ticks_closer_than_a_minute_say_seconds(page: Page):
    axes = [
        axis for each in page.figures.values() for axis in each["layout"].values() if "tickformatstops" in str(axis)
    ]
    assert len(axes) >= 2
    for apart_ms, text in ((500, "%H:%M:%S.%3f"), (5_000, "%H:%M:%S"), (60_000, "%H:%M"), (3_600_000, "%H:%M")):
        for axis in axes:
            ranges = {each["value"]: each["dtickrange"] for each in axis["tickformatstops"]}
            fit = [value for value, (low, high) in ranges.items() if (low or 0) <= apart_ms <= (high or 1e12)]
            assert fit == [f"{text}\n%b %d"]


def test_a_waterfall_adds_up(page: Page):
    bars = page.figures["phases"]["data"][0]
    ends = [base + length for base, length in zip(bars["base"], bars["x"], strict=True)]
    assert ends[:-2] == pytest.approx(bars["base"][1:-1], rel=1e-4)
    assert ends[-1] == pytest.approx(ends[-2], rel=1e-4)


def comparison() -> Comparison:
    shared = {"scope": "", "statistic": "p95", "unit": "s", "difference": -0.1, "difference_low": -0.2}
    rest = {"difference_high": -0.05, "effect": -0.4, "count_before": 900, "count_after": 910}
    better = Row(metric=f"latency {HOSTILE}", before=1.0, after=0.9, ratio=0.9, ratio_low=0.85, ratio_high=0.95,
                 verdict="better", **shared, **rest)  # fmt: skip
    nan = float("nan")
    unknown = replace(better, metric="errors", before=0.0, ratio=nan, ratio_low=nan, ratio_high=nan, verdict="worse")
    mix = Mix(feature="prompt tokens", before=300.0, after=900.0, distance=0.6, is_same=False)
    return Comparison(
        before_unix_nano=(1, 2), after_unix_nano=(3, 4), confidence=0.95,
        rows=(better, unknown, replace(better, scope="engine-1")), mix=(mix,),
    )  # fmt: skip


def test_a_comparison_shows_each_figure_with_its_interval_and_what_else_changed():
    page = Page(to_html(made_report(), comparison()))
    assert "0.85× to 0.95×" in page.said
    assert "The work was not the same, which may be the cause: prompt tokens 300 → 900." in page.said
    assert page.figures["comparison"]["data"][0]["x"] == [0.9]
    assert "#comparison" in page.all("href")
    assert len(page.scripts) == 3
    assert "comparison" not in Page(to_html(made_report())).all("id")


def test_what_a_large_fleet_leaves_out_is_told():
    page = Page(to_html(made_report(engines=12, slots=8)))
    heads = [each["text"] for each in page.figures["dependencies"]["layout"]["annotations"]]
    assert heads == ["client", "gateway", "engine", "slot, the busiest 48 of 96", "gpu"]
    assert page.figures["timeline"]["layout"]["yaxis"]["ticktext"] == [f"engine-{n}" for n in range(12)]


def test_a_label_is_cut_and_cannot_be_a_tag():
    assert label("<b>&lt;" + "x" * 60) == "&lt;b&gt;&amp;lt;" + "x" * 26 + "…"


NAMES = st.lists(st.text("abcdef", min_size=1, max_size=3), min_size=1, max_size=12, unique=True)


@settings(deadline=None)
@given(NAMES, st.lists(st.tuples(st.integers(0, 11), st.integers(0, 11)), max_size=20))
def test_every_node_of_any_forest_has_a_place_of_its_own(names: list[str], pairs: list[tuple[int, int]]):
    links = [(names[one % len(names)], names[other % len(names)]) for one, other in pairs]
    places = forest(names, links)
    assert set(places) == set(names)
    trees = [(parent, child) for parent, child in dict(reversed([(c, p) for p, c in links])).items() if parent != child]
    if len(trees) == len(links) and len({child for _, child in links}) == len(links):
        assert len(set(places.values())) == len(names)


def test_a_family_stands_right_of_what_it_grew_from_and_between_its_children():
    places = forest(["a", "b", "c", "d"], [("a", "b"), ("a", "c"), ("c", "d")])
    assert [places[name][0] for name in "abcd"] == [0.0, 1.0, 1.0, 2.0]
    assert places["a"][1] == (places["b"][1] + places["c"][1]) / 2


@settings(deadline=None)
@given(st.permutations(range(6)))
def test_layers_are_ordered_so_that_parallel_edges_do_not_cross(order: list[int]):
    layers = [[f"a{n}" for n in range(6)], [f"b{n}" for n in order]]
    places = layered(layers, [(f"a{n}", f"b{order[n]}") for n in range(6)])
    assert [places[f"a{n}"][1] for n in range(6)] == pytest.approx([places[f"b{order[n]}"][1] for n in range(6)])
    assert {x for x, _ in places.values()} == {0.0, 1.0}
