"""`GET /health`: whether a balancer should send requests here."""

import json
from collections.abc import Sequence
from typing import Any

import pytest

from lltm_ray.config import GatewayConfig
from lltm_ray.gateway.app import GatewayApp
from lltm_ray.gateway.auth import ApiKeys
from lltm_ray.records import EngineInfo, EngineState, FleetStatus, ModelInfo, ModelState
from lltm_ray.routing.router import Router


def engine(name: str, model: str = "tiny", state: EngineState = EngineState.READY) -> EngineInfo:
    return EngineInfo(name=name, model=model, state=state, slots_total=2)


async def health(
    engines: Sequence[EngineInfo], models: Sequence[ModelInfo] = (), *, drained: Sequence[str] = (), leaving: str = ""
) -> tuple[int, Any]:
    """Status and body."""
    router, sent = Router(8, 1.0), []
    router.update(engines, models)
    for name in drained:
        router.close_engine(name, is_leaving=name == leaving)
    app = GatewayApp(router=router, config=GatewayConfig(), keys=ApiKeys(), status=lambda: FleetStatus(name="f"))
    scope = {"type": "http", "method": "GET", "path": "/health", "root_path": "", "query_string": b"", "headers": []}

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "http.request", "body": b""}

    await app(scope, receive, send)
    return sent[0]["status"], json.loads(b"".join(each.get("body", b"") for each in sent[1:]))


async def test_a_fleet_all_of_whose_engines_were_drained_is_unhealthy_and_names_none_to_whom_has_no_key() -> None:
    both = [engine("e0"), engine("e1")]
    assert await health(both, drained=["e0"]) == (200, {"status": "ok"})
    error = {"message": "All engines were drained", "type": "unavailable_error", "code": 503}
    assert await health(both, drained=["e0", "e1"]) == (503, {"error": error})


async def test_one_served_model_of_two_is_enough_and_an_engine_that_is_replaced_is_no_reason() -> None:
    assert (await health([engine("e0"), engine("e1", "other")], drained=["e0"]))[0] == 200
    assert (await health([engine("e0")], drained=["e0"], leaving="e0"))[0] == 200


@pytest.mark.parametrize(
    ("state", "least", "is_elastic", "status"),
    [
        (ModelState.COLD, 0, True, 200),
        (ModelState.STARTING, 0, True, 200),
        (ModelState.FAILED, 0, True, 503),
        (ModelState.STARTING, 1, True, 503),
        (ModelState.STARTING, 1, False, 503),
    ],
)
async def test_a_fleet_scaled_to_zero_is_healthy_for_a_request_starts_an_engine(
    state: ModelState, least: int, is_elastic: bool, status: int
) -> None:
    info = ModelInfo(name="tiny", state=state, min_engines=least, is_elastic=is_elastic)
    starting = [engine("e0", state=EngineState.STARTING)] if state is ModelState.STARTING else []
    found, told = await health(starting, [info])
    assert found == status
    assert status == 200 or told["error"]["message"] == "Loading model"
