"""Conversations outlive the last engine of their model: the next turn on another server is the proof."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest
from gateway_harness import Gateway, gateway, until
from test_gateway_drain import Talk

from lltm_ray._shelf import Parting, SavedSlot
from lltm_ray.gateway import shelf as shelf_module
from lltm_ray.gateway.slot_files import LocalFiles
from lltm_ray.llamacpp.slot_folder import new_name
from lltm_ray.records import EngineInfo

SALT = b"s" * 32
ALIKE = 20
"""Tokens that any two conversations here begin with: the engines live through all tests."""


@pytest.fixture(autouse=True)
def restores_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    """However slow this machine's disk is, and however quick its small model."""
    for name in ("_OVERHEAD_S", "_PRIOR_BYTE_S", "_PRIOR_AFAR_BYTE_S", "_WEIGHT"):
        monkeypatch.setattr(shelf_module, name, 0.0)


class HeldFiles(LocalFiles):
    """What arrives waits until it is let go."""

    def __init__(self) -> None:
        self.arrived = 0
        self.go = asyncio.Event()
        self.go.set()

    async def carry(self, source: EngineInfo, target: EngineInfo, filename: str, copy: str = "") -> None:
        await super().carry(source, target, filename, copy)
        self.arrived += 1
        await self.go.wait()

    async def until_arrived(self, count: int) -> None:
        async with asyncio.timeout(60):
            while self.arrived < count:
                await asyncio.sleep(0.005)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "shelf"
    path.mkdir(mode=0o700)
    return path


async def put_away(gate: Gateway, folder: Path, limit_bytes: int = 2**30) -> tuple[SavedSlot, ...]:
    gate.app.shelf.update((), SALT)
    order = Parting(engine="e0", folder=str(folder), limit_bytes=limit_bytes, deadline_s=60.0)
    return await gate.app.shelf.put_away(order)


def wake(gate: Gateway, engine: EngineInfo, files: tuple[SavedSlot, ...]) -> list[str]:
    """The first engine is gone and another one is there; the names of files that are used up."""
    used: list[str] = []
    gate.app.shelf.used = used.append
    gate.router.update((engine,))
    gate.app.shelf.update(files, SALT)
    return used


async def talked(gate: Gateway, *numbers: int) -> list[Talk]:
    talks = [Talk(gate, number) for number in numbers]
    for talk in talks:
        await talk.turn()
    return talks


async def test_the_next_turn_after_a_cold_start_finds_its_prefix_cached_and_its_file_is_used_up(heirs, folder):
    e0, e1 = heirs
    async with gateway(e0) as gate:
        talks = await talked(gate, 1, 2)
        files = await put_away(gate, folder)
        assert sorted(os.listdir(folder)) == sorted(each.name for each in files)
        assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}
        assert os.listdir(e0.slot_folder) == []
        used = wake(gate, e1, files)
        for talk in talks:
            before = talk.tokens
            timings = await talk.turn()
            assert timings["cache_n"] >= 0.95 * (before - 1), (timings, before)
        assert sorted(used) == sorted(each.name for each in files)
        assert os.listdir(e1.slot_folder) == []
        assert gate.app.shelf.snapshot() == {"saved": 2, "restored": 2, "failed": 0}
        assert gate.app.migrator.snapshot()["verified"] == 2


async def test_what_went_on_from_a_restored_slot_says_what_it_would_have_said(heirs, folder):
    e0, e1 = heirs
    async with gateway(e0) as gate:
        (talk,) = await talked(gate, 3)
        files = await put_away(gate, folder)
        twin = Talk(gate, 3)
        twin.messages = list(talk.messages)
        await talk.turn(max_tokens=40)
        wake(gate, e1, files)
        assert (await twin.turn(max_tokens=40))["cache_n"] > 0
        assert twin.messages == talk.messages


