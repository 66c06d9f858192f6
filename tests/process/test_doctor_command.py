from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(300)
DOCTOR = (sys.executable, "-c", "from lltm_ray.cli import main; main()", "doctor", "--json")


def test_this_machine_is_healthy_and_has_a_server_that_tells_its_version(tmp_path: Path) -> None:
    env = {**os.environ, "LLTM_RAY_CACHE": str(tmp_path)}
    done = subprocess.run(DOCTOR, capture_output=True, text=True, timeout=280, check=False, env=env)
    assert done.stdout, done.stderr
    found = {row["name"]: row for row in json.loads(done.stdout)}
    assert [row for row in found.values() if row["state"] == "bad"] == []
    assert done.returncode == 0
    assert "xllamacpp" in found["embedded engine"]["detail"]
    assert found["ray"]["state"] == "ok"
