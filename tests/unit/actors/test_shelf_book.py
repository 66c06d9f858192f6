"""The controller's book of saved slots: who is asked, what is kept for how long, what goes; no Ray."""

import asyncio
import time
from pathlib import Path

import pytest
import ray

from lltm_ray._shelf import SavedSlot
from lltm_ray.actors.shelf import Book, Keeper
from lltm_ray.config import FleetConfig
from lltm_ray.records import EngineInfo, EngineState, FleetStatus, GatewayInfo, ModelDemand

ENGINE = EngineInfo(
    name="engine-0", model="m", state=EngineState.READY, node_id="here", slot_folder="/slots", slot_seal="seal"
)
ASKED = (ModelDemand(model="m", last_request_unix_nano=1),)


def gateway(name, demand=ASKED, state="ready"):
    return GatewayInfo(name=name, url="", state=state, demand=demand)


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setenv("LLTM_RAY_CACHE", str(tmp_path))
    return tmp_path / "run" / "f-1" / "slots"


class Routers:
    """What a book last told them."""

    def __init__(self, **settings):
        self.heard = []
        config = FleetConfig(name="f", **settings)
        self.book = Book(config, "1", self.hear, lambda _node_id: Keeper())

    async def hear(self):
        self.heard.append(self.book.shelf)

    async def ordered(self):
        async with asyncio.timeout(60):
            while not self.heard:
                await asyncio.sleep(0.01)
        (parting,) = self.heard[0].partings
        return parting


def saved(folder, number, size_bytes=100, age_s=0.0):
    name = f"lltm-{number:032x}.bin"
    Path(folder, name).write_bytes(b"x" * size_bytes)
    return SavedSlot(
        name=name,
        folder=str(folder),
        node_id="here",
        model="m",
        seal="seal",
        tokens=500,
        size_bytes=size_bytes,
        key_bytes=600,
        whole=b"w",
        hashes=b"h" * 8,
        saved_unix_nano=time.time_ns() - int((age_s + number) * 1e9),
    )


async def parted(routers, *files_by_gateway):
    """One engine's end, answered by each gateway with its files."""
    names = [f"g{number}" for number in range(len(files_by_gateway))]
    ending = asyncio.create_task(routers.book.part(ENGINE, tuple(map(gateway, names)), 60.0, is_last=True))
    parting = await routers.ordered()
    for name, make in zip(names, files_by_gateway, strict=True):
        routers.book.answer(name, ENGINE.name, parting.folder, make(parting.folder))
    await ending
    return Path(parting.folder)


async def test_an_engine_ends_when_every_gateway_that_knows_its_model_has_answered(run):
    routers = Routers()
    silent = (gateway("late", state="failed"), gateway("unasked", demand=()))
    ending = asyncio.create_task(routers.book.part(ENGINE, (gateway("a"), gateway("b"), *silent), 60.0, is_last=True))
    parting = await routers.ordered()
    assert Path(parting.folder).parent == run
    routers.book.answer("a", ENGINE.name, parting.folder, (saved(parting.folder, 1),))
    await asyncio.sleep(0.05)
    routers.book.answer("b", ENGINE.name, "", ())
    await asyncio.sleep(0.05)
    assert not ending.done(), "an answer to an earlier order is none to this one"
    routers.book.answer("b", ENGINE.name, parting.folder, ())
    await ending
    assert [(len(each.files), len(each.partings)) for each in routers.heard] == [(0, 1), (1, 0)]
    assert FleetStatus(name="f", shelf=routers.heard[-1]).public()["shelf"] == {"files": 1, "tokens": 500, "bytes": 100}


async def test_where_others_stay_gateways_are_asked_to_move_and_no_folder_is_made(run):
    routers = Routers(shelf_mib=0)
    ending = asyncio.create_task(routers.book.part(ENGINE, (gateway("a"),), 60.0, is_last=False))
    parting = await routers.ordered()
    assert parting.folder == ""
    routers.book.answer("a", ENGINE.name, parting.folder, ())
    await ending
    assert not run.exists()


