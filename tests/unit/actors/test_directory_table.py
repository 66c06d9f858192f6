"""The directory's table, without Ray."""

import json

from lltm_ray.actors.directory_table import EXPIRE_AFTER_S, FORGET_AFTER_S, LATE, Table
from lltm_ray.records import Adapter, EngineInfo, EngineState, GatewayInfo
from lltm_ray.routing.rows import LATE_DETAIL

NOW = 1000.0


def engine(name="engine-0", **changes):
    settings = {"state": EngineState.READY, "url": "http://127.0.0.1:1", "server_pid": 11, "api_key": "secret"}
    return EngineInfo(name=name, model="tiny", **settings | changes)


def test_a_heartbeat_that_says_nothing_new_is_no_news(tmp_path):
    table = Table("f", tmp_path / "t.json")
    assert table.register(engine(), NOW)
    version = table.version
    assert not table.register(engine(), NOW + 1)
    assert table.version == version


def test_a_new_server_counts_as_a_restart_and_its_slots_are_free(tmp_path):
    table = Table("f", tmp_path / "t.json")
    table.register(engine(), NOW)
    table.report_busy({"engine-0": 3})
    assert table.status().engines[0].slots_busy == 3
    table.register(engine(state=EngineState.STARTING, url="", server_pid=None), NOW)
    table.register(engine(url="http://127.0.0.1:2", server_pid=12), NOW)
    seen = table.status().engines[0]
    assert (seen.restarts, seen.slots_busy, seen.server_pid) == (1, 0, 12)


def test_a_revived_gateway_finds_its_address(tmp_path):
    table = Table("f", tmp_path / "t.json")
    table.register_gateway(GatewayInfo(name="g", url="http://127.0.0.1:8000", state="ready", pid=1), NOW)
    table.register_gateway(GatewayInfo(name="g", url="", state="starting", pid=2), NOW)
    seen = table.status().gateways[0]
    assert (seen.url, seen.restarts, seen.state) == ("http://127.0.0.1:8000", 1, "starting")


def test_silence_makes_an_engine_failed_and_a_word_brings_it_back(tmp_path):
    table = Table("f", tmp_path / "t.json")
    table.register(engine(), NOW)
    assert not table.expire(NOW + EXPIRE_AFTER_S * 0.9)
    assert table.expire(NOW + EXPIRE_AFTER_S * 1.1)
    assert table.status().engines[0].state is EngineState.FAILED
    assert table.status().engines[0].detail.startswith(LATE)
    assert LATE == LATE_DETAIL, "routers know by these words that it may come back"
    assert not table.expire(NOW + EXPIRE_AFTER_S * 1.2), "told once"
    assert table.register(engine(), NOW + 10)
    assert table.status().engines[0].state is EngineState.READY


def test_who_was_not_heard_because_the_directory_stood_still_is_not_silent(tmp_path):
    table = Table("f", tmp_path / "t.json")
    table.register(engine(), NOW)
    table.register_gateway(GatewayInfo(name="g", url="u", state="ready"), NOW)
    assert not table.expire(NOW + 60, stood_s=59)
    assert not table.expire(NOW + 59 + EXPIRE_AFTER_S * 0.9)
    assert table.expire(NOW + 59 + EXPIRE_AFTER_S * 1.1)
    assert table.status().engines[0].detail.startswith(LATE)


def test_who_was_heard_after_the_directory_stood_still_is_not_taken_for_alive_any_longer_for_it(tmp_path):
    table = Table("f", tmp_path / "t.json")
    table.register(engine(), NOW)
    table.register(engine(), NOW + 60)  # its heartbeat waited, and was taken first
    assert not table.expire(NOW + 60, stood_s=59)
    assert table.expire(NOW + 60 + EXPIRE_AFTER_S * 1.1)


def test_a_replica_that_never_comes_back_is_forgotten_and_a_gateway_with_an_address_is_not(tmp_path):
    table = Table("f", tmp_path / "t.json")
    for name, url in (("gateway-0", "http://127.0.0.1:8000"), ("serve-x", "")):
        table.register_gateway(GatewayInfo(name=name, url=url, state="ready", pid=1), NOW)
    assert table.expire(NOW + EXPIRE_AFTER_S * 1.1)
    assert [each.name for each in table.status().gateways] == ["gateway-0", "serve-x"]
    assert table.expire(NOW + FORGET_AFTER_S * 1.1)
    assert [each.name for each in table.status().gateways] == ["gateway-0"]
    assert not table.expire(NOW + FORGET_AFTER_S * 1.2)


