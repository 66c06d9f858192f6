"""Sessions outlive gateway and engine: the next turn on another server is the proof, and what must not be restored."""

from __future__ import annotations

import asyncio
import json
import os
import threading
from array import array
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from gateway_harness import Gateway, gateway
from typer.testing import CliRunner

from lltm_ray.actors.sessions import Session, Sessions
from lltm_ray.cli import app
from lltm_ray.errors import ConfigError, DiskFullError, LltmRayError, SessionNotFoundError
from lltm_ray.gateway import session_routes
from lltm_ray.gateway import sessions as sessions_module
from lltm_ray.gateway.session_store import SessionStore
from lltm_ray.records import EngineInfo

ALIKE = 20
"""Tokens that any two conversations here begin with: the engines live through all tests."""
GREEDY = {"temperature": 0, "ignore_eos": True, "max_tokens": 24}


class Desk:
    """A gateway, and what a program in another thread does with its sessions."""

    def __init__(self, gate: Gateway) -> None:
        self.gate = gate
        self.sessions = Sessions(gate.url)

    async def open(self, name: str, **given: Any) -> Session:
        return await asyncio.to_thread(self.sessions.open, name, **given)

    async def ask(self, session: Session, text: str) -> Any:
        return (await asyncio.to_thread(session.ask, text, **GREEDY)).timings

    async def talked(self, name: str, number: int) -> Session:
        """Two turns."""
        session = await self.open(name, system=f"{number} talks of this and that. " * (12 + number))
        for text in ("tell me", "go on"):
            await self.ask(session, text)
        return session

    async def save(self, session: Session, **options: Any) -> Any:
        return await asyncio.to_thread(session.save, **options)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "sessions"


@asynccontextmanager
async def desk(engine: EngineInfo, folder: Path, *, limit_bytes: int = 2**30, **settings: Any) -> AsyncIterator[Desk]:
    """A gateway of its own each time, as after a restart: nothing is known but what is in the folder."""
    async with gateway(engine, sessions=SessionStore(folder, limit_bytes), **settings) as gate:
        yield Desk(gate)


def files(folder: Path, kind: str) -> list[Path]:
    return sorted(folder.glob(f"*/*{kind}"))


async def test_the_third_turn_after_a_restart_computes_only_what_is_new(heirs, folder):
    e0, e1 = heirs
    async with desk(e0, folder) as before:
        alice = await before.talked("alice", 1)
        info = await before.save(alice)
        assert info.cached_tokens > 0.9 * (info.cached_tokens + info.computed_tokens), "the slot was found"
        assert (info.why, info.message_count, info.model) == ("", 5, e0.model)
        assert os.listdir(e0.slot_folder) == []
    assert {path.stat().st_mode & 0o777 for path in folder.rglob("*") if path.is_file()} == {0o600}
    assert {path.stat().st_mode & 0o777 for path in (folder, *folder.glob("*/"))} == {0o700}
    async with desk(e1, folder) as after:
        again = await after.open("alice")
        assert again.messages == alice.messages
        assert [info.why for info in await asyncio.to_thread(after.sessions.list)] == [""]
        timings = await after.ask(again, "and then?")
        assert timings.cache_n >= 0.95 * info.tokens, (timings, info)
        assert again.restored_tokens == timings.cache_n
        assert (again.why, os.listdir(e1.slot_folder)) == ("", [])
        assert after.gate.app.migrator.snapshot()["verified"] == 1
        await after.ask(again, "really?")
        assert (again.restored_tokens, again.why) == (0, ""), "its slot still holds it"
        assert len(files(folder, ".bin")) == 1, "it is kept until somebody saves it anew"


async def test_a_restored_session_says_what_it_would_have_said(heirs, folder):
    e0, e1 = heirs
    async with desk(e0, folder) as before:
        alice = await before.talked("same", 2)
        await before.save(alice)
        await before.ask(alice, "and then?")
    async with desk(e1, folder) as after:
        again = await after.open("same")
        await after.ask(again, "and then?")
        assert again.restored_tokens > 0
        assert again.messages == alice.messages


async def test_a_restore_ahead_leaves_the_next_request_nothing_to_wait_for(heirs, folder):
    e0, e1 = heirs
    async with desk(e0, folder) as before:
        info = await before.save(await before.talked("ahead", 3))
    async with desk(e1, folder) as after:
        ready = await asyncio.to_thread(after.sessions.restore, "ahead")
        assert ready.cached_tokens >= 0.95 * info.tokens
        again = await after.open("ahead")
        assert (await after.ask(again, "and then?")).cache_n >= 0.95 * info.tokens
        assert after.gate.app.shelf.snapshot()["restored"] == 1


