"""cuDF and cuGraph on a real GPU: the checks of every engine, and the same answers as pandas from all analyses.

Equal means: the same tables with the same rows, whatever the order of those that tie; names and counts equal, other
numbers within 1e-5 of themselves (sums add up in another order, and cuGraph's betweenness has 32 bits). What a fit says
of a unit is within 1e-4: its terms are nearly in line with each other, which magnifies that. Communities of a graph are
never the same ones twice: their modularity is within 0.05.
"""

from __future__ import annotations

import importlib
import warnings

import numpy as np
import pytest

from lltm_ray.analytics.busiest import Stretches, densest
from lltm_ray.analytics.frames import choose_engine
from lltm_ray.analytics.ingest import build_trace
from lltm_ray.analytics.report import MODULES, make_report, run
from tests.fleet_rows import Plan, fleet_rows, many_spans
from tests.unit.analytics.frame_checks import RELATIVE, FrameChecks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(400),
    pytest.mark.filterwarnings("default"),  # of what cuDF stands on
]

SECONDS = 60.0
PLANS = {
    "clean": {},
    "one engine": {"engines": 1, "gpus": 1, "rate": 3.0},
    "no gpu": {"gpus": 0},
    "straggler": {"straggler": "engine-2"},
    "aggressor": {"aggressor": "tenant-1"},
    "scatter": {"scatter": True},
    "cascade": {"cascade": "engine-1"},
    "throttle": {"throttle": "GPU-1"},
    "overload": {"overload": 3.0},
    "stamped": {"stamped": True},
}
COMMUNITIES = "classes"
MODULARITY_WITHIN = 0.05
FITTED, FITTED_RELATIVE = "seconds_per_unit", 1e-4
SPANS, TIGHT_BYTES = 1_200_000, 16 << 20
"""One column of the spans takes 9.6 MB."""
ROWS = 4000
VERBS = {
    "inner merge": lambda f, e: f.merge(other(e), on="k", how="inner").sort_values(["i", "w"]),
    "left merge": lambda f, e: f.merge(other(e), on="k", how="left").sort_values(["i", "w"]),
    "merge keeps order": lambda f, e: f.merge(other(e).drop_duplicates(["k"]), on="k", how="left"),
    "merge on two": lambda f, e: (
        f.merge(f[["k", "j", "i"]].rename(columns={"i": "i2"}), on=["k", "j"]).sort_values(["i", "i2"]).head(999)
    ),
    "groupby": lambda f, _: f.groupby(["k", "j"], sort=True).agg({"x": "sum", "i": "max"}).reset_index(),
    "means": lambda f, _: f.groupby("k", sort=True).agg({"x": "mean", "y": "min", "i": "count"}).reset_index(),
    "counts of numbers": lambda f, _: f.groupby("k", sort=True).agg({"x": "count", "y": "max"}).reset_index(),
    "sums of nothing": lambda f, _: f[f["x"].isna()].groupby("k", sort=True).agg({"x": "sum"}).fillna(0).reset_index(),
    "running": lambda f, _: f[["i"]].assign(
        sum=f.groupby("k")["y"].cumsum(),
        most=f.groupby("k")["y"].cummax(),
        least=f.groupby("k")["y"].cummin(),
        place=f.groupby("k")["y"].cumcount(),
        before=f.groupby("k")["y"].shift(1),
        after=f.groupby("k")["i"].shift(-1),
        step=f.groupby("k")["y"].diff(),
    ),
    "whole columns": lambda f, _: f[["i"]].assign(
        sum=f["y"].cumsum(), most=f["y"].cummax(), before=f["y"].shift(1), step=f["y"].diff()
    ),
    "masks with nan": lambda f, _: f[(f["x"] > 0.5) | (f["x"] != f["x"])],
    "negated masks": lambda f, _: f[~(f["x"] > 0.5)],
    "where": lambda f, _: f[["i"]].assign(
        a=f["x"].where(f["y"] > 0), b=f["x"].mask(f["y"] > 0, 7.0), c=f["x"].fillna(1)
    ),
    "clip": lambda f, _: f[["i"]].assign(a=f["x"].clip(0.2, 0.8), b=f["y"].abs().round(1), c=f["y"].astype("int64")),
    "isin": lambda f, _: f[f["k"].isin([0, 3]) & f["x"].notna()],
    "drop_duplicates": lambda f, _: f.drop_duplicates(["k", "j"])[["k", "j", "i"]],
    "concat": lambda f, e: e.df.concat([f, f.head(10)], ignore_index=True),
    "sort": lambda f, _: f.sort_values(["k", "x", "i"], ascending=[False, True, False]).reset_index(drop=True),
    "arrays as columns": lambda f, e: with_column(f, e.xp.where(e.array(f["y"]) > 0, e.array(f["x"]), e.xp.nan)),
}


