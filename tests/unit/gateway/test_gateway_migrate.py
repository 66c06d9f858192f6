"""What a migration decides; conversations that really move are in tests/process."""

import json
import logging

import pytest

from lltm_ray.errors import ConfigError
from lltm_ray.gateway.accounting import RequestRecord
from lltm_ray.gateway.drain_routes import DrainRoutes
from lltm_ray.gateway.migrate import Load, Migrator, plan_relief
from lltm_ray.gateway.moves import coldest
from lltm_ray.gateway.pool import UpstreamPool
from lltm_ray.gateway.request import Request
from lltm_ray.gateway.slot_files import LocalFiles
from lltm_ray.records import EngineInfo, EngineState


class Held:
    def __init__(self, slot, tokens):
        self.slot, self.tokens = slot, tokens


class StillRouter:
    """Engines that hold what they hold and have no free slot anywhere."""

    def __init__(self, *engines, held=()):
        self.known, self.contents, self.closed = engines, list(held), set()

    def engines(self, model=None):
        return tuple(engine for engine in self.known if model in (None, engine.model))

    def close_engine(self, name, *, is_leaving=False):
        del is_leaving
        self.closed.add(name)

    def unserved(self, name):
        return "" if {engine.name for engine in self.known} - self.closed else f"nobody but {name}"

    def open_engine(self, name):
        self.closed.discard(name)

    def in_flight(self, _name):
        return 0

    def held(self, _name):
        return self.contents

    def claim_slot(self, _model, *, exclude, tokens):
        del exclude, tokens


def engine(name, *, model="tiny", folder="/slots", state=EngineState.READY):
    return EngineInfo(name=name, model=model, state=state, url="http://127.0.0.1:1", slots_total=4, slot_folder=folder)


def migrator_of(*engines, held=()):
    router = StillRouter(*engines, held=held)
    return Migrator(router, UpstreamPool(), LocalFiles()), router


@pytest.mark.parametrize(
    ("others", "why"),
    [
        ([], "no other engine of model 'tiny' can take it"),
        ([engine("e1", model="big")], "no other engine"),
        ([engine("e1", folder="")], "no other engine"),
        ([engine("e1", state=EngineState.FAILED)], "no other engine"),
    ],
)
async def test_a_drain_that_nobody_can_take_over_ends_at_once_with_the_reason(others, why):
    migrator, router = migrator_of(engine("e0"), *others, held=[Held(0, 10), Held(2, 30)])
    report = await migrator.drain("e0", 60.0)
    assert report.took_s < 1
    assert [(each.slot, each.tokens) for each in report.failed] == [(2, 30), (0, 10)]
    assert why in report.failed[0].why
    assert (report.moved, report.left, router.closed) == (0, 2, {"e0"})


async def test_an_engine_without_a_folder_says_so():
    migrator, _ = migrator_of(engine("e0", folder=""), engine("e1"), held=[Held(0, 10)])
    report = await migrator.drain("e0", 60.0)
    assert report.failed[0].why == "the engine has no folder for slots"


async def test_an_engine_that_may_come_up_is_waited_for_until_the_deadline():
    migrator, _ = migrator_of(engine("e0"), engine("e1", state=EngineState.STARTING), held=[Held(0, 10)])
    report = await migrator.drain("e0", 0.2)
    assert report.took_s >= 0.2
    assert (report.failed, report.left) == ((), 1)


def restored(migrator, slot):
    migrator._fresh["e1", slot] = "tiny"


async def test_two_useless_restores_in_a_row_end_migration_for_that_model_only(caplog):
    migrator, _ = migrator_of(engine("e0"), engine("e1"), held=[Held(0, 10)])
    with caplog.at_level(logging.WARNING):
        for slot, cache_n in enumerate((0, 25, 0, 24, 0)):
            assert not migrator.is_off("tiny") or slot == 4
            restored(migrator, slot)
            migrator.confirm("e1", slot, cache_n, 100)
    assert (migrator.is_off("tiny"), migrator.is_off("other")) == (True, False)
    assert [record.message for record in caplog.records if "does not reuse" in record.message] == [
        "model tiny does not reuse restored slots: its conversations are not moved any more"
    ]
    assert migrator.snapshot()["off"] == ["tiny"]
    report = await migrator.drain("e0", 60.0)
    assert "does not reuse restored slots" in report.failed[0].why


