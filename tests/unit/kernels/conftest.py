"""The native module, built here for the CPU alone: the same interface and errors as with CUDA."""

import pytest

from tests import native_build


@pytest.fixture(scope="session")
def native():
    """`lltm_ray.kernels._native` itself; the first run compiles csrc/, which takes about half a minute."""
    return native_build.load()


@pytest.fixture(scope="session")
def tensors(native):
    from lltm_ray.kernels import tensors

    return tensors