def test_the_table_survives_a_restart_and_its_version_grows(tmp_path):
    path = tmp_path / "run" / "t.json"
    first = Table("f", path)
    first.register(engine(gpu_ids=(0, 1), adapters=(Adapter(name="ada", scale=0.5),)), NOW)
    first.register_gateway(GatewayInfo(name="g", url="u", state="ready"), NOW)
    second = Table("f", path)
    assert second.version > first.version
    assert second.status().engines == first.status().engines
    assert second.status().gateways[0].url == "u"


def test_the_file_with_the_keys_is_private(tmp_path):
    path = tmp_path / "t.json"
    Table("f", path).register(engine(), NOW)
    assert json.loads(path.read_text())["engines"][0]["api_key"] == "secret"
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_broken_file_costs_nothing_but_itself(tmp_path):
    path = tmp_path / "t.json"
    path.write_text('{"engines": [{"name": 1}]}')
    assert Table("f", path).status().engines == ()


def test_what_people_see_holds_no_key(tmp_path):
    table = Table("f", tmp_path / "t.json")
    table.register(engine(), NOW)
    assert "secret" not in json.dumps(table.status().public())
    assert "secret" not in repr(table.status())


def test_a_full_disk_costs_the_file_and_nothing_else(tmp_path):
    (tmp_path / "run").write_text("a file where a folder should be")
    table = Table("f", tmp_path / "run" / "t.json")
    assert table.register(engine(), NOW)
    assert len(table.status().engines) == 1


def test_a_closed_table_does_not_come_back_to_disk(tmp_path):
    table = Table("f", tmp_path / "run" / "t.json")
    table.is_closed = True
    table.register(engine(), NOW)
    assert not (tmp_path / "run").exists()


def test_a_stopped_engine_shows_no_process_and_does_not_expire(tmp_path):
    table = Table("f", tmp_path / "t.json")
    table.register(engine(), NOW)
    table.register(engine(state=EngineState.STOPPED, url="", server_pid=None), NOW)
    assert table.status().engines[0].server_pid is None
    assert not table.expire(NOW + 100)


def test_what_was_taken_away_stays_away_when_the_directory_is_restarted(tmp_path):
    first = Table("f", tmp_path / "t.json")
    for name in ("engine-0", "engine-1"):
        first.register(engine(name), NOW)
    first.retire("engine-0")
    first.remove("engine-1")
    second = Table("f", tmp_path / "t.json")
    second.register(engine("engine-0"), NOW)
    assert [each.state for each in second.status().engines] == [EngineState.DRAINING]
    assert not second.register(engine("engine-1"), NOW), "its last heartbeat was under way"
    assert [each.name for each in second.status().engines] == ["engine-0"]


def test_a_name_is_not_given_again_after_a_restart_although_nobody_has_heard_of_its_engine_yet(tmp_path):
    assert Table("f", tmp_path / "t.json").new_name(()) == "engine-0"
    assert Table("f", tmp_path / "t.json").new_name(()) == "engine-1"


def test_what_a_gateway_closed_survives_a_restart(tmp_path):
    first = Table("f", tmp_path / "t.json")
    first.register_gateway(GatewayInfo(name="g", url="u", state="ready", closed=("engine-0",)), NOW)
    assert Table("f", tmp_path / "t.json").status().gateways[0].closed == ("engine-0",)


def test_gateways_get_the_salt_and_nobody_sees_it(tmp_path):
    salt = b"a secret of this fleet".ljust(32)
    table = Table("f", tmp_path / "t.json", salt=salt)
    table.register(engine(), NOW)
    seen = table.status()
    assert seen.salt == salt
    shown = f"{seen!r} {seen.public()} {(tmp_path / 't.json').read_text()}"
    assert "a secret of this fleet" not in shown
    assert salt.hex() not in shown


def test_a_failed_engine_is_explained_and_no_other(tmp_path):
    table = Table("f", tmp_path / "t.json")
    table.register(engine("a"), 0.0)
    assert not table.explain("a", "gone")
    assert not table.explain("b", "gone")
    table.expire(EXPIRE_AFTER_S + 1)
    version = table.version
    assert table.explain("a", f"{LATE}: waits")
    assert not table.explain("a", f"{LATE}: waits"), "no news"
    assert (table.status().engines[0].detail, table.version) == (f"{LATE}: waits", version + 1)
