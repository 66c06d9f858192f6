"""The live page in a real browser: what it shows is what telemetry says, and everybody can use it."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from prometheus_client.parser import text_string_to_metric_families as parse

from tests.browser import in_page as js
from tests.browser.cdp import Tab
from tests.browser.page_host import FleetHost, Host

pytestmark = pytest.mark.browser

HOSTILE = '<img src=x onerror="alert(1)">&lt;b&gt;"\'</td><script>alert(2)</script>%41/?#'
SCHEMES = pytest.mark.parametrize("scheme", ["light", "dark"])


async def visit(tab: Tab, host: FleetHost, width: int = 1280, height: int = 900, *, is_phone: bool = False) -> None:
    await tab.resize(width, height, is_phone=is_phone)
    await tab.goto(f"{host.url}/dashboard")
    await tab.wait("document.body.dataset.look && document.querySelector('#chart .main-svg')")


async def open_first(tab: Tab) -> None:
    await tab.eval(js.OPEN_ROW)
    await tab.wait(js.IS_OPEN)


async def shown(tab: Tab, host: FleetHost) -> tuple[dict[str, str], dict[str, Any]]:
    """The page's figures, and the look that they are of."""
    at, figures = json.loads(await tab.eval(f"JSON.stringify([Number(document.body.dataset.look), {js.FIGURES}])"))
    return figures, host.fleet.looks[float(at)]


def number(text: str) -> float:
    """A figure without its unit, in the unit it is shown in."""
    return float(text.replace(",", "").split()[0])


def seconds(text: str) -> float:
    return number(text) * {"ms": 0.001, "s": 1.0}[text.split()[1]]


# --- figures


async def test_what_is_shown_equals_what_telemetry_says(tab: Tab, host: FleetHost) -> None:
    host.fleet.run(20, per_s=9, errors=0.1)
    await visit(tab, host)
    figures, look = await shown(tab, host)
    for name in ("requests", "errors", "rejected", "failovers", "input_tokens", "cached_tokens", "output_tokens"):
        assert number(figures[f"totals.{name}"]) == look["totals"][name]
    for name in ("requests_s", "errors_s", "input_tokens_s", "cached_tokens_s", "output_tokens_s"):
        assert number(figures[f"rates.{name}"]) == pytest.approx(look["rates"][name], rel=0.01)
    for of in ("latency_s", "ttft_s", "queue_s"):
        for quantile, value in look[of].items():
            assert seconds(figures[f"{of}.{quantile}"]) == pytest.approx(value, rel=0.02, abs=6e-5)
    assert number(figures["reuse_ratio"]) == pytest.approx(100 * look["reuse_ratio"], abs=0.06)
    assert await tab.eval(js.ERRORS) == look["errors"]
    assert number(figures["error_count"]) == sum(look["errors"].values()) > 0


@pytest.mark.parametrize(
    ("unit", "texts"),
    [
        ("seconds", {0.00994: "9.9 ms", 0.00996: "10 ms", 0.9994: "999 ms", 0.9996: "1.00 s", 9.994: "9.99 s"}),
        ("seconds", {9.996: "10.0 s", 99.96: "100 s", 119.4: "119 s", 119.6: "2 min 0 s", 659.4: "10 min 59 s"}),
        ("seconds", {659.6: "11 min 0 s", 719.7: "12 min 0 s", 3599.5: "60 min 0 s"}),
        ("percent", {0: "0 %", 0.99949: "99.9 %", 0.9995: "100 %", 1: "100 %"}),
        ("joules", {0.0994: "99.4 mJ", 0.0996: "0.10 J", 9999.4: "9,999 J", 9999.6: "10.0 kJ"}),
        ("bytes", {2**29 - 1: "512 MiB", 2**29: "0.50 GiB"}),
        ("rate", {9.996: "10.0", 99.96: "100", 0: "0"}),
    ],
)
async def test_a_figure_is_rounded_before_its_unit_is_chosen(
    tab: Tab, bare_host: Host, unit: str, texts: dict[float, str]
) -> None:
    await tab.goto(f"{bare_host.url}/dashboard")
    script = f"import('/dashboard/units.js').then((units) => {json.dumps(list(texts))}.map(units.{unit}))"
    assert await tab.eval(script) == list(texts.values())


