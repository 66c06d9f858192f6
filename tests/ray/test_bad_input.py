"""What users get wrong when they start a fleet: one clear error, and nothing left behind."""

import socket
import time

import pytest
import ray
from ray.util import placement_group_table

import lltm_ray
from lltm_ray.actors import names
from lltm_ray.errors import (
    ConfigError,
    EngineStartError,
    LltmRayError,
    ModelDoesNotFitError,
    ModelFormatError,
    ModelNotFoundError,
    PlacementError,
    ServerBinaryError,
)
from lltm_ray.models.tiny import ensure_tiny
from tests.ray.conftest import servers


@pytest.fixture
def tiny(cache):
    return ensure_tiny(cache)


def start(**settings):
    defaults = {"model": "tiny", "engines": 2, "gpu_share": 0.0, "name": "bad", "gateway": None, "drain_timeout_s": 1.0}
    lltm_ray.Cluster.start(**defaults | settings)


def check_nothing_left():
    deadline = time.monotonic() + 5  # killed actors take a moment to be gone
    while servers() or [name for name in ray.util.list_named_actors(all_namespaces=True) if ":bad:" in name["name"]]:
        assert time.monotonic() < deadline, (servers(), ray.util.list_named_actors(all_namespaces=True))
        time.sleep(0.05)
    prefix = names.engine("bad", "")
    groups = [group for group in placement_group_table().values() if group["name"].startswith(prefix)]
    assert {group["state"] for group in groups} <= {"REMOVED"}


def truncated(tiny, folder):
    path = folder / "truncated.gguf"
    path.write_bytes(tiny.read_bytes()[:-1000])
    return {"model": str(path)}


def not_gguf(tiny, folder):
    path = folder / "text.gguf"
    path.write_text("this is no model" * 100)
    return {"model": str(path)}


CASES = {
    "missing": (lambda tiny, folder: {"model": str(folder / "gone.gguf")}, ModelNotFoundError, r"gone\.gguf"),
    "unknown": (lambda tiny, folder: {"model": "llama-99b"}, ModelNotFoundError, "lltm-ray models list"),
    "truncated": (truncated, ModelFormatError, r"truncated\.gguf: byte \d+"),
    "not GGUF": (not_gguf, ModelFormatError, "byte 0"),
    "too big": (lambda tiny, folder: {"memory_limit_bytes": 100_000}, ModelDoesNotFitError, "its share has 0.1 MiB"),
    "no binary": (lambda tiny, folder: {"llama_server": "/nonexistent/llama-server"}, ServerBinaryError, "nonexistent"),
    "a name llama-server cannot take": (lambda tiny, folder: {"served_name": "a,b"}, LltmRayError, "a,b"),
    "wrong flag": (
        lambda tiny, folder: {"engine": {"extra_args": ["--no-such-flag"]}},
        EngineStartError,
        "no-such-flag",
    ),
    "unknown setting": (lambda tiny, folder: {"engines_": 2}, ConfigError, "unknown setting; did you mean engines"),
    "wrong type": (lambda tiny, folder: {"engines": "two"}, ConfigError, "engines='two': must be int"),
    "odd share": (lambda tiny, folder: {"gpu_share": 1.5}, ConfigError, "whole number of GPUs"),
    "no GPU to see": (lambda tiny, folder: {"engines": 1, "gpu_share": 0.5}, PlacementError, "0.5 GPU"),
    "no room": (lambda tiny, folder: {"engines": 1, "cpu_share": 100.0}, PlacementError, "100 CPU"),
    "public without key": (lambda tiny, folder: {"gateway": {"host": "0.0.0.0"}}, ConfigError, "api_key_file"),
    "empty keys": (
        lambda tiny, folder: {"gateway": {"port": 0, "api_key_file": "/dev/null"}},
        ConfigError,
        "holds no key",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_told_and_leaves_nothing(ray_cluster, tiny, tmp_path, case):
    settings, error, words = CASES[case]
    with pytest.raises(error, match=words) as caught:
        start(**settings(tiny, tmp_path))
    assert isinstance(caught.value, LltmRayError)
    check_nothing_left()


def test_a_taken_port_is_told_with_the_remedy(ray_cluster):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port={port}: is taken"):
            start(gateway={"port": port})
    check_nothing_left()
