"""What `lltm-ray models recommend` refuses of a model that is not here."""

import pytest
from typer.testing import CliRunner

from lltm_ray.cli import app


@pytest.mark.parametrize(("option", "value"), [("--context", "8192"), ("--slots", "4")])
@pytest.mark.parametrize("form", [[], ["--json"]])
def test_a_context_for_a_file_that_is_not_here_is_refused_with_the_remedy(option, value, form, tmp_path, monkeypatch):
    monkeypatch.setenv("LLTM_RAY_CACHE", str(tmp_path))
    words = ["models", "recommend", "qwen2.5-14b-q4_k_m", "--vram", "16GiB"]
    shown = CliRunner().invoke(app, [*words, option, value, *form])
    assert (shown.exit_code, shown.stdout) == (2, "")
    told = " ".join(shown.stderr.split())
    for word in (option[2:], value, "lltm-ray models pull qwen2.5-14b-q4_k_m"):
        assert word in told
    assert CliRunner().invoke(app, [*words, *form]).exit_code == 0