async def test_another_prompt_takes_nothing_and_a_shared_beginning_is_left_to_its_owner(heirs, folder):
    e0, e1 = heirs
    async with gateway(e0) as gate:
        (talk,) = await talked(gate, 4)
        (file,) = await put_away(gate, folder)
        used = wake(gate, e1, (file,))
        stranger = Talk(gate, 5)
        assert (await stranger.turn())["cache_n"] < ALIKE
        cousin = Talk(gate, 4)
        text = cousin.messages[0]["content"]
        cousin.messages[0]["content"] = text[: 2 * len(text) // 3] + "Or so they say."
        assert (await cousin.turn())["cache_n"] >= 100
        assert (used, os.listdir(folder)) == ([], [file.name])
        before = talk.tokens
        assert (await talk.turn())["cache_n"] >= 0.95 * (before - 1)
        assert used == [file.name]


async def test_two_that_share_a_beginning_at_once_leave_it_to_its_owner(heirs, folder):
    e0, e1 = heirs
    files = HeldFiles()
    async with gateway(e0, files=files) as gate:
        (talk,) = await talked(gate, 15)
        (file,) = await put_away(gate, folder)
        used = wake(gate, e1, (file,))
        cousins = [Talk(gate, 15), Talk(gate, 15)]
        for number, cousin in enumerate(cousins):
            text = cousin.messages[0]["content"]
            cousin.messages[0]["content"] = text[: 2 * len(text) // 3] + f"Or so {number} of them say."
        files.arrived = 0
        files.go.clear()
        turns = [asyncio.create_task(cousin.turn()) for cousin in cousins]
        await files.until_arrived(2)
        files.go.set()
        assert all(timings["cache_n"] >= 100 for timings in await asyncio.gather(*turns))
        assert (used, os.listdir(folder)) == ([], [file.name])
        before = talk.tokens
        assert (await talk.turn())["cache_n"] >= 0.95 * (before - 1)
        assert (used, os.listdir(e1.slot_folder)) == ([file.name], [])


async def test_a_client_that_leaves_during_a_restore_can_come_back_for_it(heirs, folder):
    e0, e1 = heirs
    files = HeldFiles()
    async with gateway(e0, files=files) as gate:
        (talk,) = await talked(gate, 16)
        (file,) = await put_away(gate, folder)
        used = wake(gate, e1, (file,))
        files.arrived = 0
        files.go.clear()
        leaving = asyncio.create_task(talk.turn())
        await files.until_arrived(1)
        leaving.cancel()
        await until(lambda: not gate.claims()["e1"])
        files.go.set()
        assert (used, os.listdir(folder), os.listdir(e1.slot_folder)) == ([], [file.name], [])
        before = talk.tokens
        assert (await talk.turn())["cache_n"] >= 0.95 * (before - 1)
        assert used == [file.name]


async def test_a_file_that_is_there_already_stays_and_one_that_is_missing_is_told_apart(heirs, tmp_path):
    e0, _ = heirs
    name, here, there = new_name(), tmp_path / "here", tmp_path / "there"
    for each in (here, there):
        each.mkdir()
    there.joinpath(name).write_bytes(b"theirs")
    source, target = e0.with_(slot_folder=str(here)), e0.with_(slot_folder=str(there))
    with pytest.raises(FileNotFoundError):
        await LocalFiles().carry(source, target, name, new_name())
    here.joinpath(name).write_bytes(b"ours")
    with pytest.raises(FileExistsError):
        await LocalFiles().carry(source, target, name)
    assert there.joinpath(name).read_bytes() == b"theirs"
    there.joinpath(name).unlink()
    there.rmdir()
    with pytest.raises(OSError, match="is gone") as caught:
        await LocalFiles().carry(source, target, name)
    assert not isinstance(caught.value, FileNotFoundError), "the file is not lost"


@pytest.mark.parametrize(("damage", "number"), [("cut", 10), ("wild", 11), ("gone", 12), ("empty", 13)])
async def test_a_file_that_was_changed_costs_time_and_nothing_else(heirs, folder, damage, number):
    e0, e1 = heirs
    async with gateway(e0) as gate:
        (talk,) = await talked(gate, number)
        (file,) = await put_away(gate, folder)
        path = folder / file.name
        data = path.read_bytes()
        if damage == "gone":
            path.unlink()
        else:
            other = {"cut": data[: len(data) // 2], "wild": os.urandom(len(data)), "empty": b""}
            path.write_bytes(other[damage])
        used = wake(gate, e1, (file,))
        before = talk.tokens
        timings = await talk.turn()
        assert timings["cache_n"] + timings["prompt_n"] >= before - 1
        assert timings["cache_n"] < ALIKE
        assert used == [file.name]
        assert gate.app.shelf.snapshot()["failed"] == 1
        assert (await talk.turn())["cache_n"] > 0, "the engine goes on"


async def test_slots_of_another_model_file_are_not_restored(heirs, folder):
    e0, e1 = heirs
    async with gateway(e0) as gate:
        (talk,) = await talked(gate, 7)
        files = await put_away(gate, folder)
        used = wake(gate, e1.with_(slot_seal="changed"), files)
        assert (await talk.turn())["cache_n"] < ALIKE
        assert used == []


async def test_a_request_that_wants_no_cache_takes_nothing(heirs, folder):
    e0, e1 = heirs
    async with gateway(e0) as gate:
        (talk,) = await talked(gate, 14)
        files = await put_away(gate, folder)
        used = wake(gate, e1, files)
        body = {"messages": talk.messages, "max_tokens": 4, "cache_prompt": False}
        async with gate.http.post(f"{gate.url}/v1/chat/completions", json=body) as reply:
            assert (await reply.json())["timings"]["cache_n"] == 0
        assert (used, gate.app.shelf.snapshot()["restored"]) == ([], 0)


async def test_what_is_computed_quicker_is_not_restored(heirs, folder, monkeypatch):
    e0, e1 = heirs
    async with gateway(e0) as gate:
        (talk,) = await talked(gate, 8)
        files = await put_away(gate, folder)
        wake(gate, e1, files)
        monkeypatch.setattr(shelf_module, "_OVERHEAD_S", 3600.0)
        assert (await talk.turn())["cache_n"] < ALIKE
        assert gate.app.shelf.snapshot()["restored"] == 0


async def test_one_slow_restore_does_not_forbid_all_others_for_ever(heirs, folder, monkeypatch):
    e0, e1 = heirs
    monkeypatch.undo()
    monkeypatch.setattr(shelf_module, "_PRIOR_BYTE_S", 1e-12)
    async with gateway(e0) as gate:
        shelf = gate.app.shelf
        (talk,) = await talked(gate, 17)
        (file,) = await put_away(gate, folder)
        wake(gate, e1, (file,))
        for _ in range(50):
            shelf._learn(file, False, 3600.0)
        assert 2e-12 < shelf._byte_s[False] <= 8e-12
        monkeypatch.setattr(shelf_module, "_OVERHEAD_S", 3600.0)
        assert (await talk.turn())["cache_n"] < ALIKE
        assert shelf._byte_s[False] < 7.9e-12, "a refusal brings it nearer to the prior"


async def test_short_ones_stay_and_beyond_the_bound_the_latest_are_saved(heirs, folder):
    e0, _ = heirs
    async with gateway(e0) as gate:
        short = Talk(gate, 0)
        short.messages[0]["content"] = "hi"
        await short.turn(max_tokens=4)
        await talked(gate, 1, 2)
        files = await put_away(gate, folder, limit_bytes=1)
        assert len(files) == 1
        saved = await put_away(gate, folder)
        assert len(saved) == 2, "all but the short one"
        assert files[0].tokens == max(each.tokens for each in saved), "the latest is the longest here"


async def test_running_requests_end_before_their_slot_is_saved(heirs, folder):
    e0, e1 = heirs
    async with gateway(e0) as gate:
        talk = Talk(gate, 9)
        running = asyncio.create_task(talk.turn(max_tokens=300))
        await until(lambda: gate.claims()["e0"] or running.done())
        files = await put_away(gate, folder)
        assert running.done()
        assert len(files) == 1
        wake(gate, e1, files)
        before = talk.tokens
        assert (await talk.turn())["cache_n"] >= 0.95 * (before - 1)


async def test_requests_wait_for_who_comes_when_an_engine_is_emptied_to_be_ended(heirs):
    """The same as a drain, except that somebody sees to it that other engines come."""
    e0, e1 = heirs
    async with gateway(e0, queue_timeout_s=600) as gate:
        await gate.app.shelf.put_away(Parting(engine="e0", folder="", limit_bytes=0, deadline_s=60.0))
        waits = asyncio.create_task(talked(gate, 1))
        await until(lambda: gate.waiting() or waits.done())
        assert not waits.done()
        gate.router.update((e1,))
        (talk,) = await waits
        assert talk.engine == "e1"
