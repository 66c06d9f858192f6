"""Calls from a driver to engines that are handles made here."""

from types import SimpleNamespace

import pytest

from lltm_ray.actors.calls import Calls
from lltm_ray.actors.fleet import Fleet
from lltm_ray.config import FleetConfig
from lltm_ray.errors import OverloadedError
from lltm_ray.records import EngineInfo, EngineState, FleetStatus, GatewayInfo
from lltm_ray.routing.policy import Ask


class Handle:
    """An engine that has no room, and how long it was given."""

    def __init__(self):
        self.stream = self.chat = self
        self.timeouts = []

    def options(self, **_):
        return self

    def remote(self, *_, timeout_s, **__):
        self.timeouts.append(timeout_s)
        raise OverloadedError("full", retry_after_s=1.0)


class Router:
    async def acquire(self, ask, exclude):
        return SimpleNamespace(engine=SimpleNamespace(name="engine-0"), lora=b"", row=None)

    def release(self, lease, served):
        pass


@pytest.fixture
def calls():
    made = Calls(Fleet(config=FleetConfig(), run_id="", directory=SimpleNamespace(wake=SimpleNamespace(remote=None))))
    made._router, made._fleet.engines["engine-0"] = Router(), Handle()
    return made


async def test_an_engines_own_deadline_comes_after_its_callers_whose_error_somebody_takes(calls):
    for ask in (calls.call("chat", [], timeout_s=3), anext(calls.stream([], timeout_s=3))):
        with pytest.raises(OverloadedError):
            await ask
    assert [limit_s >= 5 for limit_s in calls._fleet.engines["engine-0"].timeouts] == [True, True]


async def test_engines_that_a_gateway_drained_get_no_calls_until_it_opens_them_again():
    directory = SimpleNamespace(wake=SimpleNamespace(remote=lambda *_: None))
    calls = Calls(Fleet(config=FleetConfig(), run_id="", directory=directory))
    engines = [
        EngineInfo(name=name, model="m", state=EngineState.READY, url="http://127.0.0.1:1", slots_total=4, server_pid=1)
        for name in ("engine-0", "engine-1")
    ]

    async def taken_by(*closed):
        gateway = GatewayInfo(name="gateway-0", url="", state="ready", closed=closed)
        calls._learn(FleetStatus(name="f", engines=engines, gateways=[gateway]))
        leases = [await calls._router.acquire(Ask(model="m")) for _ in range(4)]
        for lease in leases:
            calls._router.release(lease)
        return {lease.engine.name for lease in leases}

    assert await taken_by("engine-0") == {"engine-1"}
    assert await taken_by("engine-1") == {"engine-0"}
    assert await taken_by() == {"engine-0", "engine-1"}
