"""A driver's view of its fleet: `FleetTelemetry` asks the fleet's telemetry, `WatchedCalls` tells of its own calls."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

import ray

from lltm_ray._optional import load
from lltm_ray._watch import Watch, watch
from lltm_ray.actors.analytics import find_analytics, make_analytics, wait_for_analytics
from lltm_ray.actors.calls import ROUTES, Calls, Messages
from lltm_ray.actors.crew import cause_of
from lltm_ray.actors.engine import OWN
from lltm_ray.actors.fleet import Fleet
from lltm_ray.errors import FleetError
from lltm_ray.llamacpp.options import TIMEOUT, check_value, settle
from lltm_ray.records import StreamEvent

if TYPE_CHECKING:  # who asks nothing of telemetry does without pyarrow
    import pyarrow as pa

    from lltm_ray.analytics.compare import Comparison
    from lltm_ray.analytics.report import Report
    from lltm_ray.telemetry.store import Page

_ANSWER_S = 30.0
_REPORT_S = 300.0
"""Ten million spans on a CPU take minutes."""
_PAGE_ROWS = 50_000
_FIELDS = {"chat": "messages", "complete": "prompt", "embed": "input", "rerank": "query"}


class FleetTelemetry:
    """`Cluster.telemetry`. Figures lag by a sender's pause, a quarter of a second.

    Every method raises `FleetError` where the fleet runs without telemetry, or telemetry does not answer.

    Args:
        fleet: whose.
    """

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    def look(self) -> dict[str, Any]:
        """The fleet now: what `/dashboard` shows, as `telemetry.live.Live.look` has it."""
        found: dict[str, Any] = self._ask("look")
        return found

    def requests(self, limit: int = 100) -> Any:
        """DataFrame of the newest requests that ended, the newest first; up to 100 are kept for this.

        Raises:
            MissingExtraError: pandas is not installed.
        """
        return load("pandas", extra="pandas", feature="requests as DataFrames").DataFrame(self.look()["recent"][:limit])

    def timeline(self, request_id: str) -> dict[str, Any] | None:
        """A request's row, joules and spans; `telemetry.timeline_frame(found["spans"])` makes a table of them.

        None: its rows are not kept any more, or were not found within 3 s.
        """
        found: dict[str, Any] | None = self._ask("timeline", request_id)
        return found

    def metrics(self, *, is_open: bool = False) -> str:
        """All metrics as Prometheus' text, or as OpenMetrics' with exemplars."""
        text: bytes = self._ask("metrics", is_open=is_open)
        return text.decode()

    def read_since(
        self,
        cursor: int = 0,
        kinds: Sequence[str] | None = None,
        limit: int = 10_000,
        columns: Mapping[str, Collection[str]] | None = None,
    ) -> Page:
        """Rows that came at or after a cursor, as Arrow tables by kind; `Page.cursor` is where to go on.

        `columns`: kind -> those that are wanted of it; None: all.
        """
        page: Page = self._ask("read_since", cursor, kinds, limit, columns)
        return page

    def summary(self, by: Sequence[str] = ("model",), *, window_s: float | None = None) -> Any:
        """DataFrame of requests, errors, rates, tokens and percentiles; as `telemetry.summarize`.

        Args:
            by: any of model, engine, route, tenant, slot, minute.
            window_s: so many seconds until now; None: all that is kept.

        Raises:
            ConfigError: nothing to group by has such a name.
            MissingExtraError: pandas is not installed.
        """
        from lltm_ray.telemetry.summary import summarize

        until_unix_s = None if window_s is None else time.time()
        return summarize(self.tables("requests", "attempts"), by=by, window_s=window_s, until_unix_s=until_unix_s)

    def tables(self, *kinds: str, columns: Mapping[str, Collection[str]] | None = None) -> dict[str, pa.Table]:
        """All rows of these kinds that are in memory, in the order they came; `columns` as in `read_since`."""
        import pyarrow as pa

        pages = [self.read_since(0, kinds, _PAGE_ROWS, columns)]
        while any(table.num_rows for table in pages[-1].tables.values()):
            pages.append(self.read_since(pages[-1].cursor, kinds, _PAGE_ROWS, columns))
        return {kind: pa.concat_tables([page.tables[kind] for page in pages]) for kind in kinds}

    def _ask(self, method: str, *args: Any, **options: Any) -> Any:
        name, actor = self._fleet.config.name, self._fleet.telemetry
        if actor is None:
            raise FleetError(f"telemetry of fleet {name!r} is off: start it with telemetry.enabled = true")
        try:
            return ray.get(getattr(actor, method).remote(*args, **options), timeout=_ANSWER_S)
        except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError) as error:
            raise FleetError(f"telemetry of fleet {name!r} does not answer: {type(error).__name__}") from None


class FleetAnalytics:
    """`Cluster.report` and `Cluster.compare`: asks the fleet's analytics, which is made where there is none.

    Args:
        fleet: whose.
    """

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    def report(self, window_s: float | None, until_unix_s: float | None) -> Report:
        """As `Cluster.report`."""
        found: Report = self._ask("report", window_s, until_unix_s)
        return found

    def compare(self, before: tuple[float, float], after: tuple[float, float]) -> Comparison:
        """As `Cluster.compare`."""
        found: Comparison = self._ask("compare", before, after)
        return found

    def _ask(self, method: str, *args: Any) -> Any:
        fleet = self._fleet
        name = fleet.config.name
        if fleet.telemetry is None:
            raise FleetError(f"telemetry of fleet {name!r} is off: start it with telemetry.enabled = true")
        try:
            return self._call(method, *args)
        except ray.exceptions.RayActorError:  # it has ended, for one with the driver that had made it
            self._let_go()
        try:
            return self._call(method, *args)
        except ray.exceptions.RayActorError as error:
            raise FleetError(f"analytics of fleet {name!r} does not answer: {type(error).__name__}") from None

    def _call(self, method: str, *args: Any) -> Any:
        try:
            return ray.get(getattr(self._reach(), method).remote(*args), timeout=_REPORT_S)
        except ray.exceptions.RayTaskError as error:
            raise cause_of(error) from None
        except ray.exceptions.GetTimeoutError:
            why = f"analytics of fleet {self._fleet.config.name!r} has not answered within {_REPORT_S:g} s"
            raise FleetError(f"{why} and is still at work; ask later, or for a shorter window") from None

    def _reach(self) -> Any:
        """The running one, or one that is made now; after an error there is none that was made here."""
        fleet = self._fleet
        if fleet.analytics is None:
            found = find_analytics(fleet.config.name)
            handle = found or make_analytics(fleet.config, detached=False, is_shared=True)
            try:
                wait_for_analytics(handle, fleet.config.analytics)
            except BaseException:
                if found is None:
                    ray.kill(handle)  # it would go on waiting for a GPU
                raise
            fleet.analytics = handle
        return fleet.analytics

    def _let_go(self) -> None:
        """Forget an actor that is gone; of one that Ray restarts our handle stays, with which it would end."""
        mine, found = self._fleet.analytics, find_analytics(self._fleet.config.name)
        if mine != found:
            self._fleet.analytics = found


class WatchedCalls(Calls):
    """Calls that `telemetry.instrument()` can watch; the caller's trace goes along to the engine."""

    async def call(self, method: str, *args: Any, timeout_s: float, **params: Any) -> Any:
        """As `Calls.call`; of one that is refused before it is sent nobody is told."""
        check_value(TIMEOUT, timeout_s)
        params = settle(ROUTES[method], params, own=OWN)
        with watch("", ROUTES[method], _body(method, args, params)) as seen:
            answer = await super().call(method, *args, timeout_s=timeout_s, **params, **_carrier(seen))
            seen.answer(answer)
            return answer

    async def stream(self, messages: Messages, *, timeout_s: float, **params: Any) -> AsyncIterator[StreamEvent]:
        """As `Calls.stream`, watched as `call` is."""
        check_value(TIMEOUT, timeout_s)
        params = settle(ROUTES["chat"], params, own=OWN)
        with watch("", ROUTES["chat"], _body("chat", (messages,), params), is_stream=True) as seen:
            source: Any = super().stream(messages, timeout_s=timeout_s, **params, **_carrier(seen))
            async with aclosing(source) as events:
                async for event in events:
                    seen.event(event)
                    yield event


def _body(method: str, args: tuple[Any, ...], params: dict[str, Any]) -> dict[str, Any]:
    return {**params, _FIELDS[method]: args[0]}


def _carrier(seen: Watch) -> dict[str, Any]:
    return {"carrier": dict(seen.headers)} if seen.headers else {}
