"""Every notebook runs as it stands, cell after cell, and is saved as it ran.

Each in a process of its own on the cluster of these tests: a Ray for every one would take most of their time.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[2] / "examples").glob("*.ipynb"))
CODE = {
    path: [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    for path in NOTEBOOKS
}
SHELL = """
import json, sys
from IPython.core.interactiveshell import InteractiveShell
from traitlets.config import Config

shell = InteractiveShell.instance(config=Config(HistoryManager={"enabled": False}))
for source in json.load(sys.stdin):
    shell.run_cell(source).raise_error()
    print()
"""
"""A kernel's own shell, so that what a cell ends with is displayed."""
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@pytest.mark.timeout(400)
@each_notebook
def test_its_cells_run_in_their_order(path, ray_cluster, tmp_path):
    environment = os.environ | {"RAY_ADDRESS": ray_cluster.address, "IPYTHONDIR": str(tmp_path)}
    given = {"env": environment, "capture_output": True, "text": True, "timeout": 380}
    sources = json.dumps(["".join(cell["source"]) for cell in CODE[path]])
    done = subprocess.run([sys.executable, "-c", SHELL], check=False, input=sources, **given)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr


@each_notebook
def test_it_is_saved_with_the_outputs_of_one_run_and_without_what_belongs_to_a_machine(path):
    assert [cell["execution_count"] for cell in CODE[path]] == list(range(1, len(CODE[path]) + 1))
    outputs = [output for cell in CODE[path] for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} <= {"execute_result", "display_data", "stream"}
    assert len(outputs) >= len(CODE[path]) // 2
    text = path.read_text(encoding="utf-8")
    assert len(text) < 300_000
    assert not [word for word in (str(Path.home()), os.uname().nodename, "/tmp", "widget-view") if word in text]


def test_the_panels_are_saved_as_a_figure():
    (monitoring,) = (path for path in NOTEBOOKS if path.stem == "monitoring")
    outputs = [output for cell in CODE[monitoring] for output in cell["outputs"]]
    assert any("application/vnd.plotly.v1+json" in output.get("data", {}) for output in outputs)
