"""What `lltm-ray adapters` refuses, before a fleet is reached."""

import pytest
from typer.testing import CliRunner

from lltm_ray.cli import app
from lltm_ray.driver import Cluster


@pytest.mark.parametrize(("option", "value"), [("--load", "ada.gguf=much"), ("--set", "ada=much"), ("--set", "ada")])
def test_a_wrong_scale_is_refused_before_anything_is_unloaded(option, value, monkeypatch):
    monkeypatch.setattr(Cluster, "connect", lambda *_: pytest.fail("a fleet was reached"))
    shown = CliRunner().invoke(app, ["adapters", "--unload", "old", option, value])
    assert shown.exit_code == 2
    assert value in shown.stderr
