"""A fleet without telemetry loads nothing of what tells rows, in the driver and in every actor.

Ray itself imports pyarrow in each process that joins it, where it is installed (`ray.util.serialization_addons`); that
our own modules do not is in `tests/unit/actors/test_sender.py`.
"""

import json
import subprocess
import sys

import pytest

PROGRAM = """
import json, sys
import ray
import lltm_ray
from lltm_ray.actors import names

def loaded(_actor):
    import sys
    ours = {f"lltm_ray.telemetry.{name}" for name in ("batch", "outbox", "segments", "store", "summary")}
    return sorted((ours | {"opentelemetry.sdk"}) & set(sys.modules))

fleet = {"model": "random", "name": "quiet", "engines": 1, "gpu_share": 0.0, "gateway": {"port": 0}}
with lltm_ray.Cluster.start(**fleet, address=sys.argv[1], telemetry={"enabled": False}) as cluster:
    answer = cluster.chat([{"role": "user", "content": "hi"}], max_tokens=2)
    of_all = [each["name"] for each in ray.util.list_named_actors(all_namespaces=True)]
    own = [name for name in of_all if name and name.startswith("lltm:quiet:")]
    actors = {name: ray.get_actor(name, namespace=names.NAMESPACE) for name in own}
    found = {name: ray.get(actor.__ray_call__.remote(loaded), timeout=60) for name, actor in actors.items()}
    print(json.dumps(found | {"driver": loaded(None), "answer": answer.engine}))
"""


@pytest.mark.timeout(400)
def test_without_telemetry_neither_driver_nor_actors_load_what_tells_rows(ray_cluster):
    command = [sys.executable, "-c", PROGRAM, ray_cluster.address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=350, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.pop("answer") == "engine-0"
    assert {name.split(":")[2] for name in found if name != "driver"} >= {"directory", "engine", "gateway"}
    assert {name: each for name, each in found.items() if each} == {}
