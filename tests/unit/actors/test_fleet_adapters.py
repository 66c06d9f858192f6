"""A fleet's adapters while others change them too: a real table, engines that take what it says, no Ray."""

from types import SimpleNamespace

import gguf
import pytest

from lltm_ray.actors import adapters
from lltm_ray.actors.adapters import FleetAdapters
from lltm_ray.actors.directory_table import Table
from lltm_ray.actors.launch import models_of
from lltm_ray.config import FleetConfig
from lltm_ray.errors import ConfigError, EngineStartError, FleetError, ModelNotFoundError
from lltm_ray.records import Adapter, EngineInfo, EngineState
from tests.process.gateway_harness import write_adapter

EVE = Adapter(name="eve", path="/eve.gguf")


class Call:
    """A method of an actor: called when its answer is asked for, once."""

    def __init__(self, work):
        self._work = work

    def remote(self, *args):
        return lambda: self._work(*args)


class Engines:
    """Handles by name; `restart` gives an engine what the table says, as `EngineAdapters.dress` does."""

    def __init__(self, table):
        self.table, self.restarted, self.on_restart, self.on_scale = table, [], {}, {}

    def __call__(self, _fleet, name):
        return SimpleNamespace(
            restart=Call(lambda drain_s: self._restart(name, drain_s)),
            set_scales=Call(lambda scales: self._scale(name, scales)),
            check_adapters=Call(lambda _: None),
        )

    def put(self, name, worn, state=EngineState.READY):
        self.table.register(EngineInfo(name=name, model="random", state=state, adapters=worn), 0.0)

    def worn(self, name):
        return next(each.adapters for each in self.table.status().engines if each.name == name)

    def _restart(self, name, _drain_s):
        self.restarted.append(name)
        if act := self.on_restart.pop(name, None):
            act()
        self.put(name, self.table.status().models[0].adapters)

    def _scale(self, name, scales):
        if act := self.on_scale.pop(name, None):
            act()
        self.put(name, tuple(Adapter(name=each.name, now=scales.get(each.name, each.now)) for each in self.worn(name)))


@pytest.fixture
def table(tmp_path):
    return Table("f", tmp_path / "table.json", models_of(FleetConfig(model="random", gpu_share=0.0)))


@pytest.fixture
def engines(table, monkeypatch):
    made = Engines(table)
    monkeypatch.setattr(adapters, "get_engine", made)
    monkeypatch.setattr(adapters.ray, "get", lambda call, timeout: call())
    monkeypatch.setattr(adapters.ray, "cancel", lambda call: None)
    for name in ("PROPAGATE_S", "_PAUSE_S"):
        monkeypatch.setattr(adapters, name, 0.0)
    return made


@pytest.fixture
def of_fleet(table, engines):
    directory = SimpleNamespace(note_adapters=Call(table.note_adapters))
    config = FleetConfig(model="random", gpu_share=0.0, name="f")
    return FleetAdapters(SimpleNamespace(config=config, status=table.status, directory=directory))


def wanted(table):
    return table.status().models[0].adapters


def names_of(listed):
    return [each.name for each in listed]


def write(table, *listed):
    assert table.note_adapters("random", wanted(table), listed)


def fail():
    raise EngineStartError("no memory")


def test_a_load_that_fails_takes_back_its_own_adapter_only_and_every_engine_follows(table, engines, of_fleet):
    for name in ("a", "b"):
        engines.put(name, ())
    engines.on_restart["b"] = lambda: (write(table, *wanted(table), EVE), fail())  # somebody else loads eve meanwhile
    with pytest.raises(FleetError, match=r"b: .*no memory \(set back on a, b\)"):
        of_fleet.load("/ada.gguf", None, 1.0, None)
    assert names_of(wanted(table)) == ["eve"]
    assert [names_of(engines.worn(name)) for name in ("a", "b")] == [["eve"], ["eve"]]
    assert engines.restarted == ["a", "b", "a", "b"]


def test_an_unload_that_fails_puts_its_adapter_back_where_it_was(table, engines, of_fleet):
    write(table, *(Adapter(name=name) for name in "xyz"))
    engines.put("a", wanted(table))
    engines.on_restart["a"] = lambda: (write(table, *wanted(table), EVE), fail())
    with pytest.raises(FleetError, match="no memory"):
        of_fleet.unload("y")
    assert names_of(wanted(table)) == names_of(engines.worn("a")) == ["x", "y", "z", "eve"]


def test_engines_are_set_back_even_if_nobody_takes_the_note(table, engines, of_fleet, monkeypatch):
    engines.put("a", ())

    def break_table():
        monkeypatch.setattr(of_fleet, "_write", lambda *_: False)
        fail()

    engines.on_restart["a"] = break_table
    with pytest.raises(FleetError, match="somebody else"):
        of_fleet.load("/ada.gguf", None, 1.0, None)
    assert engines.restarted == ["a", "a"]


def test_two_loads_at_once_both_come_to_their_ends(table, engines, of_fleet):
    engines.put("a", ())
    engines.on_restart["a"] = lambda: of_fleet.load("/eve.gguf", None, 1.0, None)
    of_fleet.load("/ada.gguf", None, 1.0, None)
    assert names_of(engines.worn("a")) == names_of(wanted(table)) == ["ada", "eve"]


def test_an_engine_that_read_the_old_scale_while_it_was_changed_is_told_too(table, engines, of_fleet):
    write(table, EVE)
    engines.put("a", (EVE,))
    engines.on_scale["a"] = lambda: engines.put("late", (EVE,), EngineState.STARTING)
    of_fleet.set_scale("eve", 0.5)
    assert [engines.worn(name)[0].own for name in ("a", "late")] == [0.5, 0.5]


def test_a_scale_that_is_not_taken_is_set_back_where_nobody_changed_it(table, engines, of_fleet):
    write(table, EVE)
    engines.put("a", (EVE,))
    engines._scale = lambda *_: fail()
    with pytest.raises(FleetError, match="no memory"):
        of_fleet.set_scale("eve", 0.5)
    assert wanted(table)[0].now is None


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LLTM_RAY_CACHE", str(tmp_path))


def test_without_a_ready_engine_the_files_are_read_here(table, engines, of_fleet, cache, tmp_path):
    write_adapter(tmp_path / "ada.gguf")
    writer = gguf.GGUFWriter(tmp_path / "wrong.gguf", "llama")
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    with pytest.raises(ConfigError, match="is no LoRA adapter"):
        of_fleet.load(tmp_path / "wrong.gguf", None, 1.0, None)
    with pytest.raises(ModelNotFoundError):
        of_fleet.load(tmp_path / "none.gguf", None, 1.0, None)
    assert wanted(table) == ()
    of_fleet.load(tmp_path / "ada.gguf", None, 1.0, None)
    assert names_of(wanted(table)) == ["ada"]
    (tmp_path / "ada.gguf").unlink()
    of_fleet.unload("ada")
    assert wanted(table) == ()


def test_a_model_that_is_not_here_and_runs_nowhere_gets_no_adapter(table, engines, of_fleet, cache, tmp_path):
    write_adapter(tmp_path / "ada.gguf")
    of_fleet._fleet.config = FleetConfig(model=str(tmp_path / "gone.gguf"), served_name="random", gpu_share=0.0)
    with pytest.raises(FleetError, match="start an engine, then load it again"):
        of_fleet.load(tmp_path / "ada.gguf", None, 1.0, None)
    assert wanted(table) == ()
