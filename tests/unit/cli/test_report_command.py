from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pytest
from typer.testing import CliRunner, Result

from lltm_ray.cli import app
from lltm_ray.cli.report import read_window
from lltm_ray.errors import ConfigError, FleetError
from lltm_ray.telemetry import segments as store
from lltm_ray.telemetry.segments import Segments
from tests.fleet_rows import START_UNIX_NANO, Plan, fleet_rows

PLAN = Plan(seed=3, seconds=60, straggler="engine-2")


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What telemetry would have written."""
    folder = tmp_path_factory.mktemp("segments")
    segments = Segments(folder, 2**30, 1e9, 10**6)
    for kind, table in fleet_rows(PLAN).items():
        for batch in table.combine_chunks().to_batches():
            segments.add(kind, batch.append_column("seq", pa.array(range(len(batch)), pa.int64())))
    segments.flush()
    return folder


def ask(folder: Path, *argv: str) -> Result:
    return CliRunner().invoke(app, ["report", "--segments", str(folder), *argv])


def test_a_window_longer_than_the_folder_counts_the_folder(stored: Path) -> None:
    result = ask(stored, "--window", "1h", "--json", "-")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    length_s = (found["end_unix_nano"] - found["start_unix_nano"]) / 1e9
    assert 55 < length_s < 75
    assert found["engine"] == "pandas", "a GPU that engines need is taken by nobody who has not asked for it"


def test_ages_of_two_windows_are_counted_back_from_the_newest_row_and_the_folder_is_read_once(
    stored: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = []
    read = store.read_folder

    def counted(*given: object, **options: object) -> object:
        reads.append(options)
        return read(*given, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(store, "read_folder", counted)
    result = ask(stored, "--window", "20s", "--compare", "50s..25s", "25s..now")
    assert result.exit_code == 0, result.output
    assert "Before 2026-09-21" in result.stdout
    assert [round(options["back_s"]) for options in reads] == [50]


def test_a_window_before_the_first_row_says_when_that_was(stored: Path) -> None:
    result = ask(stored, "--compare", "3h..2h", "30s..now")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "rows exist from 2026-09-21" in result.stderr.replace("\n", " ")


def test_a_folder_without_rows_and_one_that_is_none_end_with_a_sentence(stored: Path, tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        result = ask(folder)
        assert result.exit_code == 2
        assert "<cache>/telemetry/<fleet>" in result.stderr.replace("\n", " ")
    shutil.copy(next(stored.glob("gpus-*")), tmp_path)
    assert ask(tmp_path, "--json", "-").exit_code == 0, "rows without a request are a report without one"


def test_moments_are_ages_or_times_in_utc() -> None:
    now = START_UNIX_NANO / 1e9
    assert read_window("60m..30m", now) == (now - 3600, now - 1800)
    assert read_window("90s..now", now) == (now - 90, now)
    at = 1_795_269_600
    assert read_window("2026-11-21T14:00:00..2026-11-21T16:00:00+01:00", now) == (at, at + 3600)
    for wrong in ("30m", "30m..60m", "now..now", "..", "soon..now"):
        with pytest.raises(ConfigError):
            read_window(wrong, now)


def test_options_of_segments_are_refused_without_and_a_fleet_that_is_gone_is_told_with_what_it_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(name: str, address: str | None = None) -> None:
        raise FleetError(f"no fleet {name!r} runs on {address}")

    monkeypatch.setattr("lltm_ray.driver.Cluster.connect", refuse)
    monkeypatch.setenv("LLTM_RAY_CACHE", str(tmp_path))
    argv = ["report", "--name", "gone", "--address", "127.0.0.1:1"]
    refused = CliRunner().invoke(app, [*argv, "--engine", "cudf"])
    assert refused.exit_code == 2
    assert "is for --segments" in " ".join(refused.stderr.split())
    assert "--segments" not in CliRunner().invoke(app, argv).stderr
    left = tmp_path / "telemetry" / "gone"
    left.mkdir(parents=True)
    told = CliRunner().invoke(app, argv)
    assert told.exit_code == 1
    assert f"--segments{left}" in "".join(told.stderr.split())
