"""What users get wrong when they start a fleet: one clear error, and nothing left behind."""

import re
import socket
import time
from concurrent.futures import ThreadPoolExecutor

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
from lltm_ray.models.random_weights import ensure_random
from tests.ray.conftest import servers, until

pytestmark = pytest.mark.timeout(400)


def start(name="bad", **settings):
    defaults = {"model": "random", "engines": 1, "gpu_share": 0.0, "gateway": None, "drain_timeout_s": 1.0}
    lltm_ray.Cluster.start(name=name, **defaults | settings)


def left_by(fleet):
    """Actors and shares of a fleet; killed ones take a moment to be gone."""
    deadline = time.monotonic() + 60
    while left := actors_of(fleet) + shares_of(fleet):
        if time.monotonic() > deadline:
            return left
        time.sleep(0.05)
    return []


def actors_of(fleet):
    found = (actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True))
    return [name for name in found if name.startswith(names.directory(fleet).removesuffix("directory"))]


def shares_of(fleet):
    groups = placement_group_table().values()
    prefix = names.engine(fleet, "")
    return [group["name"] for group in groups if group["name"].startswith(prefix) and group["state"] != "REMOVED"]


def truncated(weights, folder):
    path = folder / "truncated.gguf"
    path.write_bytes(weights.read_bytes()[:-1000])
    return {"model": str(path)}


def not_gguf(weights, folder):
    path = folder / "text.gguf"
    path.write_text("this is no model" * 100)
    return {"model": str(path)}


CASES = {
    "missing": (lambda weights, folder: {"model": str(folder / "gone.gguf")}, ModelNotFoundError, r"gone\.gguf"),
    "unknown": (lambda weights, folder: {"model": "llama-99b"}, ModelNotFoundError, "lltm-ray models list"),
    "truncated": (truncated, ModelFormatError, r"truncated\.gguf: byte \d+"),
    "not GGUF": (not_gguf, ModelFormatError, "byte 0"),
    "too big": (lambda weights, folder: {"memory_limit_bytes": 100_000}, ModelDoesNotFitError, "its share has 0.1 MiB"),
    "no binary": (
        lambda weights, folder: {"llama_server": "/nonexistent/llama-server"},
        ServerBinaryError,
        "nonexistent",
    ),
    "a name llama-server cannot take": (lambda weights, folder: {"served_name": "a,b"}, LltmRayError, "a,b"),
    "wrong flag": (
        lambda weights, folder: {"engines": 2, "engine": {"extra_args": ["--no-such-flag"]}},
        EngineStartError,
        "no-such-flag",
    ),
    "unknown setting": (lambda weights, folder: {"engines_": 2}, ConfigError, "unknown setting; did you mean engines"),
    "wrong type": (lambda weights, folder: {"engines": "two"}, ConfigError, "engines='two': must be int"),
    "odd share": (lambda weights, folder: {"gpu_share": 1.5}, ConfigError, "whole number of GPUs"),
    "no GPU to see": (lambda weights, folder: {"gpu_share": 0.5}, PlacementError, "0.5 GPU"),
    "no room": (lambda weights, folder: {"cpu_share": 100.0}, PlacementError, "100 CPU"),
    "public without key": (lambda weights, folder: {"gateway": {"host": "0.0.0.0"}}, ConfigError, "api_key_file"),
    "empty keys": (
        lambda weights, folder: {"gateway": {"port": 0, "api_key_file": "/dev/null"}},
        ConfigError,
        "holds no key",
    ),
}


@pytest.fixture(scope="module")
def outcomes(ray_cluster, cache, tmp_path_factory):
    """Of every case the error and what it left. Three at a time: each start waits for one process after the other."""
    weights, folder = ensure_random(cache), tmp_path_factory.mktemp("models")

    def outcome(case, number):
        fleet = f"bad-{number}"
        try:
            start(fleet, **CASES[case][0](weights, folder))
        except Exception as error:
            return error, left_by(fleet)
        return None, left_by(fleet)

    with ThreadPoolExecutor(3) as pool:
        found = dict(zip(CASES, pool.map(outcome, CASES, range(len(CASES))), strict=True))
    until(lambda: not servers())
    return found


@pytest.mark.parametrize("case", CASES)
def test_it_is_told_and_leaves_nothing(outcomes, case):
    _settings, kind, words = CASES[case]
    error, left = outcomes[case]
    assert isinstance(error, kind), repr(error)
    assert isinstance(error, LltmRayError)
    assert re.search(words, str(error)), error
    assert left == []


def test_a_taken_port_is_told_with_the_remedy(ray_cluster):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port={port}: is taken"):
            start(gateway={"port": port})
    assert left_by("bad") == []
    until(lambda: not servers())
