from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.timeout(300)
DOCTOR = (sys.executable, "-c", "from lltm_ray.cli import main; main()", "doctor", "--json")


def rows(tmp_path: Path, **environ: str) -> tuple[int, dict[str, dict[str, Any]]]:
    env = {**os.environ, "LLTM_RAY_CACHE": str(tmp_path)} | environ
    done = subprocess.run(DOCTOR, capture_output=True, text=True, timeout=280, check=False, env=env)
    assert done.stdout, done.stderr
    return done.returncode, {row["name"]: row for row in json.loads(done.stdout)}


def test_this_machine_is_healthy_and_has_a_server_that_tells_its_version(tmp_path: Path) -> None:
    code, found = rows(tmp_path)
    assert [row for row in found.values() if row["state"] == "bad"] == []
    assert code == 0
    assert "xllamacpp" in found["embedded engine"]["detail"]
    assert found["ray"]["state"] == "ok"


def test_a_server_path_that_leads_nowhere_is_bad_with_exit_code_1(tmp_path: Path) -> None:
    code, found = rows(tmp_path, LLAMA_SERVER_PATH="/no/such/llama-server")
    assert code == 1
    assert found["llama-server"]["state"] == "bad"
    assert "LLAMA_SERVER_PATH" in found["llama-server"]["detail"]
