"""What `status` shows of a fleet."""

from lltm_ray.cli import status
from lltm_ray.records import EngineInfo, EngineState, FleetStatus, GatewayInfo


def test_an_engine_that_was_drained_is_shown_as_closed(capsys):
    engines = tuple(EngineInfo(name=name, model="tiny", state=EngineState.READY) for name in ("e0", "e1"))
    gateways = tuple(
        GatewayInfo(name=name, url="u", state="ready", closed=closed) for name, closed in (("g0", ()), ("g1", ("e1",)))
    )
    status._print(FleetStatus(name="f", engines=engines, gateways=gateways))
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert "ready, closed" in lines["e1"]
    assert "closed" not in lines["e0"]
