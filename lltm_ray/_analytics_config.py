"""Settings of analytics; `config` is where to import them from."""

from __future__ import annotations

from dataclasses import dataclass

from lltm_ray._settings import check as _check
from lltm_ray._settings import check_choice as _check_choice
from lltm_ray._settings import check_range as _check_range

ANALYTICS_ENGINES = ("auto", "cudf", "pandas")


@dataclass(frozen=True, slots=True, kw_only=True)
class AnalyticsConfig:
    """The actor that answers `report`. It reads what telemetry keeps, never from a request's path."""

    enabled: bool = False
    """True: it runs as long as the fleet and follows telemetry, so that a report may go back `window_s`. False: it is
    made when a report is asked for, and reads what telemetry has in memory then."""
    engine: str = "auto"
    """`cudf` (cuDF and cuGraph), `pandas` (with NetworkX), or `auto`: the first that is usable."""
    gpu_share: float = 0.0
    """GPUs of its own, which engines do not get: 1 is one of another GPU, 0 the CPU."""
    window_s: float = 3600.0
    """How far back rows are kept; an hour shows a daily peak's hour and costs about half a KB a request."""
    max_bytes: int = 2**29
    """Of rows in memory, about a million requests; beyond them the oldest go. While a report over all of them is made
    it takes six times as much beside them."""
    read_every_s: float = 2.0
    """How often new rows are fetched from telemetry."""
    hints: bool = False
    """Whether routers are told where prefix families live. Needs `enabled`."""
    hints_every_s: float = 5.0
    """How often, over the last `hints_window_s`."""
    hints_window_s: float = 60.0
    """What hints are judged by: long enough for a few hundred requests, short enough that caches still hold them."""

    def __post_init__(self) -> None:
        _check_choice("engine", self.engine, ANALYTICS_ENGINES)
        _check_range(
            self,
            gpu_share=(0, 1),
            window_s=(1, 10**8),
            max_bytes=(2**20, 2**50),
            read_every_s=(0.05, 3600),
            hints_every_s=(0.1, 3600),
            hints_window_s=(1, 10**6),
        )
        needs_gpu = self.engine == "cudf" and not self.gpu_share
        _check(not needs_gpu, "gpu_share", self.gpu_share, 'engine = "cudf" needs a share of a GPU, such as 1')
        _check(self.enabled or not self.hints, "hints", self.hints, "needs enabled = true")
