"""`python -m tests.peers.failover [--streams 200]`: an engine killed with SIGKILL in the middle of each batch.

Real servers behind the gateway, greedy streams of all three routes; every client's text, end and counts are compared
with the undisturbed run's, and the ledger with both and with the servers' own counters. Ends with 1 if anything is off.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import uvloop

from lltm_ray.routing.ledger import Ledger

sys.path.insert(0, str(Path(__file__).parents[1] / "process"))

from failover_harness import Pack, Tally, run, write_model
from gateway_harness import gateway

BATCH = 25


async def _measure(streams: int, folder: Path) -> tuple[Tally, dict[str, int]]:
    ledger = Ledger(folder / "account" / "ledger.sqlite")
    pack = Pack(write_model(folder / "tiny.gguf"), folder)
    try:
        infos = [engine.info for engine in pack.engines.values()]
        async with gateway(*infos, ledger=ledger) as gate:
            batches = -(-streams // BATCH)
            tally = await run(gate, pack, ledger, batches=batches, size=BATCH, say=lambda line: print(line, flush=True))
        return tally, ledger.counters
    finally:
        pack.close()
        ledger.close()


def main(argv: Sequence[str] | None = None) -> int:
    """Run, print the counts; 1 if a token was lost, doubled, wrong or miscounted."""
    parser = argparse.ArgumentParser(prog="python -m tests.peers.failover", description=__doc__)
    parser.add_argument("--streams", type=int, default=200, help=f"in batches of {BATCH} (default 200)")
    chosen = parser.parse_args(argv)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        tally, counters = uvloop.run(_measure(chosen.streams, Path(folder)))
    print(f"\n{time.monotonic() - began:.1f} s; the ledger: {counters}")
    for name, value in asdict(tally).items():
        print(f"{name:>15}  {value}")
    return 0 if tally.is_clean and not counters["unbalanced"] and not counters["dropped"] else 1


if __name__ == "__main__":
    sys.exit(main())
