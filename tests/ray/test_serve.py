"""The fleet as a Ray Serve application: the same app, the same engines, the same text."""

import json
import threading
import time
import urllib.request
from collections import Counter

import pytest
import ray
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema

from lltm_ray import build_app
from lltm_ray.actors import names
from lltm_ray.actors.fleet import find_fleet
from lltm_ray.actors.orphan import ORPHANED_AFTER_S
from lltm_ray.errors import ConfigError
from lltm_ray.records import ModelState
from tests.ray.conftest import HI, held_port, post, servers, until
from tests.ray.load import Load

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Serve's own
SLOTS = 4


@pytest.fixture
def url(ray_cluster):
    """Of Serve, which is ended afterwards with all that runs there."""
    with held_port() as port:
        serve.start(http_options={"port": port, "host": "127.0.0.1"})
        yield f"http://127.0.0.1:{port}"
        serve.shutdown()
    until(lambda: not servers(), ORPHANED_AFTER_S / 2)  # killed ones take a moment to be gone


def run(**settings):
    serve.run(build_app({"gpu_share": "0", "name": "served"} | settings), name="lltm")


def scale(replicas):
    """What `serve deploy` does with a file; only the number of ingress replicas changes."""
    app = {"name": "lltm", "import_path": "lltm_ray.serve:app", "deployments": [{"name": "gateway"}]}
    app["args"] = {"model": "random", "gpu_share": 0, "name": "scaled", "engine.n_parallel": SLOTS}
    app["deployments"][0]["num_replicas"] = replicas
    _get_global_client().deploy_apps(ServeDeploySchema(applications=[app]), _blocking=True)


def owned(url):
    """Slots that each ingress replica calls its own, by the Serve replica that answered."""
    with urllib.request.urlopen(f"{url}/lltm/status", timeout=60) as answer:
        return [row["slots_total"] for row in json.load(answer)["router"]["engines"].values()]


def replicas():
    return [each for each in find_fleet("scaled").status().gateways if each.state == "ready"]


def stream(url, tokens, ended, enough):
    """Long answers, event by event, one after the other; of each how many came, its end, and when it ran."""
    while not enough.is_set():
        began = time.monotonic()
        lines = read_events(url, tokens)
        ended.append((len(lines), lines[-1].strip(), began, time.monotonic()))


def read_events(url, tokens):
    body = {"messages": HI, "max_tokens": tokens, "ignore_eos": True, "stream": True}
    request = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=120) as answer:
        return [line for line in answer if line.startswith(b"data: ")]


@pytest.mark.timeout(400)
def test_a_replica_that_serve_ends_finishes_what_runs_and_the_other_has_its_slots_at_once(url):
    scale(2)
    until(lambda: len(replicas()) == 2)
    until(lambda: owned(url) == [SLOTS // 2])
    ended: list[tuple[int, bytes, float, float]] = []
    enough = threading.Event()
    streams = [threading.Thread(target=stream, args=(url, 1000, ended, enough)) for _ in range(2)]
    with Load(url, clients=4) as load:
        load.wait_for(20, 60.0)
        for each in streams:
            each.start()
        down = threading.Thread(target=scale, args=(1,))
        down.start()
        until(lambda: len(replicas()) == 1)
        gone = time.monotonic()
        enough.set()
        until(lambda: owned(url) == [SLOTS])
        for each in (down, *streams):
            each.join(120)
            assert not each.is_alive()
        load.wait_for(20, 60.0)
    assert not load.failures(), Counter(out.error for out in load.failures())
    assert {(lines >= 1000, last) for lines, last, *_ in ended} == {(True, b"data: [DONE]")}
    assert any(began < gone < end for *_, began, end in ended), "one still ran when the replica was told to go"
    told = ray.get_actor(names.telemetry("scaled"), namespace=names.NAMESPACE)
    wanted = load.succeeded() + len(ended)
    until(lambda: _count(ray.get(told.read_since.remote(0, ["requests"]))) == wanted)


def _count(page):
    return page.tables["requests"].num_rows


@pytest.mark.timeout(300)
def test_engines_come_and_go_with_demand_under_serve_and_conversations_outlive_them(url):
    cold = {
        "engines": 0,
        "max_engines": 1,
        "idle_timeout_s": 2,
        "cpu_share": 1,
        "engine": {"n_parallel": 2, "n_ctx": 8192},
    }
    kept = {"model": "random", "served_name": "kept", "cpu_share": 1}
    run(name="cold", models=[kept, {"model": "random", "served_name": "talk"} | cold])

    def state(model):
        return next(each.state for each in find_fleet("cold").status().models if each.name == model)

    messages = [{"role": "user", "content": "Ann talks of this and that. " * 80}]
    body = {"model": "talk", "max_tokens": 32, "temperature": 0, "ignore_eos": True}
    assert (state("kept"), state("talk")) == (ModelState.READY, ModelState.COLD)
    first = post(f"{url}/v1/chat/completions", body | {"messages": messages})
    until(lambda: state("talk") is ModelState.COLD)
    until(lambda: len(servers()) == 1)
    messages += [first["choices"][0]["message"], {"role": "user", "content": "go on"}]
    again = post(f"{url}/v1/chat/completions", body | {"messages": messages})
    old, new = first["timings"], again["timings"]
    assert new["cache_n"] >= 0.95 * (old["prompt_n"] + old["predicted_n"] - 1)


def test_serve_answers_as_the_handles_do_and_ends_its_engines(url):
    run(model="random", engines="1")
    body = {"messages": HI, "max_tokens": 24, "temperature": 0}
    answer = post(f"{url}/v1/chat/completions", body)
    engine = next(iter(find_fleet("served").engines.values()))
    done = ray.get(engine.chat.remote(HI, max_tokens=24, temperature=0))
    assert answer["choices"][0]["message"]["content"] == done.text
    told = ray.get_actor(names.telemetry("served"), namespace=names.NAMESPACE)
    pages = until(lambda: _two(ray.get(told.read_since.remote(0, ["requests"]))))
    assert sorted(pages["policy"]) == ["", "residency"]  # by handle, and by the ingress
    (before,) = servers()
    run(model="random", engines="1", **{"engine.n_parallel": "2"})
    assert servers().isdisjoint({before})
    assert post(f"{url}/v1/chat/completions", body)["choices"][0]["message"]["content"] == done.text


def _two(page):
    requests = page.tables["requests"].to_pydict()
    return requests if len(requests["policy"]) == 2 else None


def test_below_a_prefix_of_serves_the_routes_are_the_same(url):
    serve.run(build_app({"model": "random", "gpu_share": "0", "name": "served"}), name="lltm", route_prefix="/llm")
    for path in ("/v1/models/random", "/health"):
        with urllib.request.urlopen(f"{url}/llm{path}", timeout=60) as answer:
            assert answer.status == 200
    assert post(f"{url}/llm/v1/chat/completions", {"messages": HI, "max_tokens": 4})["usage"]["completion_tokens"] == 4


def test_a_wrong_setting_is_told_before_anything_is_deployed():
    with pytest.raises(ConfigError, match="n_paralel"):
        build_app({"engine.n_paralel": "8"})
