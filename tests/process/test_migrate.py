"""Conversations move between real servers: their next turns are the proof."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from migration_harness import BookRouter, Member, Talk, member

from lltm_ray.errors import ConfigError
from lltm_ray.gateway.migrate import Migrator
from lltm_ray.gateway.pool import UpstreamPool
from lltm_ray.gateway.slot_files import LocalFiles
from lltm_ray.llamacpp.slot_folder import SlotFolder
from lltm_ray.models.random_weights import RandomShape, write_random
from lltm_ray.records import EngineInfo

LENGTH = 600
WHILE_S = 100.0
"""Longer than any drain here takes that need not wait for a request."""


@pytest.fixture(scope="module")
def trio(tiny_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Member, ...]]:
    """Three engines, each with a folder of its own."""
    with ExitStack() as stack:
        folder = tmp_path_factory.mktemp("slots")
        yield tuple(stack.enter_context(member(name, tiny_gguf, folder / name)) for name in ("e0", "e1", "e2"))


@pytest.fixture
async def pool() -> AsyncIterator[UpstreamPool]:
    pool = UpstreamPool()
    yield pool
    pool.close()
    await asyncio.sleep(0)


def migrator_of(router: BookRouter, pool: UpstreamPool) -> Migrator:
    return Migrator(router, pool, LocalFiles())


async def started(router: BookRouter, engine: EngineInfo, *lengths: int) -> list[Talk]:
    talks = [Talk(router, engine, slot, length) for slot, length in enumerate(lengths)]
    for talk in talks:
        await talk.turn()
    return talks


async def test_the_next_turn_on_another_engine_finds_its_prefix_cached(trio, pool):
    e0, e1, _ = trio
    router = BookRouter(e0.info, e1.info)
    (talk,) = await started(router, e0.info, LENGTH)
    migrator = migrator_of(router, pool)
    report = await migrator.drain("e0", WHILE_S)
    assert (report.moved, report.left, report.running, report.failed) == (1, 0, 0, ())
    assert report.tokens == len(talk.tokens) - 2
    assert report.size_bytes > 1000
    assert router.place("e0", 0)[0] == "e1"
    turn = await talk.turn()
    assert turn.timings.cache_n >= 0.95 * report.tokens
    migrator.confirm("e1", router.place("e0", 0)[1], turn.timings.cache_n, report.tokens)
    assert migrator.snapshot()["verified"] == 1
    assert (e0.files, e1.files) == ([], [])
    assert router.claims == set()


async def test_a_moved_conversation_goes_on_as_it_would_have(trio, pool):
    e0, e1, e2 = trio
    router = BookRouter(e0.info, e1.info)
    (talk,) = await started(router, e0.info, LENGTH)
    (still,) = await started(BookRouter(e2.info), e2.info, LENGTH)
    await migrator_of(router, pool).drain("e0", WHILE_S)
    assert (await talk.turn(n_predict=24)).tokens == (await still.turn(n_predict=24)).tokens


async def test_engines_that_share_a_folder_need_no_copy(tiny_gguf, tmp_path, pool):
    with member("e0", tiny_gguf, tmp_path) as e0, member("e1", tiny_gguf, tmp_path) as e1:
        router = BookRouter(e0.info, e1.info)
        (talk,) = await started(router, e0.info, LENGTH)
        report = await migrator_of(router, pool).drain("e0", WHILE_S)
        assert (report.moved, e0.files) == (1, [])
        assert await talk.reused_ratio() >= 0.95


async def test_a_busy_engine_is_emptied_longest_first_and_the_running_one_when_it_ends(trio, pool):
    e0, e1, e2 = trio
    router = BookRouter(*(each.info for each in trio))
    lengths = (300, 900, 600, 400)
    talks = await started(router, e0.info, *lengths)
    talks[3].began.clear()
    running = asyncio.create_task(talks[3].turn(n_predict=1500))
    await talks[3].began.wait()
    report = await migrator_of(router, pool).drain("e0", WHILE_S)
    assert running.done(), "the drain ended before the request did"
    assert (report.moved, report.left, report.running, report.failed) == (4, 0, 0, ())
    assert [slot for _, slot, _, _ in router.moves] == [1, 2, 0, 3]
    assert "e0" in router.closed
    assert [await talk.reused_ratio() >= 0.95 for talk in talks] == [True] * 4
    assert (e0.files, e1.files, e2.files) == ([], [], [])
    assert router.claims == set()


async def test_what_still_runs_at_the_deadline_is_reported_and_not_disturbed(trio, pool):
    e0, e1, _ = trio
    router = BookRouter(e0.info, e1.info)
    talk = Talk(router, e0.info, 0, 50)
    running = asyncio.create_task(talk.turn(n_predict=3000))
    await talk.began.wait()
    report = await migrator_of(router, pool).drain("e0", 0.2)
    assert (report.moved, report.left, report.running) == (0, 0, 1)
    assert not running.done()
    assert len((await running).tokens) == 3000


async def test_a_conversation_waits_for_a_slot_elsewhere(trio, pool):
    e0, e1, _ = trio
    router = BookRouter(e0.info, e1.info)
    await started(router, e0.info, LENGTH)
    leases = [router.hold_slot("e1", slot) for slot in range(4)]
    drain = asyncio.create_task(migrator_of(router, pool).drain("e0", WHILE_S))
    await asyncio.sleep(0.2)
    assert not router.moves
    router.release(leases[2])
    assert (await drain).moved == 1
    assert router.place("e0", 0) == ("e1", 2)


async def test_a_target_that_was_killed_leaves_the_source_usable_and_no_files(trio, tiny_gguf, tmp_path, pool):
    e0 = trio[0]
    with member("dead", tiny_gguf, tmp_path / "dead") as dead:
        router = BookRouter(e0.info, dead.info)
        talks = await started(router, e0.info, LENGTH, LENGTH + 100)
        dead.kill()
        report = await migrator_of(router, pool).drain("e0", WHILE_S)
        assert report.took_s < WHILE_S / 2
        assert (report.moved, report.left) == (0, 2)
        assert [failure.slot for failure in report.failed] == [1, 0]
        assert "not restored" in report.failed[0].why
        assert (e0.files, dead.files) == ([], [])
        assert router.erasures == [("dead", 0)]
        assert router.claims == set()
        assert [await talk.reused_ratio() >= 0.95 for talk in talks] == [True] * 2


async def test_another_target_is_tried_when_the_first_is_dead(trio, tiny_gguf, tmp_path, pool):
    e0, e1, _ = trio
    with member("dead", tiny_gguf, tmp_path / "dead") as dead:
        router = BookRouter(e0.info, dead.info, e1.info)
        router.contents |= {("e1", slot): 1 for slot in range(4)}
        (talk,) = await started(router, e0.info, LENGTH)
        dead.kill()
        report = await migrator_of(router, pool).drain("e0", WHILE_S)
        assert (report.moved, report.failed, router.place("e0", 0)[0]) == (1, (), "e1")
        assert await talk.reused_ratio() >= 0.95


async def test_a_model_with_a_sliding_window_shows_by_itself_that_it_is_not_worth_moving(tmp_path, pool):
    model = tmp_path / "swa.gguf"
    write_random(model, RandomShape(architecture="cohere2", sliding_window=64, n_ctx=8192))
    with member("e0", model, tmp_path / "e0") as e0, member("e1", model, tmp_path / "e1") as e1:
        router = BookRouter(e0.info, e1.info)
        talks = await started(router, e0.info, LENGTH, LENGTH + 10, LENGTH + 20)
        migrator = migrator_of(router, pool)
        for _ in range(2):
            await migrator.relieve("e0", 0.01)
            _, slot, _, at = router.moves[-1]
            talks[slot].tokens = talks[slot].tokens[:-100]  # the client left something out of its history
            turn = await talks[slot].turn()
            assert turn.timings.cache_n < 0.25 * len(talks[slot].tokens)
            migrator.confirm("e1", at, turn.timings.cache_n, LENGTH - 100)
        assert migrator.is_off("tiny")
        report = await migrator.drain("e0", WHILE_S)
        assert (report.moved, report.left) == (0, 1)
        assert await talks[2].reused_ratio() >= 0.95


class TruncatingFiles(LocalFiles):
    """A disk that loses the end of a file."""

    async def carry(self, source: EngineInfo, target: EngineInfo, filename: str) -> None:
        path = SlotFolder(source.slot_folder).path_of(filename)
        os.truncate(path, path.stat().st_size // 2)
        await super().carry(source, target, filename)


async def test_a_damaged_file_is_not_taken_for_a_conversation(trio, pool):
    e0, e1, _ = trio
    router = BookRouter(e0.info, e1.info)
    (talk,) = await started(router, e0.info, LENGTH)
    report = await Migrator(router, pool, TruncatingFiles()).drain("e0", WHILE_S)
    assert (report.moved, report.left, len(report.failed)) == (0, 1, 1)
    assert router.erasures == [("e1", 0)]
    assert (e0.files, e1.files) == ([], [])
    assert await talk.reused_ratio() >= 0.95


async def test_a_full_disk_on_the_way_counts_as_a_failure_and_leaves_nothing(trio, pool):
    class FullDisk(LocalFiles):
        async def carry(self, source: EngineInfo, target: EngineInfo, filename: str) -> None:
            await super().carry(source, target, filename)
            raise OSError(28, "No space left on device")

    e0, e1, _ = trio
    router = BookRouter(e0.info, e1.info)
    (talk,) = await started(router, e0.info, LENGTH)
    migrator = Migrator(router, pool, FullDisk())
    report = await migrator.drain("e0", WHILE_S)
    assert "No space left on device" in report.failed[0].why
    assert (e0.files, e1.files, router.erasures) == ([], [], [])
    assert migrator.snapshot()["failed"] == 1
    assert await talk.reused_ratio() >= 0.95


async def test_relief_moves_the_coldest_share_and_keeps_the_engine_open(trio, pool):
    e0, e1, _ = trio
    router = BookRouter(e0.info, e1.info)
    talks = await started(router, e0.info, 500, 500, 500, 500)
    await talks[0].turn()  # now 1 is the coldest
    report = await migrator_of(router, pool).relieve("e0", 0.5)
    assert (report.moved, report.left) == (2, 2)
    assert [slot for _, slot, _, _ in router.moves] == [1, 2]
    assert router.closed == set()
    assert [await talk.reused_ratio() >= 0.95 for talk in talks] == [True] * 4


async def test_an_engine_that_is_not_there_is_named(trio, pool):
    router = BookRouter(trio[0].info)
    with pytest.raises(ConfigError, match=r"engine='e9': no such engine; known are e0"):
        await migrator_of(router, pool).drain("e9", 1.0)
    assert router.closed == set()
