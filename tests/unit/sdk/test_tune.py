"""Rounds, time, failures and Ctrl-C of tuning, on made figures."""

from __future__ import annotations

import json
import shutil

import pytest
from typer.testing import CliRunner

from lltm_ray.cli import app
from lltm_ray.config import FleetConfig
from lltm_ray.errors import CancelledError, EngineStartError, LltmRayError
from lltm_ray.llamacpp.tuning.plan import Candidate
from lltm_ray.sdk.tune import LEAST_ROUNDS, MOST_ROUNDS, Visit, tune

CANDIDATES = [Candidate(name=name) for name in ("default", "guess", "more", "worse", "last")]
FIGURES = {"default": 100.0, "guess": 150.0, "more": 149.0, "worse": 20.0, "last": 100.0}


class Bench:
    """Gives made figures, with a little noise that differs by round, at a clock of its own."""

    def __init__(self, visit_s=1.0, fails=(), stop_after=None):
        self.now_s, self.visit_s, self.fails, self.stop_after = 0.0, visit_s, dict(fails), stop_after
        self.visits = []

    def measure(self, candidate, number):
        if len(self.visits) == self.stop_after:
            raise CancelledError("stopped")
        self.visits.append((number, candidate.name))
        self.now_s += self.visit_s
        if number >= self.fails.get(candidate.name, 99):
            raise EngineStartError("it does not fit")
        noise = 1 + 0.01 * ((7 * number + 3 * len(candidate.name)) % 5 - 2)
        return Visit(figure=FIGURES[candidate.name] * (1 + 0.3 * (number % 2)) * noise)

    def run(self, seconds=60.0, **options):
        options = {"higher_is_better": True} | options
        return tune(CANDIDATES, self.measure, seconds=seconds, clock=lambda: self.now_s, **options)


def states(found):
    return {row.candidate.name: row.state for row in found.rows}


def test_the_best_is_named_and_clear_losers_leave_early():
    bench = Bench()
    found = bench.run()
    assert found.chosen.name in {"guess", "more"}
    assert found.gain.low > 1.3
    assert states(found)["worse"].startswith("dropped after round")
    assert len([name for _, name in bench.visits if name == "worse"]) < found.rounds == MOST_ROUNDS
    assert found.rows[0].gain is None


def test_each_round_has_another_order():
    bench = Bench()
    bench.run(seconds=20.0)
    firsts = [next(name for number, name in bench.visits if number == wanted) for wanted in range(3)]
    assert firsts == ["default", "guess", "more"]


def test_of_seconds_the_least_is_the_best():
    found = Bench().run(higher_is_better=False)
    assert found.chosen.name == "worse"
    assert found.gain.ratio == pytest.approx(5, rel=0.1)


def test_time_for_two_measures_two_and_says_so_of_the_others():
    bench = Bench(visit_s=10.0)
    found = bench.run(seconds=30.0)
    assert {name for _, name in bench.visits} == {"default", "guess"}
    assert len(bench.visits) == 2 * LEAST_ROUNDS
    assert states(found)["more"] == states(found)["last"] == "no time was left for it"


def test_a_candidate_that_fails_is_a_row_and_not_the_end():
    found = Bench(fails={"guess": 0, "more": 1}).run()
    assert states(found)["guess"] == states(found)["more"] == "failed: the server did not start: it does not fit"
    assert found.chosen.name == "default"
    assert not found.interrupted


def test_one_visit_that_fails_does_not_cost_a_candidate_what_was_measured_of_it():
    bench, failed = Bench(), []

    def measure(candidate, number):
        if number == 1 and candidate.name not in failed:
            failed.append(candidate.name)
            raise LltmRayError("the machine stood still")
        return bench.measure(candidate, number)

    found = tune(CANDIDATES, measure, seconds=60.0, clock=lambda: bench.now_s, higher_is_better=True)
    assert set(failed) >= {"default", "guess"}
    assert not [state for state in states(found).values() if state.startswith("failed")]
    assert found.chosen.name in {"guess", "more"}


def test_when_all_fail_later_the_defaults_reason_is_told():
    def measure(candidate, number):
        if number or candidate.name == "guess":
            raise LltmRayError(f"{candidate.name} failed")
        return Visit(figure=FIGURES[candidate.name])

    with pytest.raises(LltmRayError, match="default failed"):
        tune(CANDIDATES, measure, seconds=60.0, clock=lambda: 0.0, higher_is_better=True)


