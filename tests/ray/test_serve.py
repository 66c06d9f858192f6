"""The fleet as a Ray Serve application: the same app, the same engines, the same text."""

import pytest
import ray
from ray import serve

from lltm_ray import build_app
from lltm_ray.actors import names
from lltm_ray.actors.fleet import find_fleet
from lltm_ray.errors import ConfigError
from lltm_ray.llamacpp.process import free_port
from tests.ray.conftest import HI, post, servers, until


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Serve's own
def test_serve_answers_as_the_handles_do_and_ends_its_engines(ray_cluster):
    port = free_port("127.0.0.1")
    serve.start(http_options={"port": port, "host": "127.0.0.1"})
    serve.run(build_app({"model": "tiny", "engines": "1", "gpu_share": "0", "name": "served"}), name="lltm")
    try:
        body = {"messages": HI, "max_tokens": 24, "temperature": 0}
        answer = post(f"http://127.0.0.1:{port}/v1/chat/completions", body)
        engine = next(iter(find_fleet("served").engines.values()))
        done = ray.get(engine.chat.remote(HI, max_tokens=24, temperature=0))
        assert answer["choices"][0]["message"]["content"] == done.text
        told = ray.get_actor(names.telemetry("served"), namespace=names.NAMESPACE)
        pages = until(lambda: _two(ray.get(told.read_since.remote(0, ["requests"]))))
        assert sorted(pages["policy"]) == ["", "residency"]  # by handle, and by the ingress
        assert len(servers()) == 1
    finally:
        serve.shutdown()
    assert servers() == set()


def _two(page):
    requests = page.tables["requests"].to_pydict()
    return requests if len(requests["policy"]) == 2 else None


def test_a_wrong_setting_is_told_before_anything_is_deployed():
    with pytest.raises(ConfigError, match="n_paralel"):
        build_app({"engine.n_paralel": "8"})
