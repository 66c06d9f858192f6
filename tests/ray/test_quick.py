"""The kernel of cluster/kaggle as Kaggle would run it, and the guard that ends a fleet before its session ends."""

import json
import runpy
import threading
from pathlib import Path

import pytest

import lltm_ray
from lltm_ray.errors import ConfigError, FleetError
from lltm_ray.integrations.kaggle.deadline import ENVIRONMENT, Deadline
from lltm_ray.sdk.conversation import Conversation
from lltm_ray.sdk.engine import InferenceEngine
from lltm_ray.sdk.guard import drain_before

KERNEL = Path(__file__).parents[2] / "cluster/kaggle/kernel.py"
GUARD = "lltm-ray-guard"
SMALL = {"gateway": {"port": 0}, "drain_timeout_s": 1.0, "engine": {"n_parallel": 2}}


def test_the_kernel_serves_asks_and_ends(ray_cluster, monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    runpy.run_path(str(KERNEL))["serve"](name="kernel", **SMALL)
    told = capsys.readouterr().out
    assert told.startswith("plain (no sign of Kaggle or Colab): no GPU;")
    assert "> What is a slot?\nA slot is" in told
    assert "engine-0 GPUs []" in told
    with pytest.raises(FleetError, match="no fleet 'kernel'"):
        lltm_ray.Cluster.connect("kernel")


def threads():
    return {thread.name for thread in threading.enumerate()}


class Broken:
    def save(self, path):
        raise OSError(f"{path.name}: disk full")


@pytest.mark.timeout(400)
def test_before_the_session_ends_everything_is_saved_and_the_fleet_drained(ray_cluster, tmp_path, monkeypatch):
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    told = []
    with InferenceEngine("brief-session") as engine:
        engine.load_model("random", gpu_share=0.0, **SMALL)
        chat = Conversation(engine)
        chat.ask("hi", max_tokens=4)
        assert drain_before(engine.cluster).join() is None, "a plain machine has no deadline"
        with drain_before(engine.cluster, 25.0, deadline=Deadline.after(600.0)) as left:
            assert GUARD in threads()
        assert (left.ended, GUARD in threads()) == (None, False), "who has left is not waited for"
        assert chat.ask("go on", max_tokens=4).success

        deadline = Deadline.after(300.5, "a test")
        files = {"chat.json": chat, "broken.json": Broken()}
        kept = {"deadline": deadline, "folder": tmp_path, "save": files, "on_end": told.append}
        with drain_before(engine.cluster, seconds_left=300.0, **kept) as guard:
            assert guard.ended is None
            ended = guard.join(280)
    assert told == [ended]
    assert ended.saved == (tmp_path / "chat.json", tmp_path / "report.html")
    assert len(json.loads((tmp_path / "chat.json").read_text())["messages"]) == 4
    assert "<html" in (tmp_path / "report.html").read_text()[:200].lower()
    assert ended.failed == ("saving broken.json: OSError: broken.json: disk full",)
    assert 0 < ended.left_s < 300 - ended.took_s + 1
    with pytest.raises(FleetError, match="no fleet 'brief-session'"):
        lltm_ray.Cluster.connect("brief-session")


def test_a_guard_of_nothing_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="folder"):
        drain_before(None, folder=tmp_path / "none")
    with pytest.raises(ConfigError, match="seconds_left"):
        drain_before(None, 0)