async def test_totals_equal_those_of_the_prometheus_endpoint_within_one_tick(tab: Tab, host: FleetHost) -> None:
    await visit(tab, host)
    host.fleet.run(5, per_s=12, errors=0)
    await tab.wait("document.querySelectorAll('#recent tr').length > 20", 2)
    figures, _ = await shown(tab, host)
    families = {each.name: each for each in parse((await host.fleet.metrics(is_open=False)).decode())}
    requests = families["gen_ai_server_request_duration_seconds"].samples
    tokens = families["gen_ai_client_token_usage"].samples

    def used(kind: str) -> float:
        of_kind = [each for each in tokens if each.labels.get("gen_ai_token_type") == kind]
        return sum(each.value for each in of_kind if each.name.endswith("_sum"))

    assert number(figures["totals.requests"]) == sum(each.value for each in requests if each.name.endswith("_count"))
    assert number(figures["totals.input_tokens"]) == used("input") > 0
    assert number(figures["totals.output_tokens"]) == used("output") > 0


async def test_an_update_arrives_within_two_seconds_and_nothing_jumps(tab: Tab, host: FleetHost) -> None:
    host.fleet.run(5, per_s=3)
    await visit(tab, host)
    await tab.wait("document.querySelector('.engine .slot') && document.querySelector('.gpu')")
    before = await tab.eval(js.PLACES)
    host.fleet.busy = 0.9
    id_ = host.fleet.serve()
    began = time.monotonic()
    await tab.wait(f"document.querySelector('#recent tr').requestId === '{id_}'", 5)
    assert time.monotonic() - began < 2.0
    await asyncio.sleep(1.5)
    assert await tab.eval(js.PLACES) == before


async def test_under_load_nothing_fails_and_nothing_outside_is_asked(tab: Tab, host: FleetHost) -> None:
    await visit(tab, host)
    host.fleet.busy = 0.9
    for _ in range(4):
        host.fleet.run(1, per_s=30, errors=0.05)
        await asyncio.sleep(1)
    assert await tab.eval(js.ROWS) == 100
    assert tab.faults == []
    asked = {urlsplit(each).netloc for each in tab.requested if not each.startswith("data:")}
    assert asked == {urlsplit(host.url).netloc}


async def test_a_machine_without_gpus_says_why(tab: Tab, host: FleetHost) -> None:
    await visit(tab, host)
    await tab.wait("document.querySelector('.gpu')")
    host.fleet.lose_gpus()
    await tab.wait("!document.querySelector('.gpu')")
    assert "no NVIDIA driver is loaded" in await tab.text(".machine .note")


async def test_names_made_by_clients_are_not_interpreted(tab: Tab, host: FleetHost) -> None:
    hostile: dict[str, Any] = dict.fromkeys(
        ("request_id", "model", "why", "error_type", "error", "tenant", "finish_reasons"), HOSTILE
    )
    assert host.fleet.serve(**hostile) == HOSTILE
    await visit(tab, host)
    cells = await tab.eval("[...document.querySelector('#recent tr').cells].map((e) => e.textContent)")
    assert cells.count(HOSTILE) == 3
    assert HOSTILE in await tab.eval(js.ERRORS)
    await open_first(tab)
    await tab.eval("document.querySelector('#timeline .span').focus()")
    assert await tab.text("#timeline-head") == HOSTILE
    assert HOSTILE in await tab.text("#tip")
    assert await tab.eval("document.querySelectorAll('body img, body script').length") == 0
    assert (tab.dialogs, tab.faults) == ([], [])


# --- one request


async def test_a_row_opens_its_timeline_by_keyboard_and_gives_the_focus_back(tab: Tab, host: FleetHost) -> None:
    host.fleet.serve()
    wanted = host.fleet.fail_over()
    host.fleet.serve()
    await visit(tab, host)
    await tab.eval("document.querySelector('#filter').focus()")
    await tab.press("Tab")
    if not await tab.eval(js.FOCUSED_ROW):  # Chromium stops at what scrolls, too
        await tab.press("Tab")
    await tab.press("ArrowDown")
    assert await tab.eval(js.FOCUSED_ROW) == wanted
    await tab.press("Enter")
    await tab.wait(f"{js.IS_OPEN} === 11")
    assert await tab.text("#timeline-head") == wanted
    first, *others = await tab.eval(js.SPAN_LABELS)
    assert first == "chat qwen3-8b"
    assert sorted(others) == sorted(["engine-1", "engine-2", *("route", "queue", "prefill", "decode") * 2])
    assert "prompt tokens cached" in await tab.text("#timeline .why")
    await tab.eval("document.querySelector('#timeline .span.prefill').focus()")
    assert "lltm.tokens.cached" in await tab.text("#tip")
    await tab.press("Escape")
    assert not await tab.eval("document.querySelector('#timeline').open")
    assert await tab.eval(js.FOCUSED_ROW) == wanted


