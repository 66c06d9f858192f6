"""Named sessions on real fleets: over two nodes and two gateways, and over the fleet's end."""

import pytest
import ray
import requests

import lltm_ray
from lltm_ray.actors.sessions import Sessions
from tests.ray.conftest import until_free

FLEET = {"model": "random", "name": "kept", "engines": 2, "gpu_share": 0.0, "cpu_share": 3.0}
GREEDY = {"temperature": 0, "ignore_eos": True, "max_tokens": 16}


@pytest.fixture(scope="module")
def second_node(ray_cluster):
    node = ray_cluster.add_node(num_cpus=3)
    ray_cluster.wait_for_nodes()
    yield node
    ray_cluster.remove_node(node)


@pytest.fixture
def keys(tmp_path):
    path = tmp_path / "keys.txt"
    path.write_text("# of the fleet\n\nfirst ann\nsecond bob\n")
    path.chmod(0o600)
    return str(path)


def by_node(cluster):
    """Engines' names, those of this node first."""
    here = ray.get_runtime_context().get_node_id()
    engines = sorted(cluster.status().engines, key=lambda engine: engine.node_id != here)
    assert [engine.node_id == here for engine in engines] == [True, False]
    return [engine.name for engine in engines]


def turn(cluster, messages, text, engine, session=""):
    """One more turn over a connection of its own, so that either gateway may get it; its timings and what was done."""
    messages.append({"role": "user", "content": text})
    headers = {"authorization": "Bearer first", "x-lltm-engine": engine}
    headers |= {"x-lltm-session": session} if session else {}
    url = f"{cluster.endpoint}/v1/chat/completions"
    answer = requests.post(url, json={"messages": messages, **GREEDY}, headers=headers, timeout=60)
    told = answer.json()
    messages.append({"role": "assistant", "content": told["choices"][0]["message"]["content"]})
    return told["timings"], answer.headers.get("x-lltm-session")


def talked(cluster, engine, topic):
    messages = [{"role": "system", "content": f"We talk of {topic} and nothing else. " * 12}]
    for text in ("tell me", "go on"):
        turn(cluster, messages, text, engine)
    return messages


@pytest.mark.timeout(300)
def test_what_was_saved_on_one_node_goes_on_on_the_other_and_after_the_fleets_end(second_node, keys):
    gateway = {"port": 0, "processes": 2, "api_key_file": keys}
    until_free(7)
    with lltm_ray.Cluster.start(gateway=gateway, **FLEET) as cluster:
        for place, topic in ((0, "rivers"), (1, "birds")):
            home, other = by_node(cluster)[place], by_node(cluster)[1 - place]
            messages = talked(cluster, home, topic)
            info = cluster.sessions.save(topic, messages)
            assert (info.why, info.cached_tokens >= 0.8 * info.tokens) == ("", True), "either gateway finds it"
            timings, done = turn(cluster, messages, "and then?", other, topic)
            assert timings["cache_n"] >= 0.95 * info.tokens, (done, timings, info)
        with cluster.sessions.open("alice", system="You are terse. " * 20) as alice:
            for text in ("tell me", "go on"):
                assert alice.ask(text, **GREEDY).text
        assert Sessions(cluster.endpoint, api_key="second").list() == ()
        said = list(alice.messages)
    until_free(7)
    with lltm_ray.Cluster.start(gateway=gateway, **FLEET) as cluster:
        kept = {info.name: info for info in cluster.sessions.list()}
        assert sorted(kept) == ["alice", "birds", "rivers"]
        again = cluster.sessions.open("alice")
        assert again.messages == said
        pieces = [event.text for event in again.stream("and then?", **GREEDY)]
        assert again.messages[-1]["content"] == "".join(pieces)
        assert again.restored_tokens >= 0.95 * kept["alice"].tokens, again.why
        for name in kept:
            cluster.sessions.delete(name)
        assert cluster.sessions.list() == ()
        assert cluster.sessions is cluster.sessions
