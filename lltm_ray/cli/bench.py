"""`lltm-ray bench`: load an endpoint and say what it did."""

from __future__ import annotations

import asyncio
import random
import signal
from dataclasses import asdict
from typing import Annotated, Any

import typer
import uvloop

from lltm_ray.cli._endpoint import NameOption, UrlOption, endpoint_of
from lltm_ray.cli._output import (
    ERR,
    OUT,
    JsonFlag,
    KeyFileOption,
    ProgressCallback,
    errors_end_the_command,
    print_json,
    print_table,
    progress_bar,
    read_key,
)
from lltm_ray.load.result import LoadPlan, LoadResult, Percentiles
from lltm_ray.load.run import run_load

_Requests = Annotated[
    int | None, typer.Option(min=1, help="Requests to send.", show_default="200, or without bound under --duration")
]
_Rate = Annotated[
    float | None,
    typer.Option(help="Open loop: mean arrivals per second (Poisson), whatever the server does.", show_default="off"),
]
_Duration = Annotated[float | None, typer.Option(help="Start no request after so many seconds.", show_default="off")]
_Seed = Annotated[
    int | None,
    typer.Option(
        help="Of prompts and arrivals. The same seed sends the same prompts.", show_default="a new one each run"
    ),
]
_Prompt = Annotated[
    int,
    typer.Option(min=1, help="Prompt length in tokens, chat template included; about, sized by two probe requests."),
]
_Timeout = Annotated[float, typer.Option(help="Longest time for one request, in seconds.")]
_Concurrency = Annotated[int, typer.Option(min=1, help="Closed loop: requests in flight. Not used with --rate.")]
_MaxTokens = Annotated[int, typer.Option(min=1, help="Most tokens to generate per request.")]
_Stream = Annotated[bool, typer.Option(help="Stream answers; only streams show TTFT and time per token.")]
_Model = Annotated[str, typer.Option(help="Served model name.", show_default="the first that /v1/models lists")]


@errors_end_the_command()
def bench(
    *,
    url: UrlOption = "",
    name: NameOption = "default",
    model: _Model = "",
    api_key_file: KeyFileOption = None,
    requests: _Requests = None,
    concurrency: Annotated[
        int, typer.Option(min=1, help="Closed loop: requests in flight. Not used with --rate.")
    ] = 16,
    rate: _Rate = None,
    prompt_tokens: _Prompt = 64,
    max_tokens: _MaxTokens = 64,
    stream: _Stream = True,
    seed: _Seed = None,
    duration: _Duration = None,
    timeout: _Timeout = 600.0,
    as_json: JsonFlag = False,
) -> None:
    """Send chat completions to an endpoint and show rates, TTFT, latency and errors.

    Prompts are rows of short English words; the first four spell the request's number, so no prefix cache helps.
    Ctrl-C ends the run and shows what was measured until then. Exit code 1: no request succeeded.
    """
    plan = LoadPlan(
        url=endpoint_of(url, name),
        model=model,
        api_key=read_key(api_key_file),
        requests=requests,
        concurrency=concurrency,
        rate=rate,
        duration_s=duration,
        prompt_tokens=prompt_tokens,
        max_tokens=max_tokens,
        stream=stream,
        seed=random.randrange(2**20) if seed is None else seed,  # noqa: S311 - a seed, not a secret
        timeout_s=timeout,
    )
    _measure(plan, as_json=as_json)


def _measure(plan: LoadPlan, *, as_json: bool) -> None:
    with progress_bar(unit="requests") as progress:
        result = uvloop.run(_run(plan, progress))
    (print_json if as_json else show)(result)
    if not result.ok:
        raise typer.Exit(1)


async def _run(plan: LoadPlan, progress: ProgressCallback) -> LoadResult:
    stop, loop = asyncio.Event(), asyncio.get_running_loop()

    def interrupted() -> None:
        loop.remove_signal_handler(signal.SIGINT)  # a second Ctrl-C ends the program
        stop.set()

    loop.add_signal_handler(signal.SIGINT, interrupted)
    try:
        return await run_load(plan, stop=stop, progress=progress)
    finally:
        loop.remove_signal_handler(signal.SIGINT)


def show(result: LoadResult) -> None:
    """Print a result for people."""
    if result.interrupted:
        ERR.print(f"[yellow]interrupted:[/] {result.cancelled} running requests were dropped")
    mean_in, mean_out = (count / max(1, result.ok) for count in (result.input_tokens, result.output_tokens))
    OUT.print(f"{result.model}: {result.mode}, seed {result.seed}, {result.wall_s:.2f} s", markup=False)
    OUT.print(f"{result.ok} ok, {result.requests - result.ok} failed, {result.retried} sent again")
    OUT.print(f"[bold]{result.requests_per_s:,.1f}[/] requests/s  [bold]{result.output_tokens_per_s:,.1f}[/] tokens/s")
    OUT.print(f"per request: {mean_in:,.1f} prompt tokens, {mean_out:,.1f} generated\n")
    rows = (
        ("TTFT", result.ttft_ms),
        ("latency", result.latency_ms),
        ("per token", result.per_token_ms),
        ("generator late by", result.lateness_ms),
    )
    title = "of successful requests only" if result.errors else None
    print_table(("ms", "p50", "p95", "p99"), [_row(name, measured) for name, measured in rows], title=title)
    if result.engines:
        print_table(("engine", "requests"), list(result.engines.items()), title="\nserved by")
    if result.errors:
        examples = [(kind, count, result.error_examples[kind]) for kind, count in result.errors.items()]
        print_table(("error", "requests", "first message"), examples, title="\nfailed")


def _row(name: str, measured: Percentiles | None) -> tuple[Any, ...]:
    return (name, *(asdict(measured).values() if measured else (None, None, None)))
