"""The engine of the CPU does what engines must; and an engine is chosen, with its reason."""

import sys

import pytest

from lltm_ray.analytics import frames
from lltm_ray.analytics.frames import choose_engine
from lltm_ray.errors import ConfigError
from tests.unit.analytics.frame_checks import FrameChecks


@pytest.fixture(scope="module")
def engine():
    return choose_engine("pandas")


class TestPandas(FrameChecks):
    """Every check."""


@pytest.fixture
def without_cudf(monkeypatch):
    """As on a machine that has none: an import of it fails, and its engine's module was not imported yet."""
    monkeypatch.delitem(sys.modules, "lltm_ray.analytics._cudf", raising=False)
    monkeypatch.setitem(sys.modules, "cudf", None)


def test_pandas_is_the_engine_where_it_is_asked_for(engine):
    assert (engine.name, engine.reason) == ("pandas", "asked for")
    assert not engine.is_out_of_memory(MemoryError())


def test_auto_goes_on_without_cudf_and_says_how_to_get_it(without_cudf):
    found = choose_engine("auto")
    assert found.name == "pandas"
    assert "lltm_ray[rapids]" in found.reason


def test_cudf_asked_for_and_absent_is_an_error_with_a_way_out(without_cudf):
    with pytest.raises(ConfigError, match=r"lltm_ray\[rapids\].*use engine = 'auto'"):
        choose_engine("cudf")


def test_a_cudf_that_fails_its_trial_is_told_with_its_error(monkeypatch):
    class Broken:
        def __init__(self, memory_bytes):
            raise RuntimeError(f"CUDA driver version is insufficient, {memory_bytes}")

    given = frames.load
    monkeypatch.setattr(
        frames, "load", lambda target, **kw: Broken if target.endswith("CudfEngine") else given(target, **kw)
    )
    assert choose_engine("auto", memory_bytes=5).reason == (
        "cuDF is not usable here: RuntimeError: CUDA driver version is insufficient, 5"
    )
    with pytest.raises(ConfigError, match=r"not usable here.*use engine = 'auto'"):
        choose_engine("cudf")


def test_an_unknown_engine_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"polars.*auto, cudf, pandas"):
        choose_engine("polars")
