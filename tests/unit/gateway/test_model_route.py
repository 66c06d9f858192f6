"""`GET /v1/models/NAME`: one model as it is listed; names may have slashes, as the hub's have."""

import json
from typing import Any

import pytest

from lltm_ray.config import GatewayConfig
from lltm_ray.gateway.app import GatewayApp
from lltm_ray.gateway.auth import ApiKeys
from lltm_ray.records import Adapter, EngineInfo, EngineState, FleetStatus
from lltm_ray.routing.router import Router

NAMES = ("tiny", "owner/model-GGUF", "owner/model-GGUF:ada")


async def ask(path: str, *, names: tuple[str, ...] = NAMES[:2], keys: tuple[str, ...] = (), root: str = "") -> Any:
    """Status, body and the record's route; no engine is ready, so that none is asked."""
    router, sent = Router(8, 1.0), []
    adapters = (Adapter(name="ada", scale=1.0),)
    router.update(
        EngineInfo(name=f"e{at}", model=name, state=EngineState.STARTING, adapters=adapters if "/" in name else ())
        for at, name in enumerate(names)
    )
    app = GatewayApp(router=router, config=GatewayConfig(), keys=ApiKeys(keys), status=lambda: FleetStatus(name="f"))
    scope = {"type": "http", "method": "GET", "path": root + path, "root_path": root, "query_string": b""}

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "http.request", "body": b""}

    await app(scope | {"headers": []}, receive, send)
    (record,) = app.records
    return sent[0]["status"], json.loads(b"".join(each.get("body", b"") for each in sent[1:])), record.route


@pytest.mark.parametrize("start", ["/v1/models", "/models"])
@pytest.mark.parametrize("name", NAMES)
async def test_a_model_is_told_as_it_is_listed_and_no_name_is_kept_as_a_route(start: str, name: str) -> None:
    listed = {each["id"]: each for each in (await ask(start))[1]["data"]}
    assert sorted(listed) == sorted(NAMES)
    assert await ask(f"{start}/{name}") == (200, listed[name], "/v1/models/{model}")


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("gone", "this fleet serves tiny, owner/model-GGUF"),
        ("owner", "this fleet serves tiny, owner/model-GGUF"),
        ("tiny/", "this fleet serves tiny, owner/model-GGUF"),
        ("tiny:ada", "'tiny' has no adapters"),
    ],
)
async def test_a_name_that_nobody_serves_is_not_found_with_those_that_are_served(name: str, why: str) -> None:
    status, told, _ = await ask(f"/v1/models/{name}")
    assert status == 404
    assert told["error"] == {"message": f"model {name!r} not found: {why}", "type": "model_not_found", "code": 404}


async def test_an_empty_name_is_no_route_an_empty_fleet_is_not_ready_and_keys_are_asked_for() -> None:
    status, told, route = await ask("/v1/models/")
    assert (status, told["error"]["type"], route) == (404, "not_found_error", "other")
    assert (await ask("/v1/models/tiny", names=()))[0] == 503
    assert (await ask("/v1/models/tiny", keys=("k",)))[0] == 401


@pytest.mark.parametrize("path", ["/health", "/v1/models", "/v1/models/tiny"])
async def test_below_a_host_with_a_prefix_of_its_own_the_routes_are_the_same(path: str) -> None:
    assert await ask(path, root="/v1") == await ask(path)
