"""Sessions as programs see them, and their files, where no server is needed."""

import json
import logging
import os
import threading
from dataclasses import replace

import pytest

from lltm_ray._sessions import Offer, check_name
from lltm_ray.actors.sessions import _info, sessions_of
from lltm_ray.errors import ConfigError, DiskFullError, EngineNotReadyError, FleetError, SessionNotFoundError
from lltm_ray.gateway import session_store
from lltm_ray.gateway.pages import refuse_pages
from lltm_ray.gateway.session_manifest import Kept, Said
from lltm_ray.gateway.session_store import SessionStore
from lltm_ray.gateway.sessions import open_ended, unfit
from lltm_ray.llamacpp.slot_folder import STALE_S, new_name
from lltm_ray.records import EngineInfo, EngineState

MIB = 2**20


@pytest.fixture
def store(tmp_path):
    return SessionStore(tmp_path / "sessions", 4 * MIB)


def keep(store, name, size=1000, tenant="", said=None):
    """A session whose file holds so many bytes."""
    file = new_name()
    path = store.make_place(tenant) / file
    path.write_bytes(os.urandom(size))
    kept = Kept(name=name, tenant=tenant, model="m", message_count=1, file=file, tokens=9)
    return store.commit(replace(kept, file_bytes=size, saved_unix_s=1.0), said or says(name))


def says(text):
    return Said(messages=[{"role": "user", "content": text}])


def names(store, tenant=""):
    return sorted(info.name for info in store.all_of(tenant))


@pytest.mark.parametrize("name", ["../x", "..", "a/b", "", ".x", "-x", "a b", "a\n", "x" * 129, "ä", None, 3])
def test_a_name_that_could_be_anything_else_is_refused(store, name):
    for action in (check_name, lambda given: store.load("", given), lambda given: store.delete("", given)):
        with pytest.raises(ConfigError, match="letters, digits"):
            action(name)


def test_a_session_is_kept_whole_and_only_for_its_tenant(store):
    kept = keep(store, "alice", tenant="ann")
    assert store.load_said("ann", "alice") == (kept, says("alice"))
    assert store.check(kept) == ""
    assert (names(store, "ann"), names(store, "bob")) == (["alice"], [])
    with pytest.raises(SessionNotFoundError, match="alice"):
        store.load("bob", "alice")
    store.delete("ann", "alice")
    with pytest.raises(SessionNotFoundError):
        store.delete("ann", "alice")
    assert list(store.folder.glob("*/*")) == []


def test_a_manifest_that_was_changed_opens_no_other_file_and_hides_no_other_session(store, tmp_path, caplog):
    kept = keep(store, "alice")
    (path,) = store.folder.glob("*/*.json")
    wrongs = ({"file": "../../secret.bin"}, {"said": "../x.said"}, {"name": "bob"}, {"format": 99}, {"salt": "no hex"})
    for wrong in wrongs:
        path.write_text(json.dumps(json.loads(path.read_text()) | wrong))
        try:
            with pytest.raises(ConfigError, match="'alice'"):
                store.load("", "alice")
        finally:
            store._write(path, kept)
    keep(store, "carol")
    path.write_text("{")
    with caplog.at_level(logging.WARNING):
        assert names(store) == ["carol"]
    assert "cannot be read" in caplog.text
    assert keep(store, "alice").name == "alice", "a new one may take its place"


