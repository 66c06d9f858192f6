"""Engines die in the middle of batches of streams: no client sees it, and every token is accounted for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from failover_harness import Pack, run, write_model
from gateway_harness import gateway

from lltm_ray.routing.ledger import Ledger


@pytest.fixture
def pack(tmp_path: Path) -> Iterator[Pack]:
    made = Pack(write_model(tmp_path / "tiny.gguf"), tmp_path)
    yield made
    made.close()


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    made = Ledger(tmp_path / "account" / "ledger.sqlite")
    yield made
    made.close()


async def test_an_engine_that_is_killed_in_the_middle_of_a_batch_costs_no_client_a_token(pack, ledger):
    said: list[str] = []
    async with gateway(*(engine.info for engine in pack.engines.values()), ledger=ledger) as gate:
        tally = await run(gate, pack, ledger, batches=3, size=25, say=said.append)
    assert tally.is_clean, "\n".join(said)
    assert tally.untouched + tally.ties <= 1, "\n".join(said)
    assert (tally.kills, tally.streams >= 70, tally.continued >= 6) == (3, True, True), tally
    counters = ledger.counters
    assert (counters["unbalanced"], counters["dropped"], counters["unprotected"], counters["in_flight"]) == (0, 0, 0, 0)
