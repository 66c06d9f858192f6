"""Notebooks: ask a fleet in a cell, see its tokens, watch its panels, put a load on it. The one door to all of these.

```python
ChatWidget(cluster)                                # a chat to type into
stream_generate(cluster, "What is a slot?")        # an answer that grows in its cell
compare_temperatures(cluster, "Go on", (0, 0.5, 1))
view_tokens(cluster, "some text"), view_answer(cluster, "What is a slot?")
display_metrics(cluster)

load = generate_load(cluster, seconds=30, clients=8)
dashboard = Dashboard(cluster)
dashboard.show()
dashboard.run(30)
load.statistics()
```

Requests go through the gateway, as those of any client. The panels are alive where a kernel with anywidget shows them;
without it they are a figure of the last update. The extra `jupyter` brings it, and pandas for DataFrames.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from concurrent.futures import Future
from dataclasses import asdict
from typing import Any

import plotly.graph_objects as go
import requests

from lltm_ray._optional import load
from lltm_ray.errors import ConfigError, FleetError, MissingExtraError
from lltm_ray.integrations.notebook._panels import Panels
from lltm_ray.integrations.notebook._source import Answer
from lltm_ray.integrations.notebook.chat import Chat
from lltm_ray.integrations.notebook.chat_widget import ChatWidget
from lltm_ray.integrations.notebook.metrics_table import display_metrics
from lltm_ray.integrations.notebook.streaming import stream_generate
from lltm_ray.integrations.notebook.temperatures import Temperatures, compare_temperatures
from lltm_ray.integrations.notebook.token_view import Token, TokenView, view_answer, view_tokens
from lltm_ray.load.result import LoadPlan, LoadResult
from lltm_ray.load.run import run_load

__all__ = [
    "Answer",
    "Chat",
    "ChatWidget",
    "Dashboard",
    "Load",
    "Temperatures",
    "Token",
    "TokenView",
    "compare_temperatures",
    "display_metrics",
    "generate_load",
    "stream_generate",
    "view_answer",
    "view_tokens",
]
EVERY_S = 1.0
_ANSWER_S = 10.0
_PERCENTILES = ("latency_s", "ttft_s", "queue_s")


class Dashboard:
    """The fleet now: requests and tokens per second, latency, GPUs, slots, recent requests.

    Args:
        cluster_or_url: a `Cluster`, or the base URL of a fleet's gateway.
        api_key: of the gateway.

    Raises:
        FleetError: the fleet runs without telemetry, or does not answer; likewise from `update` and `run`.
    """

    def __init__(self, cluster_or_url: Any, *, api_key: str = "") -> None:
        is_url = isinstance(cluster_or_url, str)
        self._look = _Endpoint(cluster_or_url, api_key).look if is_url else cluster_or_url.telemetry.look
        self._panels = Panels(_figure_class())
        self._latest: dict[str, Any] = {}
        self.update()

    @property
    def figure(self) -> Any:
        """Plotly's figure; a `FigureWidget` where anywidget is there."""
        return self._panels.figure

    def show(self) -> None:
        """Display the panels in this cell; later updates appear there.

        Raises:
            MissingExtraError: IPython is not installed.
        """
        load("IPython.display:display", extra="jupyter", feature="panels in a notebook")(self.figure)

    def snapshot(self) -> Any:
        """A still copy of the panels, which stays in a saved notebook."""
        return go.Figure(self.figure)

    def update(self) -> None:
        """Look once and draw."""
        self._latest = self._look()
        self._panels.draw(self._latest)

    def run(self, seconds: float) -> None:
        """Update once a second for so long."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self.update()
            time.sleep(min(EVERY_S, left))
        self.update()

    def statistics(self) -> Any:
        """DataFrame of one line: the panels' figures as of the last update, the percentiles of the last minute.

        For more, by model or engine: `cluster.telemetry.summary`.

        Raises:
            MissingExtraError: pandas is not installed.
        """
        look = self._latest
        line = {**look["totals"], **look["rates"], "reuse_ratio": look["reuse_ratio"]}
        for what in _PERCENTILES:
            line |= {f"{what.removesuffix('_s')}_{name}_s": value for name, value in look[what].items()}
        return _frame(line)


class Load:
    """A load under way, in a thread of its own; `generate_load` starts it."""

    def __init__(self, plan: LoadPlan) -> None:
        self._plan = plan
        self._result: Future[LoadResult] = Future()
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._lock = threading.Lock()
        self._is_ending = False
        threading.Thread(target=self._run, name="lltm-ray-load", daemon=True).start()

    @property
    def is_running(self) -> bool:
        """Whether requests are still under way."""
        return not self._result.done()

    def wait(self, timeout_s: float | None = None) -> LoadResult:
        """What it measured, once it is over.

        Raises:
            LltmRayError: the server cannot be reached, or refuses such requests.
            TimeoutError: it takes longer.
        """
        return self._result.result(timeout_s)

    def stop(self) -> LoadResult:
        """End it now; requests under way are dropped."""
        with self._lock:
            if not self._is_ending:
                self._loop.call_soon_threadsafe(self._stop.set)
        return self.wait()

    def statistics(self) -> Any:
        """DataFrame of one line: what it measured, once it is over; times in milliseconds, from the client's side.

        Raises:
            LltmRayError: as `wait`.
            MissingExtraError: pandas is not installed.
        """
        line: dict[str, Any] = {}
        for name, value in asdict(self.wait()).items():
            if name.endswith("_ms"):
                what = name.removesuffix("_ms")
                line |= {f"{what}_{each}_ms": number for each, number in (value or {}).items()}
            elif not isinstance(value, dict | list | tuple):
                line[name] = value
        return _frame(line)

    def _run(self) -> None:
        try:
            self._result.set_result(self._loop.run_until_complete(run_load(self._plan, stop=self._stop)))
        except BaseException as error:  # noqa: BLE001 - whoever waits gets it
            self._result.set_exception(error)
        finally:
            with self._lock:
                self._is_ending = True
            self._loop.close()


def generate_load(cluster_or_url: Any, *, seconds: float = 30.0, clients: int = 4, **plan: Any) -> Load:
    """Start a load of chats and return at once: each client sends its next request when its last has ended.

    Args:
        cluster_or_url: a `Cluster` with a gateway, or a gateway's base URL.
        seconds: no request starts later; those that run are waited for.
        clients: requests in flight.
        plan: other fields of `load.result.LoadPlan`: `model`, `api_key`, `prompt_tokens`, `max_tokens`, ...

    Raises:
        ConfigError: a setting that cannot be used, or a fleet without a gateway.
    """
    url = cluster_or_url if isinstance(cluster_or_url, str) else cluster_or_url.endpoint
    if not url:
        raise ConfigError("cluster_or_url", cluster_or_url, "must be a fleet with a gateway, or a URL")
    return Load(LoadPlan(url=url, duration_s=seconds, concurrency=clients, **plan))


class _Endpoint:
    """A gateway's looks, each the first event of its page's stream."""

    def __init__(self, url: str, api_key: str) -> None:
        self._url = url.rstrip("/") + "/dashboard/events"
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}

    def look(self) -> dict[str, Any]:
        """As `Cluster.telemetry.look`."""
        try:
            with requests.Session() as session:
                session.trust_env = False  # a proxy of this machine must not come between us and a gateway of ours
                answer = session.get(self._url, headers=self._headers, stream=True, timeout=_ANSWER_S)
                if answer.status_code != 200:
                    raise FleetError(f"{self._url} answered {answer.status_code}: {answer.text[:300]}")
                return _first_look(answer, self._url)
        except requests.RequestException as error:
            raise FleetError(f"cannot reach {self._url}: {type(error).__name__}") from error


def _first_look(answer: requests.Response, url: str) -> dict[str, Any]:
    kind = b""
    for line in answer.iter_lines():
        if line.startswith(b"event:"):
            kind = line[6:].strip()
        elif line.startswith(b"data:"):
            told = json.loads(line[5:])
            if kind == b"look" and isinstance(told, dict):
                return told
            raise FleetError(f"{url}: {told}")
    raise FleetError(f"{url} ended without a look")


def _figure_class() -> Any:
    try:
        load("anywidget", extra="jupyter", feature="live panels")
    except MissingExtraError:
        return go.Figure
    return go.FigureWidget


def _frame(line: dict[str, Any]) -> Any:
    return load("pandas", extra="pandas", feature="statistics as DataFrames").DataFrame([line])