def other(engine):
    return engine.frame({"k": np.array([0, 1, 1, 3, 9]), "w": np.array([1.0, 2.0, 3.0, np.nan, 5.0])})


def with_column(frame, column):
    found = frame[["i"]]
    found["x"] = column
    return found[found["x"].notna()]


@pytest.fixture(scope="module")
def cudf_engine():
    """Makes engines; the last one made owns the memory pool, so tests that make a tight one give it back."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from lltm_ray.analytics._cudf import CudfEngine
    return CudfEngine


@pytest.fixture
def engine(cudf_engine):
    return cudf_engine(memory_bytes=8 << 30)


@pytest.fixture(scope="module")
def pandas():
    return choose_engine("pandas")


@pytest.fixture(scope="module")
def tables():
    return {name: fleet_rows(Plan(seconds=SECONDS, **faults)) for name, faults in PLANS.items()}


class TestCudf(FrameChecks):
    """Every check."""


def same_numbers(mine, theirs, what):
    assert list(mine.columns) == list(theirs.columns), what
    assert len(mine) == len(theirs), what
    for name in mine.columns:
        a, b = mine[name].to_numpy(), theirs[name].to_numpy()
        if b.dtype.kind == "f":
            within = FITTED_RELATIVE if name == FITTED else RELATIVE
            np.testing.assert_allclose(a.astype(float), b, rtol=within, atol=1e-9, err_msg=f"{what}: {name}")
        else:
            assert a.tolist() == b.tolist(), f"{what}: {name}"


def ordered(table):
    """Rows in an order of their own: names and counts first, then numbers; ids of evidence likewise."""
    plain = table.copy()
    if "evidence" in plain:
        plain["evidence"] = [" ".join(sorted(ids)) for ids in plain["evidence"]]
    exact = [name for name in plain.columns if plain[name].dtype.kind != "f"]
    keys = [*exact, *(name for name in plain.columns if name not in exact)]
    rows = sorted(range(len(plain)), key=lambda row: [str(plain[name].iloc[row]) for name in keys])
    return plain.iloc[rows].reset_index(drop=True)


def same_answers(mine, theirs, what):
    assert list(mine.tables) == list(theirs.tables), what
    for name, table in theirs.tables.items():
        same_numbers(ordered(mine.tables[name]), ordered(table), f"{what}: {name}")
    assert mine.figures == pytest.approx(theirs.figures, rel=RELATIVE, abs=1e-9, nan_ok=True), what


def test_the_gpu_is_taken_where_it_is_usable_and_named(engine):
    found = choose_engine("auto", memory_bytes=1 << 30)
    print(found.reason)
    assert found.name == "cudf"
    assert found.reason == engine.reason
    assert "NVIDIA" in found.reason or "Tesla" in found.reason


@pytest.mark.parametrize("verb", VERBS)
def test_verbs_that_both_frames_have_do_the_same(engine, pandas, verb):
    dice = np.random.default_rng(3)
    columns = {
        "k": dice.integers(-1, 5, ROWS),
        "j": dice.integers(0, 40, ROWS),
        "x": np.where(dice.random(ROWS) < 0.2, np.nan, dice.random(ROWS)),
        "y": dice.normal(0, 10, ROWS),
        "i": np.arange(ROWS),
    }
    mine, theirs = (each.host(VERBS[verb](each.frame(columns), each)) for each in (engine, pandas))
    same_numbers(mine, theirs, verb)


def test_reductions_of_columns_do_the_same(engine, pandas):
    columns = {"x": np.array([0.5, np.nan, 2.0, -1.0]), "k": np.array([3, 3, 0, 1])}
    found = []
    for each in (engine, pandas):
        x, k = each.frame(columns)["x"], each.frame(columns)["k"]
        figures = (
            x.sum(),
            x.mean(),
            x.median(),
            x.quantile(0.9),
            x.min(),
            x.max(),
            k.nunique(),
            k.sum(),
            x.isna().sum(),
        )
        counts = k.value_counts().reset_index()
        found.append(([float(figure) for figure in figures], sorted(each.host(counts).to_numpy().tolist())))
    assert found[0][0] == pytest.approx(found[1][0], rel=RELATIVE)
    assert found[0][1] == found[1][1]


@pytest.mark.parametrize("seed", range(8))
def test_busiest_stretches_are_the_same(engine, pandas, seed):
    dice = np.random.default_rng(seed)
    burst = dice.uniform(0, 300) + dice.random(40 * seed) * 5.0
    at = np.sort(np.concatenate([dice.random(dice.integers(0, 3000)) * 310 - 5, burst]))
    cost = dice.random(len(at))
    found = []
    for each in (engine, pandas):
        xp, moments = each.xp, each.xp.asarray(at)
        lasting = [Stretches(xp, moments, 300.0, 0.2, is_lasting=is_lasting) for is_lasting in (False, True)]
        told = [densest(xp, moments, 300.0, service_s) for service_s in (0.2, 4.0)]
        found.append([*told, *(one.fullest() for one in lasting), lasting[0].fullest(xp.asarray(cost), 0.5)])
    for mine, theirs in zip(*found, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-12)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("module", MODULES)
def test_an_analysis_answers_as_on_pandas(engine, pandas, tables, module, plan):
    analysis = importlib.import_module(f"lltm_ray.analytics.{module}")
    mine, theirs = (run(analysis, build_trace(tables[plan], each)) for each in (engine, pandas))
    assert (mine.error, mine.engine, mine.reason) == ("", "cudf", engine.reason)
    if module == COMMUNITIES:
        assert mine.answer.figures["modularity"] == pytest.approx(
            theirs.answer.figures["modularity"], abs=MODULARITY_WITHIN, nan_ok=True
        )
        return
    same_answers(mine.answer, theirs.answer, f"{analysis.NAME} of {plan}")
    found = [[(each.kind, each.subject) for each in result.findings] for result in (mine, theirs)]
    assert sorted(found[0]) == sorted(found[1])


def test_an_empty_window_is_reported_without_an_error(engine):
    report = make_report(build_trace({}, engine))
    assert {name: result.error for name, result in report.results.items() if result.error} == {}
    assert report.findings == ()


def test_the_memory_pool_is_bounded_and_its_end_is_known_as_such(cudf_engine):
    tight = cudf_engine(memory_bytes=TIGHT_BYTES)
    try:
        held = tight.xp.zeros(TIGHT_BYTES // 2, dtype="int8")
        with pytest.raises(MemoryError) as told:
            tight.xp.zeros(TIGHT_BYTES, dtype="int8")
        assert tight.is_out_of_memory(told.value)
        assert int(held.sum()) == 0
        with pytest.raises(MemoryError) as told:
            tight.frame({"x": np.zeros(TIGHT_BYTES // 8)}).sort_values(["x"])
        assert tight.is_out_of_memory(told.value)
    finally:
        cudf_engine()


def test_an_analysis_without_memory_runs_on_the_cpu_and_says_so(cudf_engine, pandas):
    rows = many_spans(SPANS)
    trace = build_trace(rows, cudf_engine())
    wanted = make_report(build_trace(rows, pandas))
    cudf_engine(memory_bytes=TIGHT_BYTES)
    try:
        report = make_report(trace)
    finally:
        cudf_engine()
    moved = [result for result in report.results.values() if result.engine == "pandas"]
    print({name: (result.engine, round(result.ms)) for name, result in report.results.items()})
    assert {name: result.error for name, result in report.results.items() if result.error} == {}
    assert moved
    for result in moved:
        assert "no memory left" in result.reason
        same_answers(result.answer, wanted.results[result.analysis].answer, result.analysis)