def test_without_the_default_the_next_is_the_measure():
    found = Bench(fails={"default": 0}).run()
    assert found.baseline.name == "guess"
    assert {row.candidate.name: row.gain for row in found.rows}["worse"].ratio < 0.2


def test_when_nothing_can_be_measured_the_reason_is_told():
    with pytest.raises(LltmRayError, match="it does not fit"):
        Bench(fails=dict.fromkeys(FIGURES, 0)).run()


@pytest.mark.parametrize(("visits", "names_somebody"), [(3, False), (15, True)])
def test_stopping_leaves_what_was_found(visits, names_somebody):
    found = Bench(stop_after=visits).run()
    assert found.interrupted
    assert (found.gain is not None) == names_somebody


def test_stopped_before_anything_was_measured_is_an_error():
    with pytest.raises(CancelledError):
        Bench(stop_after=0).run()


def test_a_dry_run_tells_the_plan_and_starts_nothing(monkeypatch):
    monkeypatch.setattr("ray.init", lambda *_, **__: pytest.fail("Ray was started"))
    shown = CliRunner().invoke(app, ["tune", "--dry-run", "--workload", "rag", "--gpus", "0"])
    assert "slots each: guesses for " in shown.stderr
    assert shown.exit_code == 0, shown.output
    for word in ("default", "guess", "draft model", "n_parallel", "cache_reuse", "shifted"):
        assert word in shown.stdout
    plain = json.loads(CliRunner().invoke(app, ["tune", "--explain", "--json", "--gpus", "0"]).stdout)
    assert plain["workload"]["name"] == "chat"
    assert plain["candidates"][1]["changes"]["n_parallel"] > 0


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--workload", "poetry"], "chat, rag, batch"),
        (["--gpus", "64"], "this machine shows"),
        (["--gpus", "-1"], "must be 0"),
        (["--minutes", "0"], "minutes"),
        (["--workload", "embed"], "--dry-run"),
        (["--model", "no-such-model"], "no-such-model"),
    ],
)
def test_wrong_input_is_refused_before_anything_starts(arguments, told):
    shown = CliRunner().invoke(app, ["tune", *arguments])
    assert shown.exit_code in (1, 2)
    assert told in " ".join(shown.output.split())


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--out", "no-folder/x.toml"], "make the folder no-folder"),
        (["--out", "."], "give a file's name"),
        (["--out", "x.toml", "--dry-run"], "leave one of the two out"),
        (["--workload", "embed"], "--dry-run"),
    ],
)
def test_what_could_not_be_kept_or_measured_is_refused_before_a_model_is_looked_for(
    arguments, told, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lltm_ray.sdk.tune_facts.read_facts", lambda *_, **__: pytest.fail("a model was looked for"))
    shown = CliRunner().invoke(app, ["tune", *arguments])
    assert shown.exit_code == 2
    assert told in " ".join(shown.output.split())
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def made(monkeypatch):
    """Makes `tune` measure nothing; returns what else shall happen meanwhile."""
    meanwhile = []

    def measure(job, _seconds):
        found = tune(job.candidates, lambda *_: Visit(figure=1.0), seconds=0.01, higher_is_better=False)
        for each in meanwhile:
            each()
        return found, None

    monkeypatch.setattr("lltm_ray.cli.tune._measure", measure)
    return meanwhile


def test_the_file_is_the_fleet_that_was_measured(made, tmp_path):
    out, server = tmp_path / "fleet.toml", tmp_path / "llama-server"
    words = ["--gpus", "0", "--llama-server", str(server), "--memory-limit-gib", "1.5", "--out", str(out)]
    shown = CliRunner().invoke(app, ["tune", *words])
    assert shown.exit_code == 0, shown.output
    read = FleetConfig.from_toml(out)
    assert (read.model, read.llama_server, read.memory_limit_bytes) == ("tiny", str(server), 3 * 2**29)
    assert made == []


def test_what_was_found_is_shown_also_when_it_cannot_be_written(made, tmp_path):
    folder = tmp_path / "gone"
    folder.mkdir()
    made.append(lambda: shutil.rmtree(folder))
    shown = CliRunner().invoke(app, ["tune", "--gpus", "0", "--out", str(folder / "x.toml")])
    assert shown.exit_code == 2
    assert "guess" in shown.stdout
    assert "cannot be written" in shown.stderr