async def test_bars_lie_where_their_spans_are_below_their_parents(tab: Tab, host: FleetHost) -> None:
    id_ = host.fleet.fail_over()
    await visit(tab, host)
    await open_first(tab)
    spans = (await host.fleet.timeline(id_) or {})["spans"]
    total_s = max(span["end_s"] for span in spans)
    level = {"server": 0, "client": 26, "internal": 52}
    expected = [
        (100 * each["start_s"] / total_s, 100 * (each["end_s"] - each["start_s"]) / total_s,
         26 if each["name"] == "route" else level[each["kind"]])
        for each in spans
    ]  # fmt: skip
    boxes = await tab.eval(js.SPAN_BOXES)
    assert len(boxes) == len(expected)
    for found, wanted in zip(sorted(boxes), sorted(expected), strict=True):
        assert found == pytest.approx(wanted, abs=0.01)


async def test_a_request_that_is_not_known_any_more_says_so(tab: Tab, host: FleetHost) -> None:
    host.fleet.serve()
    await visit(tab, host)
    await tab.eval(
        "document.querySelector('#recent tr').requestId = 'gone'; document.querySelector('#recent tr').focus()"
    )
    await tab.press("Enter")
    await tab.wait("document.querySelector('#timeline .problem')")
    assert "is known to telemetry" in await tab.text("#timeline .problem")


async def test_a_table_that_is_read_stands_still(tab: Tab, host: FleetHost) -> None:
    first = host.fleet.serve()
    await visit(tab, host)
    await tab.eval(js.FOCUS_ROW)
    host.fleet.serve()
    await tab.wait("document.querySelector('#held').textContent.includes('1 newer')", 5)
    assert await tab.eval(f"[{js.ROWS}, {js.FOCUSED_ROW}]") == [1, first]
    await tab.press("Escape")
    await tab.wait(f"{js.ROWS} === 2", 5)
    assert await tab.text("#held") == ""


async def test_rows_are_found_by_word_and_by_error(tab: Tab, host: FleetHost) -> None:
    host.fleet.serve()
    failed = host.fleet.fail()
    await visit(tab, host)
    await tab.eval("document.querySelector('#errors-only').click()")
    assert await tab.eval("[...document.querySelectorAll('#recent tr')].map((e) => e.requestId)") == [failed]
    await tab.eval("document.querySelector('#filter').focus()")
    await tab.type("nothing is like this")
    assert await tab.eval(js.ROWS) == 0
    assert await tab.text("#no-requests") == "No recent request is like that."


# --- states


async def test_a_key_is_asked_for_and_never_in_an_address(tab: Tab, host: FleetHost) -> None:
    host.lock("s3cret")
    host.fleet.serve()
    await tab.goto(f"{host.url}/dashboard")
    await tab.wait("!document.querySelector('#key-form').hidden && document.activeElement.id === 'key'")
    await tab.type("wrong")
    await tab.press("Enter")
    await tab.wait("document.querySelector('#key-note').textContent.includes('refused')")
    await tab.type("s3cret")
    await tab.press("Enter")
    await tab.wait("document.querySelector('#key-form').hidden && document.querySelector('#recent tr')")
    await open_first(tab)
    assert not [each for each in tab.requested if "s3cret" in each]
    assert await tab.eval("Object.values(sessionStorage)") == ["s3cret"]
    assert "s3cret" not in await tab.eval("JSON.stringify(localStorage) + document.cookie")


async def test_telemetry_that_is_away_and_old_figures_are_told(tab: Tab, host: FleetHost) -> None:
    host.fleet.serve()
    await visit(tab, host)
    assert await tab.eval(js.STATE) == "live"
    host.fleet.away = "telemetry does not answer: ActorDiedError"
    await tab.wait(f"{js.STATE} === 'away'", 5)
    await tab.wait("/figures are [2-9] s old/.test(document.querySelector('#age').textContent)", 10)
    assert "ActorDiedError" in await tab.text("#state-text")
    assert number((await shown(tab, host))[0]["totals.requests"]) == 1
    host.fleet.away = ""
    await tab.wait(f"{js.STATE} === 'live'", 5)
    assert await tab.text("#age") == ""


