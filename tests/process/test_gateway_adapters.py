"""LoRA adapters on real servers: each request gets its own, and no other one's cache."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from gateway_harness import Engine, Gateway, gateway, infos, real_engine, until, write_adapter

from lltm_ray.config import LoraAdapter
from lltm_ray.models.random_weights import RandomShape, write_random

PROMPT = "once upon a time there was a model that had two masters and " * 6
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    write_random(folder / "tiny.gguf", RandomShape(n_ctx=8192))
    for seed, name in enumerate(("ada", "bob")):
        write_adapter(folder / f"{name}.gguf", seed + 1)
    return folder


def lora(files: Path, *names: str, scale: float = 0.0) -> tuple[LoraAdapter, ...]:
    return tuple(LoraAdapter(path=str(files / f"{name}.gguf"), scale=scale) for name in names)


@pytest.fixture(scope="module")
def two(files: Path) -> Iterator[tuple[Engine, ...]]:
    """Engines that number the same adapters differently."""
    orders = {"e0": ("ada", "bob"), "e1": ("bob", "ada")}
    with ExitStack() as stack:
        yield tuple(
            stack.enter_context(real_engine(name, files / "tiny.gguf", files, slots=4, lora=lora(files, *order)))
            for name, order in orders.items()
        )


async def say(gate: Gateway, model: str = "tiny", prompt: str = PROMPT, **more: object) -> dict:
    """A reply: its text, engine, cached tokens and those that were predicted."""
    params = {"engine": more.pop("engine")} if "engine" in more else {}
    body = {"model": model, "prompt": prompt, "n_predict": 12, "temperature": 0} | more
    async with gate.http.post(f"{gate.url}/completion", json=body, params=params) as reply:
        told = await reply.json()
        assert reply.status == 200, told
        predicted = int(reply.headers["x-lltm-cached"].partition("/")[0])
        cached = told["timings"]["cache_n"]
        return {
            "text": told["content"],
            "engine": reply.headers["x-lltm-engine"],
            "cached": cached,
            "predicted": predicted,
        }


async def refused(gate: Gateway, path: str, **body: object) -> tuple[int, str]:
    async with gate.http.post(gate.url + path, json=body) as reply:
        return reply.status, (await reply.json())["error"]["message"]


async def test_an_adapter_by_name_says_what_its_lora_field_says_on_engines_that_number_it_differently(two):
    async with gateway(*infos(two)) as gate:
        plain = (await say(gate, engine="e0"))["text"]
        named = {(name, engine): (await say(gate, f"tiny:{name}", engine=engine))["text"]
                 for name in ("ada", "bob") for engine in ("e0", "e1")}  # fmt: skip
        by_id = {
            engine: (await say(gate, engine=engine, lora=[{"id": 0, "scale": 1}]))["text"] for engine in ("e0", "e1")
        }
    assert named["ada", "e0"] == named["ada", "e1"] == by_id["e0"]
    assert named["bob", "e0"] == named["bob", "e1"] == by_id["e1"]
    assert len({plain, named["ada", "e0"], named["bob", "e0"]}) == 3


async def test_no_request_goes_on_from_another_adapter_s_cache(files, tmp_path):
    with real_engine("alone", files / "tiny.gguf", tmp_path, slots=1, lora=lora(files, "ada", "bob")) as engine:
        async with gateway(engine.info) as gate:
            fresh = {}
            for model in ("tiny", "tiny:ada", "tiny:bob", "tiny", "tiny:bob", "tiny:ada", "tiny"):
                first, again = await say(gate, model), await say(gate, model)
                assert (first["predicted"], first["cached"]) == (0, 0), f"{model} after another one on the only slot"
                assert again["predicted"] == again["cached"] > 300
                assert first["text"] == again["text"] == fresh.setdefault(model, first["text"])
    assert len(set(fresh.values())) == 3


async def test_the_same_prompt_under_several_adapters_is_kept_once_for_each(two):
    async with gateway(*infos(two)) as gate:
        seen: dict[str, list[dict]] = {}
        for _round in range(4):
            for model in ("tiny", "tiny:ada", "tiny:bob"):
                seen.setdefault(model, []).append(await say(gate, model, prompt="a prompt of its own " * 12))
    for first, *later in seen.values():
        assert (first["predicted"], first["cached"] < 8) == (0, True), (
            "no more than the same adapter's other prompts begin with"
        )
        assert {each["text"] for each in later} == {first["text"]}
        assert {each["engine"] for each in later} == {first["engine"]}
        assert all(each["cached"] == each["predicted"] > 200 for each in later)


async def test_a_chosen_adapter_at_another_scale_is_another_cache(two):
    async with gateway(*infos(two)) as gate:
        full = await say(gate, "tiny:ada", engine="e0", prompt="scales " * 60)
        same = await say(gate, engine="e0", prompt="scales " * 60, lora=[{"id": 0, "scale": 1.0}])
        half = await say(gate, engine="e0", prompt="scales " * 60, lora=[{"id": 0, "scale": 0.5}])
        none = await say(gate, engine="e0", prompt="scales " * 60, lora=[{"id": 0, "scale": 0.0}])
    assert same["predicted"] == same["cached"] > 300
    assert same["text"] == full["text"]
    assert (half["predicted"], half["cached"], none["predicted"], none["cached"]) == (0, 0, 0, 0)
    assert len({full["text"], half["text"], none["text"]}) == 3


async def test_requests_of_one_adapter_gather_where_it_runs(two):
    order = [f"tiny:{name}" for name in ("ada", "bob", "bob", "ada", "ada", "bob")]  # taking turns would part them
    long = {"n_predict": 7000, "ignore_eos": True, "stream": True}
    async with gateway(*infos(two)) as gate:
        replies = [
            await gate.http.post(f"{gate.url}/completion", json=long | {"model": model, "prompt": f"{number} things"})
            for number, model in enumerate(order)
        ]
        assert sum(gate.claims().values()) == len(order), "they run at a time"
        engines = [reply.headers["x-lltm-engine"] for reply in replies]
        for reply in replies:
            reply.close()
    placed = set(zip(order, engines, strict=True))
    assert len(placed) == len({engine for _, engine in placed}) == 2, placed


async def test_an_engine_without_the_adapter_never_gets_its_requests(two, files, tmp_path):
    with real_engine("bare", files / "tiny.gguf", tmp_path) as bare:
        async with gateway(bare.info, two[0].info) as gate:
            asked = (say(gate, "tiny:ada", prompt=f"number {number}") for number in range(8))
            assert {told["engine"] for told in await asyncio.gather(*asked)} == {"e0"}
            assert (await say(gate, prompt="any", engine="bare"))["text"], "without a choice any engine will do"
            status, why = await refused(gate, "/completion?engine=bare", model="tiny:ada", prompt="x")
    assert (status, "'tiny' has no adapters" in why) == (404, True)


async def test_models_list_adapters_under_their_parent(two):
    async with gateway(*infos(two)) as gate, gate.http.get(f"{gate.url}/v1/models") as reply:
        listed = {each["id"]: each for each in (await reply.json())["data"]}
    assert sorted(listed) == ["tiny", "tiny:ada", "tiny:bob"]
    assert listed["tiny:ada"]["parent"] == "tiny"
    assert listed["tiny:ada"]["engines"] == {"ready": 2, "total": 2}


async def test_what_cannot_be_chosen_is_refused_with_what_can(two):
    first = [{"id": 0, "scale": 1}]
    messages = [{"role": "user", "content": "x"}]
    async with gateway(*infos(two)) as gate:
        wrong = await refused(gate, "/completion", model="tiny:eve", prompt="x")
        both = await refused(gate, "/completion", model="tiny:ada", prompt="x", lora=first)
        numbers = await refused(gate, "/completion", model="tiny", prompt="x", lora=first)
        absent = await refused(gate, "/completion?engine=e0", model="tiny", prompt="x", lora=[{"id": 2, "scale": 1}])
        dropped = await refused(gate, "/v1/messages", model="tiny", messages=messages, max_tokens=4)
        vectors = await refused(gate, "/v1/embeddings", model="tiny:ada", input="x")
    assert wrong[0] == 404
    assert "tiny:ada, tiny:bob" in wrong[1]
    assert [status for status, _ in (both, numbers, absent, dropped, vectors)] == [400] * 5
    assert "leave one of the two away" in both[1]
    assert "number their adapters differently" in numbers[1]
    assert "0 (ada), 1 (bob)" in absent[1]
    assert "use /v1/chat/completions" in dropped[1]
    assert "for generating text" in vectors[1]


async def test_new_scales_for_all_hold_for_those_that_choose_nothing_and_leave_no_old_cache(two):
    prompt = "the setting of all " * 12
    async with gateway(*infos(two)) as gate:
        before = await say(gate, engine="e0", prompt=prompt)
        ada = await say(gate, "tiny:ada", engine="e0", prompt=prompt)
        status = {}
        for scale in (1.0, 0.0):
            target = f"{gate.url}/lora-adapters?engine=e0"
            async with gate.http.post(target, json=[{"id": 0, "scale": scale}]) as reply:
                status[scale] = reply.status, await say(gate, engine="e0", prompt=prompt)
        async with gate.http.post(target, json=[{"id": 2, "scale": 1.0}]) as reply:
            assert (reply.status, "ids are 0 (ada), 1 (bob)" in await reply.text()) == (400, True)
    assert status[1.0][0] == status[0.0][0] == 200
    assert status[1.0][1]["text"] == ada["text"] != before["text"]
    assert status[0.0][1]["text"] == before["text"]
    assert status[1.0][1]["predicted"] == status[0.0][1]["predicted"] == 0


@pytest.mark.parametrize("path", ["/completion", CHAT])
async def test_a_stream_whose_engine_is_killed_goes_on_under_its_adapter_elsewhere(two, files, tmp_path, path):
    body = {"model": "tiny:bob", "prompt": PROMPT, "messages": [{"role": "user", "content": PROMPT}]}
    body |= {"max_tokens": 1500, "n_predict": 1500, "temperature": 0, "stream": True, "ignore_eos": True}

    async def stream(gate: Gateway, victim: Engine | None = None) -> str:
        text = ""
        async with gate.http.post(gate.url + path, json=body) as reply:
            async for line in reply.content:
                if line.startswith(b"data: {"):
                    told = json.loads(line[6:])
                    text += told["choices"][0]["delta"].get("content") or "" if "choices" in told else told["content"]
                    if victim is not None and len(text) > 100:
                        gate.router.open_engine("e1")
                        os.kill(victim.info.server_pid or 0, signal.SIGKILL)
                        victim = None
        return text

    async with gateway(two[1].info) as gate:
        whole = await stream(gate)
    lora_files = lora(files, "ada", "bob")
    with real_engine("victim", files / "tiny.gguf", tmp_path, slots=4, lora=lora_files) as victim:
        async with gateway(victim.info, two[1].info, max_attempts=3) as gate:
            gate.router.close_engine("e1")
            text = await stream(gate, victim)
            assert list(gate.app.records)[-1].attempts == 2
    assert len(whole) > 1000
    assert text == whole


async def test_conversations_with_adapters_are_not_moved_and_a_drain_says_why(two):
    async with gateway(*infos(two)) as gate:
        await say(gate, "tiny:ada", engine="e0", prompt="to be moved " * 20)
        async with gate.http.post(f"{gate.url}/lltm/drain?engine=e0&timeout_s=3") as reply:
            report = await reply.json()
        assert await gate.app.leveller.look("tiny") is None
        assert gate.app.migrator.is_off("tiny")
    assert report["moved"] == 0
    assert "has adapters" in report["failed"][0]["why"]


async def test_a_steady_stream_of_one_adapter_s_requests_keeps_no_other_one_waiting(two):
    finished: list[str] = []
    async with gateway(two[0].info) as gate:

        async def client(model: str, turns: int) -> None:
            for turn in range(turns):
                await say(gate, model, prompt=f"turn {turn}", n_predict=150 + 10 * turn, ignore_eos=True)
                finished.append(model)

        steady = [asyncio.create_task(client("tiny:ada", 8)) for _ in range(3)]
        await until(lambda: len(finished) >= 3, *steady)
        await asyncio.gather(client("tiny:bob", 2), *steady)
    assert finished.count("tiny:ada") == 24
    assert "tiny:bob" not in finished[-8:], finished
