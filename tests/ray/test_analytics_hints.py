"""Hints' way: what telemetry tells of a fleet's requests comes back to its gateway and its drivers."""

import pytest
import requests

import lltm_ray
from tests.ray.conftest import until

SYSTEM = {"role": "system", "content": "You are the youngest librarian of a library that everybody has left. " * 20}


@pytest.fixture(scope="module")
def cluster(ray_cluster):
    analytics = {"enabled": True, "hints": True, "hints_every_s": 0.5, "read_every_s": 0.3}
    with lltm_ray.Cluster.start(
        model="random", engines=2, gpu_share=0.0, name="hints", gateway={"port": 0}, analytics=analytics
    ) as fleet:
        yield fleet


def hints(cluster):
    return requests.get(f"{cluster.endpoint}/lltm/status", timeout=60).json()["hints"]


def test_a_beginning_that_several_conversations_share_comes_to_the_gateway_as_a_hint(cluster):
    assert (hints(cluster)["families"], hints(cluster)["made_unix_nano"]) == (0, 0)
    for number in range(4):
        messages = [SYSTEM, {"role": "user", "content": f"question {number}"}]
        body = {"model": "random", "messages": messages, "max_tokens": 4}
        assert requests.post(f"{cluster.endpoint}/v1/chat/completions", json=body, timeout=60).status_code == 200
    told = until(lambda: found if (found := hints(cluster))["families"] else None)
    later = until(lambda: found if (found := hints(cluster))["made_unix_nano"] > told["made_unix_nano"] else None)
    assert later["families"] == told["families"], "they are renewed before they end"
