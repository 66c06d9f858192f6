"""The notebook runs as it stands, cell after cell, and is saved as it ran."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[2] / "examples" / "monitoring.ipynb"
CODE = [cell for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]


@pytest.mark.timeout(180)
def test_its_cells_run_in_their_order(cache):
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    program = "\n\n".join("".join(cell["source"]) for cell in CODE)
    given = {"env": environment, "capture_output": True, "text": True, "timeout": 170}
    done = subprocess.run([sys.executable, "-c", program], check=False, **given)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_it_is_saved_with_the_outputs_of_one_run_and_without_what_belongs_to_a_machine():
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1))
    outputs = [output for cell in CODE for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} <= {"execute_result", "display_data", "stream"}
    assert any("application/vnd.plotly.v1+json" in output.get("data", {}) for output in outputs)
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert len(text) < 500_000
    assert not [word for word in (str(Path.home()), os.uname().nodename, "/tmp") if word in text]
