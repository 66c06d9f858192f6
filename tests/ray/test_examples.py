"""Every example runs as it stands, on the cluster of these tests: a Ray for each would take most of their time."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))


@pytest.mark.timeout(400)
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_it_runs(path, ray_cluster):
    environment = os.environ | {"RAY_ADDRESS": ray_cluster.address}
    given = {"env": environment, "capture_output": True, "text": True, "timeout": 380}
    done = subprocess.run([sys.executable, str(path)], check=False, **given)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip()
    assert "Traceback" not in done.stderr