def test_saves_of_one_name_at_once_leave_one_manifest_and_its_file(store):
    threads = [threading.Thread(target=keep, args=(store, "both", 1000 + size)) for size in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    kept = store.load("", "both")
    assert [path.name for path in store.folder.glob("*/*.bin")] == [kept.file]
    assert store.check(kept) == ""


def test_the_bound_holds_and_those_used_longest_ago_lose_their_caches_first(store):
    for number, name in enumerate(("a", "b", "c")):
        keep(store, name, MIB)
        os.utime(store._manifest("", name), (number, number))
    store.touch(store.load("", "a"))
    keep(store, "d", 2 * MIB)
    dropped = [info.name for info in store.all_of("") if not info.tokens]
    assert dropped == ["c", "b"], "of those without a cache, the later used first; all four are still there"
    assert names(store) == ["a", "b", "c", "d"]
    assert "room" in store.check(store.load("", "b"))
    store.limit_bytes = MIB
    kept = keep(store, "e", MIB)
    assert (kept.file, "sessions_mib" in kept.why) == ("", True)
    assert names(store) == ["a", "b", "c", "d", "e"]


def test_what_a_dead_gateway_left_is_swept_and_what_is_new_stays(store, monkeypatch):
    kept = keep(store, "alice")
    left = store.make_place("") / new_name()
    left.write_bytes(b"half")
    keep(store, "bob")
    assert left.exists()
    monkeypatch.setattr(session_store.time, "time", lambda: left.lstat().st_ctime + STALE_S + 1)
    keep(store, "bob")
    assert not left.exists()
    assert store.check(kept) == ""


def test_a_save_takes_its_own_tenants_caches_first_and_nobodys_messages(store):
    keep(store, "old", MIB, tenant="bob")
    keep(store, "mine", MIB, tenant="ann")
    for path in store.folder.glob("*/*.json"):
        os.utime(path, (1, 1) if path == store._manifest("bob", "old") else None)
    store.limit_bytes = 3 * MIB
    keep(store, "next", MIB * 3 // 2, tenant="ann")
    assert [info.tokens for info in store.all_of("bob")] == [9], "ann's own cache was enough, though used later"
    keep(store, "more", MIB * 5 // 2, tenant="ann")
    assert [info.tokens for info in store.all_of("bob")] == [0]
    assert store.load_said("bob", "old")[1] == says("old")


def test_a_save_that_does_not_fit_is_refused_and_harms_nobody(store):
    said = says("x" * 100_000)
    before = keep(store, "alice", 1000, tenant="ann", said=said)
    keep(store, "mine", 1000, tenant="bob")
    store.limit_bytes = 120_000
    for tenant, name in (("bob", "mine"), ("bob", "other")):
        with pytest.raises(DiskFullError, match="sessions_mib"):
            keep(store, name, 1000, tenant=tenant, said=said)
    assert store.load_said("ann", "alice") == (before, said)
    assert (store.check(before), names(store, "bob")) == ("", ["mine"])
    assert store.load_said("bob", "mine")[1] == says("mine")
    assert len(list(store.folder.glob("*/*"))) == 6, "nothing of what was refused stays"


def test_a_cache_that_finds_no_room_is_said_to_be_none(store):
    store.limit_bytes = 2 * MIB
    keep(store, "talk", 1000, tenant="ann", said=says("x" * MIB))
    kept = keep(store, "alice", MIB * 3 // 2, tenant="bob")
    assert (kept.tokens, kept.file, "no room" in kept.why) == (0, "", True)
    assert store.load("bob", "alice") == kept
    assert store.load("ann", "talk").file, "to drop others' caches would not have helped"


def test_the_list_tells_in_words_why_a_cache_is_not_restored_and_which_setting_decides_it(store):
    store.limit_bytes = 2 * MIB
    keep(store, "large", 3 * MIB)
    keep(store, "old", MIB)
    keep(store, "cut", MIB * 3 // 2)
    os.truncate(store._cache(store.load("", "cut")), 9)
    keep(store, "gone", 1000)
    store._cache(store.load("", "gone")).unlink()
    keep(store, "small", 1000)
    whys = {info.name: info.why for info in store.all_of("", lambda kept: f"asked of {kept.name}")}
    assert whys == {
        "large": "gateway.sessions_mib=2 has no room for its 3.0 MiB: raise it, or delete sessions, and save it again",
        "old": "its 1.0 MiB made room for later ones: raise gateway.sessions_mib=2",
        "cut": "its file has 9 of 1,572,864 bytes: save it again",
        "gone": "its file is gone: save it again",
        "small": "asked of small",
    }


def engine(**changes):
    known = {"n_ctx": 8192, "slots_total": 4, "slot_folder": "/slots", "slot_seal": "ours", "kv_unified": False}
    return EngineInfo(**{"name": "e", "model": "m", "state": EngineState.READY} | known | changes)


@pytest.mark.parametrize(
    ("engines", "told"),
    [
        ([], ""),
        ([engine(model="other", slot_seal="theirs")], ""),
        ([engine(slot_seal="theirs"), engine()], ""),
        ([engine(slot_seal="theirs")], "`engine` settings"),
        ([engine(slots_total=8)], "its 2,000 tokens are more than the 1,024 of a slot"),
        ([engine(slots_total=8, kv_unified=True)], ""),
    ],
)
def test_a_cache_that_no_engine_could_take_now_is_told_without_trying(engines, told):
    kept = Kept(name="a", tenant="", model="m", message_count=1, file=new_name(), seal="ours", tokens=2000)
    why = unfit([(each, "") for each in engines], kept)
    assert told in why
    assert bool(told) == bool(why)


def test_a_manifest_of_another_version_keeps_its_files_and_one_with_more_fields_is_read(store, monkeypatch):
    kept = keep(store, "alice")
    keep(store, "bob", tenant="bob")
    for tenant, name, change in (("", "alice", {"format": 99}), ("bob", "bob", {"new_field": 1})):
        path = store._manifest(tenant, name)
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    place = store.place("")
    monkeypatch.setattr(session_store.time, "time", lambda: place.lstat().st_ctime + STALE_S + 9)
    keep(store, "carol")
    assert {(place / name).exists() for name in (kept.file, kept.said)} == {True}
    assert names(store, "bob") == ["bob"]
    store.delete("", "alice")
    assert not (place / kept.file).exists()


def test_a_manifest_that_cannot_be_written_leaves_no_cache_behind(store, monkeypatch):
    kept = keep(store, "alice")

    def full(path, _data):
        raise OSError(28, "No space left on device", str(path))

    for refused in (".new", ".said"):
        write = session_store.write_new
        monkeypatch.setattr(
            session_store, "write_new", lambda *a, end=refused, do=write: (full if a[0].suffix == end else do)(*a)
        )
        for name in ("alice", "bob"):
            with pytest.raises(OSError, match="No space"):
                keep(store, name)
        monkeypatch.undo()
        assert len(list(store.folder.glob("*/*"))) == 3
        assert store.load_said("", "alice") == (kept, says("alice"))


def test_saves_and_lists_read_nobodys_messages(store, monkeypatch):
    for tenant in ("ann", "bob"):
        kept = keep(store, "alice", tenant=tenant)
        (store.place(tenant) / kept.said).chmod(0o000)
    store.limit_bytes = 4000

    def never(_path):
        raise AssertionError("messages were read")

    monkeypatch.setattr(Said, "read", never)
    keep(store, "bob", 1500, tenant="bob")
    assert names(store, "bob") == ["alice", "bob"]
    assert max(path.stat().st_size for path in store.folder.glob("*/*.json")) < 1000


def test_a_tenant_has_a_bounded_number_of_sessions(store, monkeypatch):
    monkeypatch.setattr(session_store, "MOST_SESSIONS", 2)
    for name in ("a", "b", "a"):
        keep(store, name)
    with pytest.raises(ConfigError, match="delete some"):
        store.admit("", "c")
    with pytest.raises(ConfigError, match="delete some"):
        keep(store, "c")
    store.admit("", "b")
    store.admit("bob", "c")
    assert len(list(store.folder.glob("*/*.bin"))) == 2


def test_a_file_that_goes_while_others_are_counted_or_swept_harms_no_save(store, monkeypatch):
    keep(store, "alice")
    glob, gone = type(store.folder).glob, new_name()

    def listed(path, form):
        return [*glob(path, form), *([path / gone] if form in ("*/*", "lltm-*") else [])]

    monkeypatch.setattr(type(store.folder), "glob", listed)
    monkeypatch.setattr(session_store.time, "time", lambda: store.folder.lstat().st_ctime + STALE_S + 9)
    assert keep(store, "bob").tokens == 9


def test_what_is_not_there_is_called_by_its_name(store):
    for action in (store.delete, store.load, store.load_said):
        with pytest.raises(SessionNotFoundError, match="'nobody'"):
            action("", "nobody")
    with pytest.raises(SessionNotFoundError, match="'nobody'"):
        store.rename("", "nobody", "somebody")


def test_a_rename_takes_no_other_ones_name(store):
    keep(store, "a")
    keep(store, "b")
    with pytest.raises(ConfigError, match="already"):
        store.rename("", "a", "b")
    assert store.check(store.rename("", "a", "c")) == ""
    assert names(store) == ["b", "c"]


def test_a_conversation_is_left_open_where_its_next_turn_begins():
    user, answer = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}
    assert open_ended([user]) == [user]
    assert open_ended([user, answer]) == [user, answer, {"role": "user", "content": ""}]
    assert open_ended([{"role": "system", "content": "x"}])[-1]["role"] == "user"


def test_an_outcome_fits_into_a_header_whatever_was_said():
    offer = Offer()
    assert offer.header() == b"new"
    offer.refuse("it said:\r\nx-evil: ä " + "y" * 1000)
    assert offer.header().startswith(b"computed; it said: x-evil: ? yyy")
    assert len(offer.header()) == 300


def test_without_a_gateway_or_its_keys_it_is_said_what_to_do(tmp_path):
    with pytest.raises(FleetError, match="gateway"):
        sessions_of(None, None)
    with pytest.raises(ConfigError, match="api_key="):
        sessions_of("http://127.0.0.1:1", str(tmp_path / "keys.txt"))
    (tmp_path / "keys.txt").write_text("# ours\n\nfirst ann\nsecond\n")
    with pytest.raises(EngineNotReadyError, match="not listening"):
        sessions_of("http://127.0.0.1:1", str(tmp_path / "keys.txt")).list()


def test_an_answer_with_more_fields_than_are_known_is_read():
    info = _info({"name": "alice", "model": "m", "messages": [{"role": "user"}], "from_a_later_version": 1})
    assert (info.name, info.messages) == ("alice", ({"role": "user"},))


@pytest.mark.parametrize(
    ("name", "value", "is_fine"),
    [
        *(("host", host, True) for host in ("localhost:8080", "LOCALHOST", "127.0.0.1:1", "127.1.2.3", "[::1]:80")),
        *(("host", host, False) for host in ("", "evil.example:80", "127.0.0.1.evil.example", "10.0.0.1", "[::2]:80")),
        ("sec-fetch-site", "none", True),
        *(("sec-fetch-site", site, False) for site in ("same-origin", "same-site", "cross-site")),
        *(("origin", origin, False) for origin in ("null", "http://localhost:8080")),
    ],
)
def test_only_a_program_that_asks_for_this_machine_is_let_in(name, value, is_fine):
    headers = [(b"host", b"localhost")] if name != "host" else []
    headers.append((name.encode(), value.encode()))
    refused = None
    try:
        refuse_pages(headers, "127.0.0.1", is_open=True)
    except ConfigError as error:
        refused = error.field
    assert refused == (None if is_fine else name)
    refuse_pages([(b"host", b"gate.example")], "0.0.0.0", is_open=False)