async def test_a_conversation_that_no_slot_holds_is_computed_once_and_kept(heirs, folder):
    e0, e1 = heirs
    messages = [{"role": "user", "content": "Nobody knows this one yet. " * 20}]
    async with desk(e0, folder) as before:
        info = await asyncio.to_thread(before.sessions.save, "primed", messages)
        assert info.computed_tokens > 128 > info.cached_tokens
    async with desk(e1, folder) as after:
        text, rest = messages[0]["content"], {"max_tokens": 4}
        other = [{"role": "user", "content": f"{text}But what of it?"}]
        headers = {"x-lltm-session": "primed"}
        body = {"messages": other, **rest}
        async with after.gate.http.post(f"{after.gate.url}/v1/chat/completions", json=body, headers=headers) as reply:
            told = await reply.json()
        assert told["timings"]["cache_n"] >= 0.8 * info.tokens, "any client can go on from it by the header"
        assert reply.headers["x-lltm-session"].startswith("restored=")


@pytest.mark.parametrize(
    ("damage", "why", "number"),
    [("cut", "bytes", 4), ("wild", "damaged", 5), ("gone", "gone", 6), ("seal", "settings", 7), ("build", "b1-x", 8)],
)
async def test_what_does_not_fit_is_not_restored_and_the_answer_comes(heirs, folder, damage, why, number):
    e0, e1 = heirs
    async with desk(e0, folder) as before:
        await before.save(await before.talked(damage, number))
    (path,), (manifest,) = files(folder, ".bin"), files(folder, ".json")
    data = path.read_bytes()
    if damage == "gone":
        path.unlink()
    elif damage == "build":
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"build": "b1-x"}))
    elif damage != "seal":
        path.write_bytes(data[: len(data) // 2] if damage == "cut" else data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    engine = e1.with_(slot_seal="other weights") if damage == "seal" else e1
    async with desk(engine, folder) as after:
        (listed,) = await asyncio.to_thread(after.sessions.list)
        assert (why in listed.why) == (damage in ("cut", "gone", "seal")), "what needs no look into it or at the server"
        again = await after.open(damage)
        timings = await after.ask(again, "and then?")
        assert timings.cache_n < ALIKE
        assert why in again.why
        assert again.messages[-1]["content"]


async def test_a_file_that_goes_while_its_request_waits_costs_time_and_nothing_else(heirs, folder, monkeypatch):
    e0, e1 = heirs
    async with desk(e0, folder) as before:
        await before.save(await before.talked("late", 9))
    async with desk(e1, folder) as after:
        shelf = after.gate.app.shelf
        build = shelf.slots.build

        async def remove_first(engine: EngineInfo) -> str:
            files(folder, ".bin")[0].unlink(missing_ok=True)
            return await build(engine)

        monkeypatch.setattr(shelf.slots, "build", remove_first)
        again = await after.open("late")
        assert (await after.ask(again, "and then?")).cache_n < ALIKE
        assert "not restored" in again.why
        assert (await after.ask(again, "and then?")).cache_n > 128, "the engine goes on"


async def test_what_no_engine_can_save_is_kept_as_messages_that_go_on(heirs, folder):
    e0, _ = heirs
    async with desk(e0.with_(slot_folder=""), folder) as each:
        info = await each.save(await each.talked("words", 10))
        assert (info.tokens, "no folder" in info.why) == (0, True)
        short = await asyncio.to_thread(each.sessions.save, "short", "hi")
        assert (short.tokens, short.message_count) == (0, 1), "a text is one message of the user"
        again = await each.open("words")
        await each.ask(again, "and then?")
        assert "no folder" in again.why
        assert len(again.messages) == 7


async def test_what_is_longer_than_a_slot_is_kept_as_messages(heirs, folder):
    e0, _ = heirs
    async with desk(e0, folder) as each:
        messages = [{"role": "user", "content": "words " * 20_000}, {"role": "assistant", "content": "Yes."}]
        info = await asyncio.to_thread(each.sessions.save, "long", messages)
        assert (info.tokens, "longer than the context" in info.why) == (0, True)
        assert "engine.n_ctx" in info.why
        assert list((await asyncio.to_thread(each.sessions.get, "long")).messages) == messages


async def test_an_error_in_its_block_loses_no_turn(heirs, folder):
    e0, _ = heirs
    async with desk(e0, folder) as each:

        def talk():
            with each.sessions.open("cut") as session:
                session.ask("hi", max_tokens=4)
                raise KeyError("mine")

        with pytest.raises(KeyError, match="mine"):
            await asyncio.to_thread(talk)
        assert len((await asyncio.to_thread(each.sessions.get, "cut")).messages) == 2


async def test_two_saves_of_one_name_at_once_leave_one_whole_session(heirs, folder):
    e0, _ = heirs
    async with desk(e0, folder) as each:
        talks = [await each.talked(name, number) for name, number in (("left", 20), ("right", 21))]
        for talk in talks:
            talk.name = "both"
        await asyncio.gather(*(each.save(talk) for talk in talks))
        kept = await asyncio.to_thread(each.sessions.get, "both")
        assert list(kept.messages) in [talk.messages for talk in talks]
        assert len(files(folder, ".bin")) == len(files(folder, ".json")) == 1
        assert files(folder, ".new") == []
        store = each.gate.app.sessions.store
        assert store.check(store.load("", "both")) == ""


async def test_each_tenant_has_its_own_and_no_key_opens_another_ones(heirs, folder):
    e0, _ = heirs
    async with desk(e0, folder, keys=("k1 ann", "k2 bob")) as both:
        ann, bob = (Sessions(both.gate.url, api_key=key) for key in ("k1", "k2"))
        messages = [{"role": "user", "content": "mine"}]
        await asyncio.to_thread(ann.save, "diary", messages)
        assert [info.name for info in await asyncio.to_thread(ann.list)] == ["diary"]
        assert await asyncio.to_thread(bob.list) == ()
        for action in (bob.get, bob.delete, bob.restore):
            with pytest.raises(SessionNotFoundError, match="diary"):
                await asyncio.to_thread(action, "diary")
        assert (await asyncio.to_thread(ann.rename, "diary", "book")).name == "book"
        with pytest.raises(SessionNotFoundError):
            await asyncio.to_thread(ann.get, "diary")
        await asyncio.to_thread(ann.delete, "book")
        assert [path for path in folder.rglob("*") if path.suffix] == []


async def test_without_text_no_message_is_kept_but_the_cache_still_holds_the_tokens_and_serves(heirs, folder):
    e0, e1 = heirs
    async with desk(e0, folder) as before:
        secret = await before.talked("secret", 22)
        info = await before.save(secret, keep_text=False)
        said = secret.messages[2]["content"]
        assert said not in files(folder, ".json")[0].read_text()
        assert "talks of" not in files(folder, ".json")[0].read_text()
        assert files(folder, ".said") == []
        body = {"content": secret.messages[0]["content"]}
        async with before.gate.http.post(f"{before.gate.url}/tokenize", json=body) as reply:
            tokens = (await reply.json())["tokens"][2:-2]
        assert array("i", tokens).tobytes() in files(folder, ".bin")[0].read_bytes(), "as the README says"
    async with desk(e1, folder) as after:
        with pytest.raises(ConfigError, match="without its messages"):
            await after.open("secret")
        again = await after.open("secret", messages=secret.messages)
        assert (await after.ask(again, "and then?")).cache_n >= 0.95 * info.tokens


async def test_the_cache_used_longest_ago_makes_room_and_its_messages_stay(heirs, folder):
    e0, _ = heirs
    async with desk(e0, folder) as each:
        first = await each.save(await each.talked("first", 23))
        size = first.size_bytes
    async with desk(e0, folder, limit_bytes=2 * size + size // 2) as each:
        for number, name in enumerate(("second", "third")):
            await each.save(await each.talked(name, 24 + number))
        listed = {info.name: info for info in await asyncio.to_thread(each.sessions.list)}
        assert [name for name, info in listed.items() if not info.tokens] == ["first"]
        assert "room" in listed["first"].why
        assert (await each.open("first")).messages
        assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= 2.5 * size
    async with desk(e0, folder, limit_bytes=size // 2) as each:
        info = await each.save(await each.talked("fourth", 30))
        assert (info.tokens, "sessions_mib" in info.why) == (0, True)
    async with desk(e0, folder, limit_bytes=1000) as each:
        with pytest.raises(DiskFullError, match="sessions_mib"):
            await each.save(await each.talked("fifth", 31))
        assert len(await asyncio.to_thread(each.sessions.list)) == 4


async def test_wrong_names_and_bodies_are_refused_in_words(heirs, folder):
    e0, _ = heirs
    async with desk(e0, folder) as each:
        url = f"{each.gate.url}/lltm/sessions"
        for name in ("../x", "..", "a/b", "", ".hidden", "x" * 129, "a\nb"):
            with pytest.raises(ConfigError, match="name"):
                each.sessions.get(name)
            async with each.gate.http.post(url, params={"name": name}, json={"messages": [{"role": "user"}]}) as reply:
                assert reply.status == 400
        with pytest.raises(ConfigError, match="messages=7: is of type int"):
            each.sessions.save("x", 7)
        for body in ([], {}, {"messages": []}, {"messages": ["x"]}, {"messages": [{"role": "user"}], "stream": True}):
            async with each.gate.http.post(url, params={"name": "x"}, json=body) as reply:
                assert reply.status == 400, body
        for page in ({"origin": "https://evil.example"}, {"host": "evil.example"}, {"sec-fetch-site": "same-origin"}):
            async with each.gate.http.get(url, headers=page) as reply:
                assert reply.status == 400, page
        assert not folder.exists()
    async with gateway(e0) as gate:
        with pytest.raises(ConfigError, match="sessions_mib"):
            await asyncio.to_thread(Sessions(gate.url).list)


async def test_a_page_learns_from_no_answer_which_sessions_there_are(heirs, folder):
    e0, _ = heirs
    async with desk(e0, folder) as each:
        await asyncio.to_thread(each.sessions.save, "short", [{"role": "user", "content": "hi"}])
        url, body = f"{each.gate.url}/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}
        told = []
        for page in ({}, {"origin": "http://evil.example"}, {"sec-fetch-site": "cross-site"}):
            named = {"x-lltm-session": "short", **page}
            async with each.gate.http.post(url, json=body | {"max_tokens": 1}, headers=named) as reply:
                told.append((reply.status, "x-lltm-session" in reply.headers))
        assert told == [(200, True), (200, False), (200, False)]


async def test_a_save_that_fails_after_the_copy_leaves_no_file(heirs, folder, monkeypatch):
    e0, _ = heirs
    messages = [{"role": "user", "content": "Kept for a moment only. " * 20}]
    async with desk(e0, folder) as each:
        seen = []

        def broken(*_: Any, **__: Any) -> None:
            seen.extend(files(folder, ".bin"))
            raise OSError("broken")

        monkeypatch.setattr(sessions_module, "_kept", broken)
        with pytest.raises(LltmRayError, match="broken"):
            await asyncio.to_thread(each.sessions.save, "x", messages)
        assert (len(seen), [path for path in folder.rglob("*") if path.is_file()]) == (1, [])


async def test_a_long_body_keeps_the_event_loop_free(heirs, folder, monkeypatch):
    e0, _ = heirs
    threads = []
    for module, name in ((session_routes, "parse_json"), (sessions_module, "encode"), (sessions_module, "build_ask")):
        work = getattr(module, name)

        def noted(*given: Any, do: Any = work, **options: Any) -> Any:
            threads.append(threading.current_thread() is threading.main_thread())
            return do(*given, **options)

        monkeypatch.setattr(module, name, noted)
    async with desk(e0, folder) as each:
        info = await asyncio.to_thread(each.sessions.save, "x", [{"role": "user", "content": "x" * 2**20}])
        assert "longer than the context" in info.why
    assert threads == [False, False, False]


async def test_what_a_server_is_is_kept_once_for_each_engine_whatever_its_address_was(heirs):
    e0, e1 = heirs
    async with gateway(e0) as gate:
        calls = gate.app.shelf.slots
        for engine in (e0, e1.with_(name=e0.name), e0):
            assert (await calls.build(engine)).startswith("b")
        assert list(calls._builds) == [e0.name]


async def test_the_command_line_saves_lists_restores_and_deletes(heirs, folder, tmp_path, monkeypatch):
    e0, _ = heirs
    chat, short, out = (tmp_path / f"{name}.json" for name in ("chat", "short", "out"))
    short.write_text('[{"role": "user", "content": "hi"}]')
    messages = [{"role": "user", "content": "From the command line. " * 20}]
    chat.write_text(json.dumps({"system": "Be brief.", "messages": messages}))
    async with desk(e0, folder) as each:

        async def run(*words: str) -> Any:
            return await asyncio.to_thread(CliRunner().invoke, app, ["sessions", *words, "--url", each.gate.url])

        saved = await run("save", "cli", "--messages", str(chat), "--json")
        assert json.loads(saved.stdout)["tokens"] > 128, saved.output
        assert "cli" in (await run("list")).stdout
        await run("save", "brief", "--messages", str(short))
        assert "brief: nothing is restored: its " in (await run("list")).stdout
        assert json.loads((await run("restore", "cli", "--json", "--out", str(out))).stdout)["cached_tokens"] > 128
        said = [{"role": "system", "content": "Be brief."}, *messages]
        assert json.loads(out.read_text()) == said
        restored = []
        monkeypatch.setattr(
            Sessions, "restore", lambda *given, call=Sessions.restore: restored.append(1) or call(*given)
        )
        other, link = tmp_path / "other.json", tmp_path / "link.json"
        other.write_text("kept")
        other.chmod(0o644)
        link.symlink_to(other)
        assert (await run("restore", "cli", "--out", str(link))).exit_code == 0
        assert (link.is_symlink(), link.stat().st_mode & 0o777, other.read_text()) == (False, 0o600, "kept")
        assert json.loads((await run("restore", "cli", "--out", "-")).stdout) == said
        assert len(restored) == 2
        assert (await run("restore", "cli", "--out", str(tmp_path))).exit_code == 2
        assert (await run("delete", "cli")).exit_code == 0
        assert (await run("restore", "cli")).exit_code == 2
        assert (await run("save", "../x", "--messages", str(chat))).exit_code == 2
