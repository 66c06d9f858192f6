"""The face of the native module where that was not built."""

import sys

import pytest

from lltm_ray.errors import MissingExtraError
from lltm_ray.kernels import native


def test_without_the_native_module_the_command_that_builds_it_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "lltm_ray.kernels._native", None)
    with pytest.raises(MissingExtraError, match="LLTM_RAY_NATIVE=1 pip install"):
        native.read_devices()
