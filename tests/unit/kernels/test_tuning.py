"""Settings are measured once, kept on disk whole, and bounded."""

from __future__ import annotations

import json
import threading
from dataclasses import replace

import pytest

from lltm_ray.errors import ConfigError
from lltm_ray.kernels.tuning import FILE, Tuner, TuningKey, shape_class

CANDIDATES = ({"rows": 1, "warps": 4}, {"rows": 2, "warps": 4}, {"rows": 4, "warps": 8})


def key(kernel="softmax", shape=(1024, 64)):
    return TuningKey(kernel=kernel, device="A GPU", compute_capability=(9, 0), shape_class=shape, dtype="float16")


def measure_by(seconds, calls):
    def measure(settings):
        calls.append(settings)
        return seconds[settings["rows"]]

    return measure


def test_the_fastest_is_chosen_once_and_remembered_by_the_next_process(tmp_path):
    calls = []
    measure = measure_by({1: 3.0, 2: 1.0, 4: 2.0}, calls)
    first = Tuner(tmp_path / "deep" / "cache")
    assert first.choose(key(), CANDIDATES, measure) == CANDIDATES[1]
    assert first.choose(key(), CANDIDATES, measure) == CANDIDATES[1]
    assert Tuner(tmp_path / "deep" / "cache").choose(key(), CANDIDATES, measure) == CANDIDATES[1]
    assert len(calls) == 3


def test_device_capability_shape_type_and_kernel_are_told_apart():
    calls = []
    tuner = Tuner()
    measure = measure_by({1: 1.0, 2: 2.0, 4: 3.0}, calls)
    changes = {"kernel": "add", "device": "B", "compute_capability": (9, 1), "shape_class": (2,), "dtype": "float32"}
    for name, value in changes.items():
        tuner.choose(replace(key(), **{name: value}), CANDIDATES, measure)
    tuner.choose(key(), CANDIDATES, measure)
    assert len(tuner) == 6
    assert len(calls) == 18


def test_asking_for_what_is_remembered_measures_nothing():
    tuner = Tuner()
    assert tuner.remembered(key(), CANDIDATES) is None
    tuner.choose(key(), CANDIDATES, lambda settings: -settings["rows"])
    assert tuner.remembered(key(), CANDIDATES) == CANDIDATES[2]
    assert tuner.remembered(key(), CANDIDATES[:2]) is None


def test_a_remembered_choice_that_is_no_candidate_any_more_is_measured_anew(tmp_path):
    Tuner(tmp_path).choose(key(), CANDIDATES, measure_by({1: 1.0, 2: 2.0, 4: 3.0}, []))
    calls = []
    chosen = Tuner(tmp_path).choose(key(), CANDIDATES[1:], measure_by({2: 2.0, 4: 1.0}, calls))
    assert chosen == CANDIDATES[2]
    assert len(calls) == 2


def test_the_oldest_choices_go_first(tmp_path):
    tuner = Tuner(tmp_path, limit=3)
    for size in range(5):
        tuner.choose(key(shape=(size,)), CANDIDATES, lambda settings: settings["rows"])
    held = json.loads((tmp_path / FILE).read_text())["chosen"]
    assert [name.split("|")[3] for name in held] == ["2", "3", "4"]
    assert len(tuner) == 3


@pytest.mark.parametrize(
    "damage", ["", "{", "[]", '{"version": 0}', '{"version": 1}', '{"version": 1, "chosen": {"x": {"rows": "a"}}}']
)
def test_a_damaged_or_foreign_file_is_measured_over(tmp_path, damage):
    (tmp_path / FILE).write_text(damage)
    tuner = Tuner(tmp_path)
    assert len(tuner) == 0
    tuner.choose(key(), CANDIDATES, lambda settings: settings["rows"])
    assert len(Tuner(tmp_path)) == 1


def test_two_tuners_of_one_folder_keep_each_others_choices(tmp_path):
    one, other = Tuner(tmp_path), Tuner(tmp_path)
    one.choose(key("a"), CANDIDATES, lambda settings: settings["rows"])
    other.choose(key("b"), CANDIDATES, lambda settings: settings["rows"])
    assert len(Tuner(tmp_path)) == 2
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_threads_measure_a_key_once():
    calls = []
    tuner = Tuner()
    measure = measure_by({1: 1.0, 2: 2.0, 4: 3.0}, calls)
    threads = [threading.Thread(target=tuner.choose, args=(key(), CANDIDATES, measure)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 3


def test_what_cannot_run_is_never_chosen():
    tuner = Tuner()
    infinite = float("inf")
    assert tuner.choose(key(), CANDIDATES, measure_by({1: infinite, 2: infinite, 4: 9.0}, [])) == CANDIDATES[2]
    with pytest.raises(ConfigError, match="none of them runs"):
        tuner.choose(key("other"), CANDIDATES, lambda settings: infinite)
    with pytest.raises(ConfigError, match="at least one"):
        tuner.choose(key(), (), lambda settings: 1.0)
    with pytest.raises(ConfigError, match="limit"):
        Tuner(limit=0)


def test_a_shape_class_is_the_next_powers_of_two():
    assert shape_class(0, 1, 2, 3, 64, 65) == (0, 1, 2, 4, 64, 128)
