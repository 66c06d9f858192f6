"""The gateway's own metrics are what its router and its ledger say."""

from lltm_ray.gateway.own_metrics import own_metrics
from lltm_ray.records import EngineInfo, EngineState
from lltm_ray.routing.router import Router


def look(**ledger):
    router = Router(8, 5.0)
    model = 'quo"ted'
    info = EngineInfo(name="a", model=model, state=EngineState.READY, url="http://a", slots_total=3, server_pid=1)
    router.update([info])
    return {"router": router.snapshot(), "ledger": ledger}


def test_every_family_has_help_and_type_and_values_of_the_router():
    text = own_metrics(look())
    lines = text.splitlines()
    families = [line.split()[2] for line in lines if line.startswith("# TYPE")]
    assert len(families) == len(set(families)) == sum(line.startswith("# HELP") for line in lines)
    assert 'lltm_gateway_owned_slots{engine="a"} 3' in lines
    assert 'lltm_gateway_requests_total{model="quo\\"ted"} 0' in lines
    assert "ledger" not in text


def test_drift_is_told_for_each_engine_and_kind():
    counters = dict.fromkeys(("written", "dropped", "unbalanced", "recovered", "write_errors", "unprotected"), 2)
    lines = own_metrics(look(**counters, drift_tokens={"a": [0, -3]})).splitlines()
    assert 'lltm_ledger_drift_tokens{engine="a",kind="prompt"} 0' in lines
    assert 'lltm_ledger_drift_tokens{engine="a",kind="generated"} -3' in lines
    assert 'lltm_ledger_entries_total{event="dropped"} 2' in lines
