"""Every example runs as it stands. All at once: each spends half of its time waiting for a Ray of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))


@pytest.fixture(scope="module")
def running(cache):
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    processes = {path: subprocess.Popen([sys.executable, str(path)], **pipes) for path in EXAMPLES}
    yield processes
    for process in processes.values():
        with process:
            process.kill()


@pytest.mark.timeout(180)
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_it_runs(path, running):
    out, err = running[path].communicate(timeout=150)
    assert running[path].returncode == 0, out + err
    assert out.strip()
    assert "Traceback" not in err
