from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import typer

from lltm_ray.cli import _output
from lltm_ray.errors import ConfigError, EngineError


def test_an_error_is_one_sentence_on_stderr_and_user_mistakes_have_their_own_code(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(typer.Exit) as mistake:
        _output.fail(ConfigError("port", -1, "must be [0..65535]"))
    with pytest.raises(typer.Exit) as failure, _output.errors_end_the_command():
        raise EngineError("it broke")
    assert (mistake.value.exit_code, failure.value.exit_code) == (2, 1)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == ["error: port=-1: must be [0..65535]", "error: it broke"]


def test_other_errors_stay_themselves() -> None:
    with pytest.raises(ZeroDivisionError), _output.errors_end_the_command():
        1 / 0  # noqa: B018


def test_a_long_error_is_not_cut_into_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit):
        _output.fail(EngineError("word " * 100))
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_json_takes_dataclasses_and_is_never_wrapped(capsys: pytest.CaptureFixture[str]) -> None:
    @dataclass
    class Thing:
        name: str
        path: Path

    _output.print_json(Thing("ü" * 200, Path("/x")))
    assert json.loads(capsys.readouterr().out) == {"name": "ü" * 200, "path": "/x"}


def test_a_table_shows_brackets_dashes_and_right_aligned_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    _output.print_table(("name", "count"), [("[bold]", 1234), ("x", None), ("y", 7)])
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert lines == ["name    count", "[bold]  1,234", "x           –", "y           7"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (True, "yes"), (0.12345, "0.123"), (999.7, "1,000"), (12345.6, "12,346"), (7, "7"), ("s", "s")],
)
def test_cells_are_short_and_readable(value: object, text: str) -> None:
    assert _output.shown(value) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 * 2**30, "3.0 GiB"), (5 * 2**40, "5.0 TiB")],
)
def test_bytes_are_shown_in_binary_units(count: int, text: str) -> None:
    assert _output.human_bytes(count) == text


def test_progress_takes_totals_known_late_or_never_and_several_names(capsys: pytest.CaptureFixture[str]) -> None:
    with _output.progress_bar() as progress:
        progress("a [red]", 0, None)
        progress("a [red]", 5, 10)
        progress("b", 1, 0)
    assert capsys.readouterr().out == ""


def test_the_key_is_the_first_line_of_its_file(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("\n  first  \nsecond\n", encoding="utf-8")
    assert _output.read_key(tmp_path / "keys") == "first"
    assert _output.read_key(None) == ""


@pytest.mark.parametrize("content", [None, b"", b"\n \n", b"\xff\xfe"])
def test_a_key_file_without_a_usable_key_is_refused_by_its_name(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "keys").write_bytes(content)
    with pytest.raises(ConfigError, match="api_key_file"):
        _output.read_key(tmp_path / "keys")