async def test_a_lost_connection_is_told_and_taken_up_again(tab: Tab, host: FleetHost) -> None:
    await visit(tab, host)
    host.end_streams()
    await tab.wait("document.querySelector('#said').textContent.includes('connection')", 5)
    host.fleet.serve()
    await tab.wait(f"{js.STATE} === 'live' && document.querySelector('#recent tr')", 10)
    assert tab.faults == []


async def test_a_fleet_without_telemetry_says_so(tab: Tab, bare_host: Host) -> None:
    await tab.goto(f"{bare_host.url}/dashboard")
    await tab.wait(f"{js.STATE} === 'off'")
    assert "telemetry.enabled" in await tab.text("#state-text")


# --- everybody's screen


@pytest.mark.parametrize("width", [360, 768, 1280, 1920])
async def test_nothing_overflows_the_page(tab: Tab, host: FleetHost, width: int) -> None:
    host.fleet.run(10, per_s=5, errors=0.2)
    host.fleet.serve(request_id="x" * 200, model="m" * 200, why="w" * 300, error_type="e" * 100)
    await visit(tab, host, width, 800, is_phone=width < 700)
    await tab.wait("document.querySelector('.engine .slot') && document.querySelector('.gpu')")
    assert await tab.eval(js.OVERFLOW) == 0
    await open_first(tab)
    assert await tab.eval(js.DIALOG_OVERFLOW) == 0
    assert await tab.eval(js.OVERFLOW) == 0


async def test_the_theme_follows_the_system_until_it_is_chosen(tab: Tab, host: FleetHost) -> None:
    await tab.prefer(prefers_color_scheme="dark")
    await visit(tab, host)
    dark = await tab.eval(js.GROUND)
    await tab.prefer(prefers_color_scheme="light")
    assert await tab.eval(js.GROUND) != dark
    for _ in range(2):
        await tab.eval("document.querySelector('#theme').click()")
    assert await tab.eval(js.GROUND) == dark
    await tab.goto(f"{host.url}/dashboard?again")
    await tab.wait("document.body.dataset.look")
    assert await tab.eval(js.GROUND) == dark


@SCHEMES
async def test_text_has_contrast_aa_everywhere(tab: Tab, host: FleetHost, scheme: str) -> None:
    host.fleet.run(10, per_s=6, errors=0.3)
    host.fleet.busy = 0.9
    host.fleet.fail_over()
    await tab.prefer(prefers_color_scheme=scheme)
    await visit(tab, host)
    await tab.wait("document.querySelector('.slot.is-busy') && document.querySelector('.throttle.is-bad')")
    assert await tab.eval(js.CONTRAST) == []
    await open_first(tab)
    await tab.eval("document.querySelector('#timeline .span').focus()")
    assert await tab.eval(js.CONTRAST) == []


@SCHEMES
async def test_it_is_photographed(tab: Tab, host: FleetHost, shots: Callable[[str], Path], scheme: str) -> None:
    await tab.prefer(prefers_color_scheme=scheme)
    await visit(tab, host)
    await tab.wait("document.querySelector('.gpu')")
    await tab.screenshot(shots(f"{scheme}-idle"))
    host.fleet.run(300, per_s=6, errors=0.03)
    host.fleet.busy = 0.85
    await asyncio.sleep(4)
    host.fleet.run(3, per_s=6)
    chosen = host.fleet.fail_over()
    await tab.wait(f"document.querySelector('#recent tr')?.requestId === '{chosen}'")
    await tab.screenshot(shots(f"{scheme}-load"))
    await open_first(tab)
    await tab.eval("document.querySelectorAll('#timeline .span')[2].focus()")
    await tab.screenshot(shots(f"{scheme}-timeline"), whole=False)
    await tab.resize(390, 844, is_phone=True)
    await tab.eval("document.activeElement.blur()")
    await tab.screenshot(shots(f"{scheme}-phone-timeline"), whole=False)
    await tab.eval("document.querySelector('#timeline').close(); document.activeElement.blur(); scrollTo(0, 0)")
    await asyncio.sleep(1)
    await tab.screenshot(shots(f"{scheme}-phone"))
    host.fleet.away = "telemetry does not answer: ActorDiedError"
    await tab.resize(1280, 900)
    await tab.wait("document.querySelector('#age').textContent")
    await tab.screenshot(shots(f"{scheme}-away"), whole=False)
    assert tab.faults == []
