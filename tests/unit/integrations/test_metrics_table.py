"""The small table of a fleet's figures, from rows of a simulated one."""

from lltm_ray.integrations.notebook.metrics_table import COLUMNS, display_metrics
from lltm_ray.telemetry.summary import summarize
from tests.fleet_rows import Plan, fleet_rows

ROWS = fleet_rows(Plan(seconds=5))


class Fleet:
    """A cluster whose telemetry has these rows."""

    @property
    def telemetry(self):
        return self

    def summary(self, by, window_s):
        return summarize(ROWS, by=by, window_s=window_s)


class Engine:
    """An `InferenceEngine` over it, as far as the table knows one."""

    served_name, cluster = "tiny", Fleet()


def test_the_table_has_the_summarys_figures_of_what_it_is_grouped_by():
    table, whole = display_metrics(Fleet(), by=("engine",)), summarize(ROWS, by=("engine",))
    assert list(table.columns) == ["engine", *COLUMNS]
    assert list(table["requests"]) == list(whole["requests"])
    assert list(table["latency_p95_s"]) == list(whole["latency_p95_s"].round(4))
    assert display_metrics(Engine(), by=("engine",)).equals(table)
