"""By which rule the server of an engine takes its slots."""

from dataclasses import replace

import pytest

from lltm_ray.actors.launch import EngineSpec, plan_launch
from lltm_ray.config import EngineConfig, FleetConfig, GatewayConfig

OURS, LLAMA_CPP = 0.9, 0.1


def similarity(monkeypatch, tmp_path, gateway, *, exposed=False, **engine):
    """The ratio that routing is told; the server's own flag must be the same."""
    monkeypatch.setenv("LLTM_RAY_CACHE", str(tmp_path))
    fleet = FleetConfig(model="tiny", llama_server="embedded", name="f", gateway=gateway)
    fleet = replace(fleet, engine=EngineConfig(n_ctx=512, n_parallel=1, **engine))
    where = {"run_id": "r1", "share": 0.0, "engines_on_node": 1, "gateway_node_id": None}
    planned = plan_launch(EngineSpec(name="e0", fleet=fleet, exposed=exposed, **where), host="127.0.0.1")
    argv = planned.server.argv(0)
    planned.slots.remove()
    assert float(argv[argv.index("--slot-prompt-similarity") + 1]) == planned.slot_similarity_ratio
    return planned.slot_similarity_ratio


@pytest.mark.parametrize(
    ("gateway", "exposed", "wanted"),
    [
        (GatewayConfig(), False, OURS),
        (GatewayConfig(policy="least-loaded"), False, LLAMA_CPP),
        (None, True, OURS),
        (None, False, LLAMA_CPP),
    ],
)
def test_only_where_requests_name_slots_is_the_rule_ours(monkeypatch, tmp_path, gateway, exposed, wanted):
    assert similarity(monkeypatch, tmp_path, gateway, exposed=exposed) == wanted


def test_without_a_cache_in_memory_the_rule_is_llama_cpps_and_what_somebody_chose_stays(monkeypatch, tmp_path):
    assert similarity(monkeypatch, tmp_path, GatewayConfig(), cache_ram_mib=0) == LLAMA_CPP
    for chosen in (0.0, 0.5):
        assert similarity(monkeypatch, tmp_path, GatewayConfig(), slot_prompt_similarity=chosen) == chosen
