"""lltm_ray as a peer, in a process of its own.

`python ours.py gateway PORT SLOTS POLICY SIMILARITY URL...`: the gateway alone, as its actor runs it, before engines
that are not ours and run with this `--slot-prompt-similarity`.
`python ours.py fleet MODEL ENGINES ENGINE_JSON`: a whole fleet through the public face. Tells one JSON line when it
serves and ends with its stdin: `{"url", "pid", "engines": [{"url", "key", "pid"}]}`.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import uvloop

from lltm_ray.config import SIMILARITY_RATIO, GatewayConfig
from lltm_ray.gateway.app import GatewayApp
from lltm_ray.gateway.auth import ApiKeys
from lltm_ray.gateway.server import serve
from lltm_ray.records import EngineInfo, EngineState, FleetStatus
from lltm_ray.routing.ledger import Ledger
from lltm_ray.routing.router import Router


def engine_info(number: int, url: str, slots: int, similarity: float = SIMILARITY_RATIO) -> EngineInfo:
    """An engine as the directory would show it."""
    return EngineInfo(
        name=f"engine-{number}",
        model="bench",
        state=EngineState.READY,
        url=url,
        api_key="unused",
        slots_total=slots,
        cache_ram_tokens=100_000,
        slot_similarity_ratio=similarity,
        server_pid=1,
    )


async def gateway(port: int, slots: int, policy: str, similarity: float, urls: list[str]) -> None:
    """Serve until killed, with all that a fleet's front has on by default, as the ledger."""
    config = GatewayConfig(port=port, policy=policy)
    router = Router(config.queue_limit, config.queue_timeout_s, policy=config.policy)
    router.update([engine_info(number, url, slots, similarity) for number, url in enumerate(urls)])
    status = FleetStatus(name="bench", engines=router.engines())
    with tempfile.TemporaryDirectory(prefix="bench-ledger-") as folder:
        ledger = Ledger(Path(folder) / "ledger.sqlite", keep_requests=config.ledger_requests)
        app = GatewayApp(router=router, config=config, keys=ApiKeys(), status=lambda: status, ledger=ledger)
        await serve(app, config, ready=lambda _: None)


def fleet(model: str, engines: int, engine: dict[str, object]) -> None:
    """Start it, tell where it is, wait for the end of stdin, stop it."""
    import lltm_ray

    settings = {"name": "bench", "served_name": "bench", "gpu_share": 0.0, "cpu_share": 1 / (2 * engines)}
    with lltm_ray.Cluster.start(
        model=model, engines=engines, engine=engine, gateway={"port": 0}, drain_timeout_s=0.0, **settings
    ) as cluster:
        status = cluster.status()
        shown = [{"url": each.url, "key": each.api_key, "pid": each.server_pid} for each in status.engines]
        told = {"url": cluster.endpoint, "pid": status.gateways[0].pid, "engines": shown}
        sys.stdout.write(json.dumps(told) + "\n")
        sys.stdout.flush()
        sys.stdin.read()


if __name__ == "__main__":
    if sys.argv[1] == "gateway":
        uvloop.run(gateway(int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], float(sys.argv[5]), sys.argv[6:]))
    else:
        fleet(sys.argv[2], int(sys.argv[3]), json.loads(sys.argv[4]))
