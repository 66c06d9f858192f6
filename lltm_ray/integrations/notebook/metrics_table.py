"""`display_metrics`: the fleet's figures as a small table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

COLUMNS: Final = (
    *("requests", "errors", "requests_s", "output_tokens", "output_tokens_s", "reuse_ratio"),
    *("ttft_p50_s", "ttft_p95_s", "latency_p50_s", "latency_p95_s"),
)


def display_metrics(cluster: Any, by: Sequence[str] = ("model",), *, window_s: float | None = None) -> Any:
    """The columns of `cluster.telemetry.summary` that are looked at first, as a DataFrame; last in a cell it is shown.

    Args:
        cluster: a `Cluster`, or an `InferenceEngine`.
        by: any of model, engine, route, tenant, slot, minute.
        window_s: so many seconds until now; None: all that is kept.

    Raises:
        ConfigError: nothing to group by has such a name.
        FleetError: the fleet runs without telemetry, or it does not answer.
        MissingExtraError: pandas is not installed.
    """
    fleet = cluster.cluster if hasattr(cluster, "served_name") else cluster  # of an InferenceEngine, that below it
    return fleet.telemetry.summary(by=by, window_s=window_s)[[*by, *COLUMNS]].round(4)
