"""What a slip of the keyboard is told: the command, the setting or the file that was meant."""

import pytest
from typer.testing import CliRunner

from lltm_ray.cli import app

NOWHERE = ("--url", "http://127.0.0.1:9")


def run(*arguments, **options):
    return CliRunner().invoke(app, arguments, **options)


@pytest.mark.parametrize(
    ("wrong", "meant"), [("satus", "'status'"), ("model", "'models'"), ("explian", "'explain'"), ("DEMO", None)]
)
def test_a_command_that_is_none_is_told_with_the_nearest(wrong, meant):
    done = run(wrong)
    assert done.exit_code == 2
    told = f"No such command {wrong!r}." + (f" Did you mean {meant}" if meant else "\n")
    assert told in done.output


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (None, "no such file"),
        ("folder", "cannot be read: Is a directory"),
        ("{", "is no JSON that can be read: Expecting property name"),
        ("5", "must be a list of messages"),
    ],
)
def test_messages_that_cannot_be_saved_are_told_by_their_file(tmp_path, content, why):
    file = tmp_path / "messages.json"
    if content == "folder":
        file.mkdir()
    elif content is not None:
        file.write_text(content)
    done = run("sessions", "save", "alice", "--messages", str(file), *NOWHERE)
    assert done.exit_code == 2
    assert f"messages='{file}': {why}" in done.output
    assert "Errno" not in done.output
