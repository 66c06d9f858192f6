"""The real engine in this process, on models of a few hundred kilobytes."""

import json
import urllib.request
from pathlib import Path

import pytest
import xllamacpp

from lltm_ray.models.random_weights import RandomShape, write_random


class Engine:
    """llama.cpp's HTTP server on a free port."""

    def __init__(self, path: Path, **settings):
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.hostnames = ["127.0.0.1"]
        params.port = 0
        params.n_ctx, params.n_parallel, params.fit_params = 4096, 2, False
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = (
            1  # two spin against each other on a busy machine
        )
        for name, value in settings.items():
            setattr(params, name, value)
        params.endpoint_slots = True
        self.server = xllamacpp.Server(params)
        # Answered by the engine's own loop: a server that is dropped before its loop runs never ends.
        self.read("/slots")

    def read(self, route):
        with urllib.request.urlopen(self.server.listening_address + route, timeout=90) as reply:
            return json.load(reply)

    def post(self, route, body):
        request = urllib.request.Request(
            self.server.listening_address + route, json.dumps(body).encode(), {"content-type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=90) as reply:
            return json.load(reply)


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny") / "tiny.gguf"
    write_random(path)
    return path


@pytest.fixture(scope="session")
def windowed_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("windowed") / "windowed.gguf"
    write_random(path, RandomShape(architecture="cohere2", sliding_window=128, n_layer=4, n_ctx=4096))
    return path


@pytest.fixture
def start_engine():
    engines = []

    def start(path, **settings):
        engines.append(Engine(path, **settings))
        return engines[-1]

    yield start
    engines.clear()


@pytest.fixture(scope="session")
def tiny_engine(tiny_path):
    return Engine(tiny_path)
