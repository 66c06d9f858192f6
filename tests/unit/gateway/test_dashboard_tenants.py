"""Tenants share the dashboard's figures, and see no other's words."""

from types import SimpleNamespace
from typing import Any

import pytest

from lltm_ray.gateway.dashboard.routes import TIMELINE_PATH, DashboardRoutes

SAID = "the-heron-at-dusk"
CONTENT = ("gen_ai.input.messages", "gen_ai.output.messages", "gen_ai.system_instructions", "gen_ai.tool.definitions")


class Telemetry:
    async def timeline(self, request_id: str) -> dict[str, Any]:
        attributes = dict.fromkeys(CONTENT, SAID) | {"gen_ai.usage.input_tokens": 3}
        return {
            "request": {"request_id": request_id, "tenant": "ours", "content": SAID, "status": 200},
            "joules": 1.0,
            "spans": [{"name": "chat", "attributes": attributes}, {"name": "route", "attributes": {}}],
        }


async def ask(tenant: str) -> dict[str, Any]:
    replies: list[dict[str, Any]] = []

    async def reply_json(value: dict[str, Any], status: int = 200) -> None:
        assert status == 200
        replies.append(value)

    routes = DashboardRoutes(Telemetry())  # type: ignore[arg-type]
    request = SimpleNamespace(path=f"{TIMELINE_PATH}/r-1", tenant=tenant, reply_json=reply_json)
    await routes.timeline_path(request)  # type: ignore[arg-type]
    return replies[0]


async def test_a_tenant_sees_the_captured_words_of_its_own_request() -> None:
    told = await ask("ours")
    assert told["request"]["content"] == SAID
    assert set(CONTENT) <= set(told["spans"][0]["attributes"])


@pytest.mark.parametrize("tenant", ["theirs", ""])
async def test_another_tenant_sees_its_figures_only(tenant: str) -> None:
    told = await ask(tenant)
    assert SAID not in repr(told)
    assert (told["request"]["status"], told["joules"]) == (200, 1.0)
    assert told["spans"][0]["attributes"] == {"gen_ai.usage.input_tokens": 3}
    assert told["spans"][1] == {"name": "route", "attributes": {}}