def test_requests_that_prove_nothing_are_no_verdict():
    migrator, _ = migrator_of(engine("e0"))
    for _ in range(5):
        migrator.confirm("e1", 0, 0, 100)  # nothing was restored there
        restored(migrator, 1)
        migrator.confirm("e1", 1, 0, 0)  # another conversation's request
    restored(migrator, 2)
    migrator.confirm("e1", 2, 50, 100)
    migrator.confirm("e1", 2, 0, 100)  # the second request after the restore
    assert not migrator.is_off("tiny")
    assert (migrator.snapshot()["verified"], migrator.snapshot()["unconfirmed"]) == (1, 0)


async def test_restores_on_engines_that_are_gone_are_forgotten():
    migrator, _ = migrator_of(engine("e0"))
    restored(migrator, 0)
    await migrator.drain("e0", 0.0)
    assert migrator.snapshot()["unconfirmed"] == 0


@pytest.mark.parametrize(
    ("share", "slots"), [(0.0, []), (0.01, [0]), (0.25, [0]), (0.5, [0, 1]), (0.6, [0, 1]), (1.0, [0, 1, 2, 3])]
)
def test_the_coldest_share_is_taken(share, slots):
    held = [Held(0, 100), Held(1, 100), Held(2, 100), Held(3, 100)]
    assert [each.slot for each in coldest(held, share)] == slots


def test_one_hot_engine_among_cool_ones_is_relieved_to_the_mean():
    loads = {"hot": Load(busy=4, slots=4), "a": Load(busy=1, slots=4), "b": Load(busy=1, slots=4)}
    name, share = plan_relief(loads)
    assert name == "hot"
    assert share == pytest.approx(0.5)


@pytest.mark.parametrize(
    "busy", [{}, {"a": 4}, {"a": 4, "b": 4}, {"a": 4, "b": 3, "c": 2}, {"a": 2, "b": 0}, {"a": 0, "b": 0}]
)
def test_without_a_contrast_nobody_is_relieved(busy):
    assert plan_relief({name: Load(busy=count, slots=4) for name, count in busy.items()}) is None


async def asked(path, query, *engines, held=()):
    sent = []

    async def send(message):
        sent.append(message)

    migrator, router = migrator_of(*engines, held=held)
    request = Request(
        method="POST",
        path=path,
        query=query,
        headers=[],
        receive=None,
        send=send,
        link=None,
        id="1",
        arrived_at=0.0,
        record=RequestRecord(request_id="1", route=path),
    )
    await DrainRoutes(migrator).build()["POST", path](request)
    return sent[0]["status"], json.loads(b"".join(message.get("body", b"") for message in sent)), router


async def test_the_drain_route_answers_with_the_report():
    status, body, router = await asked("/lltm/drain", b"engine=e0&timeout_s=1", engine("e0"), held=[Held(1, 7)])
    assert (status, body["engine"], body["moved"], body["left"]) == (200, "e0", 0, 1)
    assert body["failed"][0]["slot"] == 1
    assert body["warning"] == "nobody but e0"
    assert router.closed == {"e0"}


async def test_the_undrain_route_opens_the_engine():
    status, body, router = await asked("/lltm/undrain", b"engine=e0", engine("e0"))
    assert (status, body, router.closed) == (200, {"engine": "e0", "is_closed": False}, set())


@pytest.mark.parametrize(
    ("query", "why"),
    [
        (b"", "name one with"),
        (b"engine=", "name one with"),
        (b"engine=e9", "known are e0"),
        (b"engine=e0&timeout_s=soon", "must be seconds"),
        (b"engine=e0&timeout_s=-1", "must be seconds"),
        (b"engine=e0&timeout_s=nan", "must be seconds"),
        (b"engine=e0&timeout_s=inf", "must be seconds"),
    ],
)
async def test_a_drain_that_makes_no_sense_is_refused_with_the_remedy(query, why):
    with pytest.raises(ConfigError, match=why):
        await asked("/lltm/drain", query, engine("e0"))
