"""One engine's adapters while several things happen to it at once; no Ray, no server."""

import asyncio
from types import SimpleNamespace

import pytest

from lltm_ray.actors import engine as engines
from lltm_ray.actors import engine_adapters
from lltm_ray.actors import front as fronts
from lltm_ray.actors.engine import Engine
from lltm_ray.actors.engine_adapters import EngineAdapters
from lltm_ray.actors.front import OtherGateways
from lltm_ray.actors.launch import EngineSpec
from lltm_ray.config import EngineConfig, FleetConfig, LoraAdapter
from lltm_ray.errors import EngineNotReadyError
from lltm_ray.records import Adapter, EngineInfo, EngineState, FleetStatus, ModelInfo, ModelState

ADA, EVE = Adapter(name="ada", path="/ada.gguf"), Adapter(name="eve", path="/eve.gguf", scale=0.5)
CONFIG = FleetConfig(
    model="random", gpu_share=0.0, name="f", engine=EngineConfig(lora=(LoraAdapter(path="/ada.gguf"),))
)
SPEC = EngineSpec(name="engine-0", fleet=CONFIG, run_id="r", share=0.0, engines_on_node=1, gateway_node_id=None)


class Server:
    """Takes scales once `let_in` is set."""

    def __init__(self):
        self.asked, self.let_in, self.error = [], asyncio.Event(), None

    async def set_lora_adapters(self, scales):
        self.asked.append(scales)
        await self.let_in.wait()
        if self.error:
            raise self.error


def worn_by(server):
    info = EngineInfo(name="engine-0", model="random", state=EngineState.READY)
    return EngineAdapters(SimpleNamespace(spec=SPEC, info=info, client=server, update=lambda **_: None))


@pytest.fixture
def fleet_wants_eve(monkeypatch):
    model = ModelInfo(name="random", state=ModelState.READY, adapters=(EVE,))

    async def status():
        return FleetStatus(name="f", models=(model,))

    async def reach(_fleet):
        return SimpleNamespace(status=SimpleNamespace(remote=status))

    monkeypatch.setattr(engine_adapters, "reach_directory", reach)


async def test_other_adapters_wait_until_a_scale_is_set(fleet_wants_eve):
    part = worn_by(server := Server())
    setting = asyncio.create_task(part.rescale({"ada": 0.25}))
    await asyncio.sleep(0)
    dressing = asyncio.create_task(part.dress(SPEC))
    noting = asyncio.create_task(part.note({"ada": 0.75}))
    await asyncio.sleep(0.05)
    assert part.worn == (ADA,), "neither came between"
    server.let_in.set()
    await asyncio.gather(setting, dressing, noting)
    assert server.asked == [{0: 0.25}]
    assert [(each.name, each.own) for each in part.worn] == [("eve", 0.5)], "ada is gone, and its word with it"


async def test_a_call_that_was_given_up_and_is_taken_later_does_not_stay(monkeypatch):
    monkeypatch.setattr(engine_adapters, "_LOOK_S", 0.01)
    shown = {0: 1.0}

    class Slow:
        """Takes the first call only after the second one, as a server may that was stopped meanwhile."""

        calls, late = 0, {}

        async def set_lora_adapters(self, scales):
            self.calls += 1
            if self.calls == 1:
                self.late = scales
                await asyncio.Event().wait()
            shown.update(scales)
            if self.calls == 2:
                asyncio.get_running_loop().call_later(0.002, shown.update, self.late)

        async def lora_adapters(self):
            return tuple(SimpleNamespace(id=id_, scale=scale + 1e-8) for id_, scale in shown.items())

    part = worn_by(Slow())
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(part.rescale({"ada": 0.5}), 0.05)
    await part.rescale({"ada": 1.0})
    await asyncio.sleep(0.05)
    assert shown == {0: 1.0}


async def test_what_nobody_expected_of_a_background_task_is_logged(caplog):
    part = worn_by(server := Server())
    server.let_in.set()
    server.error = ZeroDivisionError("nobody expected this")
    await part.note({"ada": 0.5})
    part.server_is(EngineState.READY)
    await part._again
    assert "ZeroDivisionError: nobody expected this" in caplog.text


async def test_a_gateway_tells_an_engine_scales_by_name(monkeypatch):
    told = []
    handle = SimpleNamespace(note_scales=SimpleNamespace(remote=told.append))
    monkeypatch.setattr(fronts, "find", lambda _name: handle)
    others = OtherGateways("f", "gateway-0")
    others.adapters = {"engine-0": ("ada", "eve")}
    await others.rescale("engine-0", {1: 0.5})
    assert told == [{"ada": 0.0, "eve": 0.5}]


@pytest.fixture
def engine(monkeypatch):
    monkeypatch.setattr(engines.ray, "get_gpu_ids", list)
    monkeypatch.setattr(engines, "PROPAGATE_S", 0.0)
    return Engine(SPEC, node_id="n", address="127.0.0.1", tell=lambda _info: None)


async def test_restarts_come_one_after_the_other(engine, monkeypatch):
    seen = []

    async def work(word):
        seen.append((word, engine._is_restarting))
        await asyncio.sleep(0.01)
        seen.append((word, engine._is_restarting))

    monkeypatch.setattr(engine, "_end_server", lambda _drain_s: work("ends"))
    monkeypatch.setattr(engine, "ensure_ready", lambda: work("starts"))
    await asyncio.gather(engine.restart(0.0), engine.restart(0.0))
    assert seen == [("ends", True)] * 2 + [("starts", False)] * 2 + [("ends", True)] * 2 + [("starts", False)] * 2


async def test_an_engine_that_was_stopped_is_not_restarted(engine):
    await engine.stop(0.0)
    with pytest.raises(EngineNotReadyError, match="stopped for good"):
        await engine.restart(0.0)
    assert engine.info.state is EngineState.STOPPED
