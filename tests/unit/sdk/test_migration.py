"""Whoever comes from the old SDK finds every call of the README's table."""

import functools
import importlib
from pathlib import Path

import pytest

from lltm_ray.sdk.migration import MOVES, markdown


@pytest.mark.parametrize("move", MOVES, ids=lambda move: move.old)
def test_what_takes_an_old_calls_place_exists_and_is_documented(move):
    module, _, path = move.new.partition(":")
    found = functools.reduce(getattr, path.split("."), importlib.import_module(module))
    assert found.__doc__


def test_the_readmes_table_is_this_list():
    assert markdown() in (Path(__file__).parents[3] / "README.md").read_text(encoding="utf-8")
