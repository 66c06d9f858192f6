"""`lltm-ray demo`: the whole product once, on this machine, with no network: start, chat, load, report, drain."""

from __future__ import annotations

import asyncio
import json
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from lltm_ray import _optional
from lltm_ray.cli._output import ERR, OUT, errors_end_the_command, tell_if_demonstration
from lltm_ray.cli.bench import show
from lltm_ray.config import FleetConfig, GatewayConfig
from lltm_ray.driver import Cluster
from lltm_ray.errors import EngineError
from lltm_ray.load.result import LoadPlan
from lltm_ray.load.run import run_load
from lltm_ray.records import FleetStatus

LOAD_REQUESTS = 200
TALK = ("What is lltm_ray?", "How do I start a fleet?", "How do I stop it?")


@errors_end_the_command()
def demo(
    engines: Annotated[int, typer.Option(help="How many llama-servers.")] = 2,
    model: Annotated[str, typer.Option(help="tiny needs no network; any other as for `up`.")] = "tiny",
    report: Annotated[Path, typer.Option(help="Where the figures go.")] = Path("demo-report.json"),
    page: Annotated[Path, typer.Option("--html", help="Where the report goes.")] = Path("demo-report.html"),
) -> None:
    """Start a fleet, talk to it with the openai client, put it under load, write figures and report, drain."""
    openai = _optional.load("openai", extra="demo", feature="the demo's client")
    to_html = _optional.load("lltm_ray.analytics.html:to_html", extra="demo", feature="the demo's report")
    began = time.perf_counter()
    ERR.print(f"starting Ray and {engines} engines of {model} …")
    with Cluster.start(FleetConfig(model=model, engines=engines, gateway=GatewayConfig(port=0))) as cluster:
        start_s = time.perf_counter() - began
        status = cluster.status()
        OUT.print(f"ready in {start_s:.1f} s at {cluster.endpoint}/v1")
        tell_if_demonstration(model)
        client = openai.OpenAI(base_url=f"{cluster.endpoint}/v1", api_key="none", max_retries=0)
        chats = _talk(client, status.engines[0].model)
        client.close()
        load = _load(str(cluster.endpoint), status.engines[0].model)
        seen, found = cluster.status(), cluster.report()
    _check_gone(seen)
    figures = {"start_s": start_s, "engines": [engine.public() for engine in seen.engines], "chats": chats}
    report.write_text(json.dumps(figures | {"load": load}, indent=2), encoding="utf-8")
    page.write_text(to_html(found), encoding="utf-8")
    OUT.print("")
    OUT.print(_optional.load("lltm_ray.analytics.text:to_text", extra="demo")(found), markup=False)
    OUT.print(f"drained; no server is left. Figures: {report}, report: {page}")


def _talk(client: Any, model: str) -> list[dict[str, Any]]:
    """One conversation; every turn carries the ones before it."""
    messages: list[dict[str, str]] = []
    turns = []
    for question in TALK:
        OUT.print(f"\n> {question}")
        messages.append({"role": "user", "content": question})
        turns.append({"question": question} | _answer(client, model, messages))
        messages.append({"role": "assistant", "content": turns[-1]["text"]})
    return turns


def _answer(client: Any, model: str, messages: list[dict[str, str]]) -> dict[str, Any]:
    """One streamed answer, printed when it is whole, with the figures that the demo is about."""
    began, first, text = time.perf_counter(), 0.0, ""
    answer = client.chat.completions.with_raw_response.create(
        model=model, messages=messages, max_tokens=128, stream=True
    )
    events = 0
    with answer.parse() as stream:
        for event in stream:
            delta = event.choices[0].delta.content if event.choices else None
            if delta:
                first = first or time.perf_counter()
                events += 1
                text += delta
    OUT.print(text, markup=False, highlight=False)
    total_s, engine = time.perf_counter() - began, answer.headers.get("x-lltm-engine", "")
    ttft_ms = (first - began) * 1e3
    OUT.print(f"[dim]{events} tokens, first after {ttft_ms:.1f} ms, {events / total_s:.0f} tokens/s, by {engine}[/]")
    return {"text": text, "ttft_ms": ttft_ms, "total_s": total_s, "engine": engine}


def _load(url: str, model: str) -> dict[str, Any]:
    """A short closed-loop load, as `lltm-ray bench` makes it."""
    result = asyncio.run(run_load(LoadPlan(url=url, model=model, requests=LOAD_REQUESTS, concurrency=8)))
    OUT.print("")
    show(result)
    return asdict(result)


def _check_gone(seen: FleetStatus) -> None:
    left = [engine.server_pid for engine in seen.engines if engine.server_pid and _exists(engine.server_pid)]
    if left:
        raise EngineError(f"servers are still there after the drain: pids {left}")


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
