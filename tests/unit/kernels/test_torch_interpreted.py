"""Every Triton kernel in Triton's interpreter, against the CPU paths and float64. Needs PyTorch and Triton."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.torch, pytest.mark.timeout(300)]
ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def found():
    done = subprocess.run(
        [sys.executable, "-m", "tests.unit.kernels.interpreted"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("part", ["nf4", "gguf"])
def test_quantized_bytes_and_values_are_those_of_numpy(found, part):
    differing = {name: count for name, count in found.items() if name.startswith(part)}
    assert len(differing) >= 7
    assert not any(differing.values()), differing


@pytest.mark.parametrize("part", ["matmul", "add", "swiglu", "softmax", "layernorm", "rmsnorm", "rope"])
def test_results_are_within_the_stated_tolerance_of_float64(found, part):
    shares = {name: share for name, share in found.items() if name.startswith(part)}
    assert len(shares) >= 2
    assert max(shares.values()) <= 1, shares