@pytest.mark.parametrize(
    ("engine", "gateways", "settings"),
    [
        (ENGINE, (), {}),
        (ENGINE.with_(state=EngineState.FAILED), (gateway("a"),), {}),
        (ENGINE.with_(slot_folder=""), (gateway("a"),), {}),
        (ENGINE, (gateway("a"),), {"shelf_mib": 0}),
    ],
)
async def test_nobody_is_asked_where_nothing_can_be_saved(run, engine, gateways, settings):
    routers = Routers(**settings)
    await routers.book.part(engine, gateways, 60.0, is_last=True)
    assert (routers.heard, run.exists()) == ([], False)


async def test_a_gateway_that_does_not_answer_holds_an_engine_no_longer_than_its_time(run, monkeypatch):
    monkeypatch.setattr("lltm_ray.actors.shelf.ANSWER_S", 0.1)
    routers = Routers()
    began = time.monotonic()
    await routers.book.part(ENGINE, (gateway("a"),), 0.1, is_last=True)
    assert 0.15 < time.monotonic() - began < 30.0
    assert routers.book.shelf.partings == ()


async def test_an_engine_is_drained_though_the_directory_cannot_be_told(run, monkeypatch):
    monkeypatch.setattr("lltm_ray.actors.shelf.ANSWER_S", 0.1)
    routers = Routers()

    async def refuse():
        routers.heard.append(routers.book.shelf)
        raise ray.exceptions.RayActorError

    monkeypatch.setattr(routers.book, "_tell", refuse)
    await routers.book.part(ENGINE, (gateway("a"),), 0.1, is_last=True)
    assert [len(each.partings) for each in routers.heard] == [1, 0]


@pytest.mark.parametrize("trouble", [ray.exceptions.RayActorError(), None])
async def test_what_lies_on_a_node_whose_keeper_is_dead_or_silent_is_forgotten(run, monkeypatch, trouble):
    keepers = []

    class Lost(Keeper):
        async def remove(self, filename):
            if trouble is not None:
                raise trouble
            await asyncio.Event().wait()

    def keeper_on(_node_id):
        keepers.append(Lost())
        return keepers[-1]

    routers = Routers()
    routers.book._keeper_on = keeper_on
    await parted(routers, lambda folder: (saved(folder, 1), saved(folder, 2)))
    (one, _) = routers.book.shelf.files
    assert one.name not in repr(one), "whoever knows it can have the conversation"
    monkeypatch.setattr("lltm_ray.actors.shelf.KEEPER_S", 0.1)
    await routers.book.drop(one.name)
    assert routers.book.shelf.files == ()
    assert (len(keepers), "here" in routers.book._keepers) == (1, trouble is None)
    await keepers[0].close()


async def test_the_oldest_go_beyond_the_bound_and_what_is_too_old_goes(run):
    routers = Routers(shelf_mib=1, shelf_age_s=100.0)
    half = 2**19
    folder = await parted(
        routers,
        lambda folder: (saved(folder, 1, half), saved(folder, 2, half), saved(folder, 3, half)),
        lambda folder: (saved(folder, 4, 10, age_s=101.0),),
    )
    kept = [f"lltm-{number:032x}.bin" for number in (1, 2)]
    assert sorted(file.name for file in routers.book.shelf.files) == kept
    assert sorted(path.name for path in folder.iterdir()) == kept
    await routers.book.drop(kept[0], "unknown")
    assert [path.name for path in folder.iterdir()] == kept[1:]


async def test_at_its_end_everything_goes(run):
    routers = Routers()
    folder = await parted(routers, lambda folder: (saved(folder, 1),))
    assert folder.stat().st_mode & 0o777 == 0o700
    await routers.book.close()
    assert (list(run.iterdir()), routers.book.shelf.files) == ([], ())
