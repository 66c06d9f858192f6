"""Whoever comes from the old SDK finds every call of the README's table, and each row has tests that hold it."""

import functools
import importlib
import re
from pathlib import Path

import pytest

from lltm_ray.cli import COMMANDS
from tests.migration import MOVES, markdown

TESTS = Path(__file__).parents[1]


@pytest.mark.parametrize("move", MOVES, ids=lambda move: move.old)
def test_what_takes_an_old_calls_place_exists_and_is_documented(move):
    if move.new.startswith("`"):
        assert move.new.strip("`").split()[1] in COMMANDS
        return
    module, _, path = move.new.partition(":")
    found = functools.reduce(getattr, path.split("."), importlib.import_module(module))
    assert found.__doc__


@pytest.mark.parametrize("move", MOVES, ids=lambda move: move.old)
def test_every_row_is_held_by_tests(move):
    assert move.tests
    for test in move.tests:
        file, _, name = test.partition("::")
        assert re.search(rf"^(async )?def {name}\(", (TESTS / file).read_text(encoding="utf-8"), re.MULTILINE), test


def test_the_readmes_table_is_this_list():
    assert markdown() in (TESTS.parent / "README.md").read_text(encoding="utf-8")
