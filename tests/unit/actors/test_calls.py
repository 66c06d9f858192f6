"""Calls from a driver to engines that are handles made here."""

from types import SimpleNamespace

import pytest

from lltm_ray.actors.calls import Calls
from lltm_ray.actors.fleet import Fleet
from lltm_ray.config import FleetConfig
from lltm_ray.errors import OverloadedError


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
