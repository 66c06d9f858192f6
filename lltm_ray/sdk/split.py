"""`split_gpu`: engines on some GPUs of a node, analytics and your own GPU code on another one; processes of their own.

```python
with split_gpu("qwen3-8b-q4_k_m", llm=0, analytics=1) as session:
    print(session)  # which GPUs it became
    session.cluster.chat([{"role": "user", "content": "hi"}])
    table = session.run(lambda: cudf.read_parquet("rows.parquet").groupby("model").mean().to_pandas())
    print(session.report().findings)
```

Each actor sees its own devices only, by the CUDA_VISIBLE_DEVICES that Ray sets in its process; this one's environment
is not touched.

The indices hold on a cluster of one node, where `actors.seats` keeps the others out of Ray's reach meanwhile. On
several nodes an engine may go to another node; it never shares a GPU with analytics. `session.seats` is what the
actors themselves see.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

from lltm_ray.actors.analytics import make_analytics, wait_for_analytics
from lltm_ray.actors.seats import Holds, Seat, call_guest, end_actor, leave_ray, make_guest, roomiest_node, seats_of
from lltm_ray.config import FleetConfig, build, merge
from lltm_ray.driver import Cluster, join_ray
from lltm_ray.errors import ConfigError, FleetError, PlacementError

if TYPE_CHECKING:
    from lltm_ray.analytics.report import Report

T = TypeVar("T")


class SplitSession:
    """What `split_gpu` started; a context manager, or `close` it."""

    def __init__(self, cluster: Cluster, guest: Any, analytics: Any, how: str, undo: ExitStack) -> None:
        self.cluster = cluster
        """The fleet."""
        self.how = how
        """In one sentence, what became of the GPUs that were asked for."""
        self.seats: dict[str, tuple[Seat, ...]] = {
            "llm": seats_of(cluster.engines),
            "analytics": seats_of([analytics] if analytics is not None else []),
            "run": seats_of([guest]),
        }
        """Of the engines, of the fleet's analytics (none where it runs without telemetry), of your functions."""
        self._guest: Any = guest
        self._undo = undo.pop_all()

    def run(self, work: Callable[..., T], *args: Any, timeout_s: float | None = None, **options: Any) -> T:
        """Call a function on the analytics GPU and return what it returns; one call after another.

        Args:
            work: pickled with what it refers to; it should import GPU libraries inside.
            args: its arguments.
            timeout_s: None: as long as it takes.
            options: its named arguments.

        Raises:
            Exception: what the function raised.
            DeadlineError: not done within `timeout_s`; it is still at work.
            FleetError: it ended its process, and the next call finds a new one; or the session is closed.
        """
        if self._guest is None:
            raise FleetError("this session is closed: split_gpu again")
        done: T = call_guest(self._guest, work, args, options, timeout_s)
        return done

    def report(self, window_s: float | None = None) -> Report:
        """As `Cluster.report`, made on the analytics GPU."""
        return self.cluster.report(window_s)

    def close(self) -> None:
        """End your functions and analytics, drain and end the fleet; a second call does nothing."""
        self._guest = None
        self._undo.close()

    def __str__(self) -> str:
        told = {role: ", ".join(map(str, seats)) for role, seats in self.seats.items() if seats}
        return "; ".join([self.how, *(f"{role}: {where}" for role, where in told.items())])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@dataclass(frozen=True, slots=True)
class _Order:
    """What was asked for."""

    llm: tuple[int, ...]
    analytics: int
    share: float
    strict: bool


