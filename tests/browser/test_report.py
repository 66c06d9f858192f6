"""A report's file in a real browser: opened from a disk, without a network, in each theme, on a phone, by keyboard."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from lltm_ray.analytics.compare import compare
from lltm_ray.analytics.frames import choose_engine
from lltm_ray.analytics.html import to_html
from lltm_ray.analytics.html.charts import CHARTS
from lltm_ray.analytics.ingest import build_trace
from lltm_ray.analytics.report import make_report
from tests.browser import in_page as js
from tests.browser.cdp import Tab
from tests.fleet_rows import Plan, fleet_rows
from tests.unit.analytics.made_report import HOSTILE, empty_report, made_report

pytestmark = pytest.mark.browser

DRAWN = """
Object.fromEntries([...document.querySelectorAll("[data-chart]")].map((e) => [e.dataset.chart,
  [...e.querySelectorAll(".barlayer path, .scatterlayer path, .heatmaplayer image, .sankey path, .shapelayer path")]
    .filter((mark) => { const box = mark.getBoundingClientRect(); return box.width + box.height > 0; }).length]))
"""
"""Marks of each chart that take up room."""
OUTSIDE = """
[...document.querySelectorAll("[data-chart] .main-svg text")].filter((e) => {
  const [box, plot] = [e, e.closest("[data-chart]")].map((each) => each.getBoundingClientRect());
  return box.width && (box.right > plot.right + 2 || box.left < plot.left - 2 || box.bottom > plot.bottom + 2);
}).map((e) => `${e.closest("[data-chart]").dataset.chart}: ${e.textContent}`)
"""
"""Texts that a chart cuts off."""
PAINTS = """
[".finding", "[data-chart] .ytick text", "[data-chart] .barlayer path"].map((name) => {
  const style = getComputedStyle(document.querySelector(name));
  return [style.backgroundColor, style.fill].join();
})
"""
IN_VIEW = """
((box) => box.height > 0 && box.top >= 0 && box.top < innerHeight)(document.querySelector("{}").getBoundingClientRect())
"""
THEMES = pytest.mark.parametrize("scheme", ["light", "dark"])


async def show(
    tab: Tab, path: Path, text: str, width: int = 1360, height: int = 900, *, is_phone: bool = False
) -> None:
    path.write_text(text, encoding="utf-8")
    await tab.resize(width, height, is_phone=is_phone)
    await tab.ask("Network.emulateNetworkConditions", offline=True, latency=0, downloadThroughput=0, uploadThroughput=0)
    await tab.goto(path.as_uri())
    await tab.wait("document.body.dataset.drawn", 60)


def asked_elsewhere(tab: Tab, path: Path) -> list[str]:
    """Plotly draws a heat map as an image in the page's own text."""
    return [url for url in tab.requested if url != path.as_uri() and not url.startswith("data:image/png;base64,")]


@THEMES
async def test_it_draws_every_chart_and_asks_for_nothing(
    tab: Tab, tmp_path: Path, shots: Callable[[str], Path], scheme: str
) -> None:
    await tab.prefer(prefers_color_scheme=scheme)
    await show(tab, tmp_path / "report.html", to_html(made_report()))
    drawn = await tab.eval(DRAWN)
    assert set(drawn) == {chart.key for chart in CHARTS}
    assert [key for key, marks in drawn.items() if not marks] == []
    assert await tab.eval(OUTSIDE) == []
    assert await tab.eval(js.CONTRAST) == []
    await tab.screenshot(shots(f"report-{scheme}"))
    assert tab.faults == []
    assert asked_elsewhere(tab, tmp_path / "report.html") == []


async def test_a_real_fleets_report_and_comparison_are_drawn(
    tab: Tab, tmp_path: Path, shots: Callable[[str], Path]
) -> None:
    engine = choose_engine("pandas")
    plans = (Plan(seconds=60), Plan(seconds=60, throttle="GPU-1", aggressor="greedy", cascade="engine-1", scatter=True))
    before, after = (build_trace(fleet_rows(plan), engine) for plan in plans)
    report = make_report(after, fleet="simulated")
    await show(tab, tmp_path / "report.html", to_html(report, compare(before, after)))
    drawn = await tab.eval(DRAWN)
    assert "comparison" in drawn
    assert [key for key, marks in drawn.items() if not marks] == []
    assert await tab.eval("document.querySelectorAll('.finding').length") == len(report.findings) > 0
    await tab.screenshot(shots("report-simulated"))
    assert tab.faults == []


async def test_the_switch_goes_through_the_themes_and_repaints_charts(tab: Tab, tmp_path: Path) -> None:
    await tab.prefer(prefers_color_scheme="light")
    await show(tab, tmp_path / "report.html", to_html(made_report()))
    seen = [await tab.eval(PAINTS)]
    for name in ("light", "dark", "auto"):
        before = await tab.eval("document.body.dataset.drawn")
        await tab.eval("document.querySelector('#theme').click()")
        await tab.wait(f"document.body.dataset.drawn !== '{before}'", 60)
        assert await tab.text("#theme") == f"Theme: {name}"
        seen.append(await tab.eval(PAINTS))
    auto, light, dark, again = seen
    assert auto == light == again
    assert all(one != other for one, other in zip(light, dark, strict=True))