def split_gpu(
    model: str = "tiny",
    *,
    llm: int | Sequence[int] = 0,
    analytics: int = 1,
    strict: bool = False,
    address: str | None = None,
    **settings: Any,
) -> SplitSession:
    """Start a fleet on some GPUs, and analytics with a place for your own code on another one.

    With fewer GPUs than that, analytics and your code run on the CPU, with no GPU visible to your code; with none, all
    does. The session's `how` says so.

    Args:
        model: as `FleetConfig.model`.
        llm: index of the engines' GPU, or several: one engine over all of them, unless `engines` divides them.
        analytics: index of the other one. The fleet's analytics has half of it, your functions the rest.
        strict: refuse instead of doing with less.
        address: Ray cluster, as `Cluster.start` takes it.
        settings: other fields of `FleetConfig`. `analytics_share`, between 0 and 1: the analytics' part of its GPU.

    Raises:
        ConfigError: one GPU for both, or an index that the node does not have free.
        PlacementError: `strict`, and there are not enough free GPUs on one node; or somebody else took one meanwhile.
        LltmRayError: see `Cluster.start`. Whatever was started is ended again.
    """
    order = _check(llm, analytics, settings.pop("analytics_share", 0.5), strict)
    own = {"model": model, "analytics": {"gpu_share": order.share}}
    config: FleetConfig = build(FleetConfig, merge(own, settings))
    with ExitStack() as undo:
        if join_ray(address):
            undo.callback(leave_ray)
        return _start(order, config, undo)


def _check(llm: int | Sequence[int], analytics: int, share: float, strict: bool) -> _Order:
    indices = (llm,) if isinstance(llm, int) else tuple(llm)
    if not indices or len(set(indices)) < len(indices):
        raise ConfigError("llm", llm, "must be one index, or several different ones")
    if analytics in indices:
        raise ConfigError("analytics", analytics, "must be another GPU than those of the engines")
    if not 0 < share < 1:
        raise ConfigError("analytics_share", share, "must be between 0 and 1")
    return _Order(indices, analytics, share, strict)


def _start(order: _Order, config: FleetConfig, undo: ExitStack) -> SplitSession:
    need = len(order.llm) + 1
    node_id, free = roomiest_node(need)
    if free < need and order.strict:
        raise PlacementError(f"{need} whole GPUs of one node (split_gpu)", f"{free} of them")
    if free < need:
        config, how = _reduced(config, free, len(order.llm))
        return _seat(config, undo, make_guest(node_id, 0.0), how)
    with Holds(node_id, free) as holds:  # until all have their seats
        for index in order.llm:
            holds.check("llm", index)
        holds.check("analytics", order.analytics)
        holds.let_go(*order.llm)
        cluster = _start_engines(_shared(config, len(order.llm)), undo)
        holds.let_go(order.analytics)
        guest = make_guest(node_id, 1 - order.share)
        return _seat(config, undo, guest, "engines and analytics on GPUs of their own", cluster)


def _seat(config: FleetConfig, undo: ExitStack, guest: Any, how: str, cluster: Cluster | None = None) -> SplitSession:
    undo.callback(end_actor, guest)
    cluster = cluster or _start_engines(config, undo)
    return SplitSession(cluster, guest, _make_analytics(config, undo), how, undo)


def _start_engines(config: FleetConfig, undo: ExitStack) -> Cluster:
    cluster = Cluster.start(config)
    undo.callback(cluster.stop)
    return cluster


def _shared(config: FleetConfig, gpus: int) -> FleetConfig:
    return replace(config, gpu_share=gpus / config.engines)


def _reduced(config: FleetConfig, free: int, wanted: int) -> tuple[FleetConfig, str]:
    """With what there is, and a sentence that says it."""
    config = replace(config, analytics=replace(config.analytics, gpu_share=0.0, engine="auto"))
    rest = "analytics and your functions on the CPU"
    if not free:
        return replace(config, gpu_share=0.0), f"no GPU is free: engines, {rest}"
    gpus = min(free, wanted)
    why = f"no node has more than {free} GPU{'s' if free > 1 else ''} free"
    return _shared(config, gpus), f"{why}: engines on {gpus} of them, {rest}"


def _make_analytics(config: FleetConfig, undo: ExitStack) -> Any:
    """The fleet's, which follows telemetry from now on; made here, because its GPU was held until now."""
    if config.telemetry is None or not config.telemetry.enabled:
        return None
    config = replace(config, analytics=replace(config.analytics, enabled=True))
    handle = make_analytics(config, detached=False)
    undo.callback(end_actor, handle)
    wait_for_analytics(handle, config.analytics)
    return handle