async def test_the_machines_own_theme_is_followed_while_it_is_open(tab: Tab, tmp_path: Path) -> None:
    await tab.prefer(prefers_color_scheme="light")
    await show(tab, tmp_path / "report.html", to_html(made_report()))
    before = await tab.eval(PAINTS)
    await tab.prefer(prefers_color_scheme="dark")
    await tab.wait("document.body.dataset.drawn === '2'", 60)
    assert before != await tab.eval(PAINTS)


async def test_a_findings_links_open_its_chart_and_its_trace(
    tab: Tab, tmp_path: Path, shots: Callable[[str], Path]
) -> None:
    await tab.prefer(prefers_reduced_motion="reduce")
    await show(tab, tmp_path / "report.html", to_html(made_report()))
    await tab.eval("document.querySelector('#finding-1 .links a').click()")
    await tab.wait(IN_VIEW.format("#chart-stragglers"))
    assert not await tab.eval("document.querySelector('#trace-2').checkVisibility()")
    await tab.eval("document.querySelectorAll('#finding-1 a.trace')[1].focus()")
    await tab.press("Enter")
    await tab.wait(IN_VIEW.format("#trace-2 .flame"))
    assert await tab.eval("document.activeElement.id") == "trace-2"
    spans = await tab.eval("[...document.querySelectorAll('#trace-2 .span')].map((e) => e.textContent.split(' ')[0])")
    assert spans == ["request", "route", "engine-3", "queue", "prefill", "decode"]
    await tab.screenshot(shots("report-trace"), whole=False)
    await tab.eval("document.querySelector('#trace-2').closest('details').open = false")
    await tab.eval("document.querySelectorAll('#finding-1 a.trace')[1].click()")
    await tab.wait(IN_VIEW.format("#trace-2 .flame"))
    await tab.eval("document.querySelector('#trace-2 .links a').click()")
    await tab.wait(IN_VIEW.format("#finding-1"))


async def test_a_link_to_a_trace_opens_it_with_the_page(tab: Tab, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text(to_html(made_report()), encoding="utf-8")
    await tab.goto(f"{path.as_uri()}#trace-3")
    await tab.wait("document.querySelector('#trace-3').checkVisibility()")
    assert await tab.eval("document.querySelectorAll('details[open]').length") == 1


@THEMES
async def test_a_phone_shows_it_without_moving_it_sideways(
    tab: Tab, tmp_path: Path, shots: Callable[[str], Path], scheme: str
) -> None:
    await tab.prefer(prefers_color_scheme=scheme)
    await show(tab, tmp_path / "report.html", to_html(made_report()), 390, 844, is_phone=True)
    assert await tab.eval(js.OVERFLOW) <= 0
    assert [key for key, marks in (await tab.eval(DRAWN)).items() if not marks] == []
    await tab.screenshot(shots(f"report-phone-{scheme}"))
    await tab.eval("document.querySelectorAll('details').forEach((each) => (each.open = true))")
    assert await tab.eval(js.OVERFLOW) <= 0


async def test_hostile_names_do_nothing(tab: Tab, tmp_path: Path) -> None:
    report = made_report(tenant=HOSTILE)
    await show(tab, tmp_path / "report.html", to_html(replace(report, fleet=HOSTILE, reason=HOSTILE)))
    assert await tab.eval("document.querySelectorAll('img, svg a, svg script').length") == 0
    assert [key for key, marks in (await tab.eval(DRAWN)).items() if not marks] == []
    names = await tab.eval("[...document.querySelectorAll('[data-chart=interference] text')].map((e) => e.textContent)")
    assert "<script>alert(1)</scrip…" in names
    assert (tab.dialogs, tab.faults) == ([], [])
    assert asked_elsewhere(tab, tmp_path / "report.html") == []


async def test_no_other_script_runs(tab: Tab, tmp_path: Path) -> None:
    text = to_html(made_report()).replace("</main>", "<script>document.title = 'owned'</script></main>")
    await show(tab, tmp_path / "report.html", text)
    assert "owned" not in await tab.eval("document.title")
    assert "Content Security Policy" in " ".join(tab.faults)


async def test_an_empty_window_says_why_there_is_no_chart(tab: Tab, tmp_path: Path) -> None:
    await show(tab, tmp_path / "report.html", to_html(empty_report()))
    assert await tab.eval("document.querySelectorAll('[data-chart]').length") == 0
    assert "No data: no GPU was sampled in this window." in await tab.text("#hardware")
    assert tab.faults == []


async def test_paper_has_all_charts_in_light(tab: Tab, tmp_path: Path, shots: Callable[[str], Path]) -> None:
    await tab.prefer(prefers_color_scheme="dark")
    await show(tab, tmp_path / "report.html", to_html(made_report()), 760, 1000)
    await tab.ask("Emulation.setEmulatedMedia", media="print")
    await tab.eval("dispatchEvent(new Event('beforeprint'))")
    await tab.wait("document.documentElement.dataset.theme === 'light'")
    assert await tab.eval("getComputedStyle(document.querySelector('nav')).display") == "none"
    assert await tab.eval(js.GROUND) == "rgb(255, 255, 255)"
    assert await tab.eval(js.OVERFLOW) <= 0
    await tab.screenshot(shots("report-paper"))
