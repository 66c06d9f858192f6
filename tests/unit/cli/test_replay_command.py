from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from lltm_ray.cli import app
from lltm_ray.routing.replay.trace import HEADER


def replay(*argv: str, wide: bool = True) -> Result:
    return CliRunner().invoke(app, ["replay", *argv], env={"COLUMNS": "200"} if wide else {})


def test_the_table_has_a_row_for_each_policy_and_what_deciding_costs() -> None:
    result = replay(
        "--synthetic", "multi-turn", "--requests", "100", "--policy", "residency", "--policy", "round-robin"
    )
    assert result.exit_code == 0, result.output
    for words in ("of ideal", "TTFT ms p50", "goodput", "decision µs p50", "state", "4 engines x 4 slots"):
        assert words in result.stdout
    for policy in ("residency", "round-robin"):
        assert result.stdout.count(f"\n{policy}") == 2


def test_json_has_everything_of_each_policy_and_the_ideal() -> None:
    result = replay("--synthetic", "shared-prompt", "--requests", "100", "--engines", "2", "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert [each["policy"] for each in told["policies"]] == ["residency", "least-loaded"]
    assert told["fleet"]["engines"] == 2
    assert 0 < told["ideal"]["reuse_ratio"] < 1
    for each in told["policies"]:
        assert each["requests"] == each["served"] == 100
        assert each["computed_tokens"] + each["cached_tokens"] == each["prompt_tokens"]
        assert each["reuse_of_ideal_ratio"] == pytest.approx(each["reuse_ratio"] / told["ideal"]["reuse_ratio"])
        assert each["ttft_s"]["p50"] <= each["ttft_s"]["p99"]
        assert each["decision_us"]["p99"] > 0
        assert each["state_peak_bytes"] > each["residency_peak_bytes"] > 0
    assert "garbage" in told["gc"]


def test_a_written_trace_plays_like_the_synthetic_one(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    made = ("--synthetic", "multi-turn", "--requests", "60", "--seed", "3")
    assert replay(*made, "--write", str(path)).exit_code == 0
    played, again = (json.loads(replay(*argv, "--json").stdout) for argv in (made, (str(path),)))
    for one, two in zip(played["policies"], again["policies"], strict=True):
        assert one["prompt_tokens"] == two["prompt_tokens"]
        assert one["cached_tokens"] == two["cached_tokens"]
    few = json.loads(replay(str(path), "--requests", "5", "--json").stdout)
    assert few["policies"][0]["requests"] == 5
    taken = replay(*made, "--write", str(path))
    assert taken.exit_code == 2
    assert "write=" in taken.stderr


def test_a_slower_engine_answers_later() -> None:
    argv = ("--synthetic", "unique", "--requests", "50", "--policy", "least-loaded", "--json", "--workload", "load=0.2")
    fast, slow = (
        json.loads(replay(*argv, "--engine", f"prefill_tokens_s={rate}").stdout)["policies"][0]["ttft_s"]["p50"]
        for rate in ("100000", "1000")
    )
    assert slow > 10 * fast


def test_the_help_lists_every_key_of_engine_workload_and_router() -> None:
    told = " ".join(replay("--help").stdout.split())
    for key in ("prefill_tokens_s=42300", "batch_tokens=2048", "allowance_s=inf", "long_ratio=0", "queue_limit=256"):
        assert key in told
    assert "residency_bytes=67108864" in told


def test_keys_given_again_change_engines_and_router() -> None:
    keys = ("--engine", "ram_tokens=0", "--engine", "decode_step_s=1", "--router", "queue_timeout_s=5")
    fleet = json.loads(replay("--synthetic", "unique", "--requests", "5", "--json", *keys).stdout)["fleet"]
    assert (fleet["spec"]["ram_tokens"], fleet["spec"]["decode_step_s"], fleet["queue_timeout_s"]) == (0, 1.0, 5.0)


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        ((), "give either a recorded trace or --synthetic KIND"),
        (("--synthetic", "chat"), "synthetic='chat'"),
        (("--synthetic", "unique", "--policy", "best"), "policy='best'"),
        (("--synthetic", "unique", "--engines", "0"), "engines=0"),
        (("--synthetic", "unique", "--slots", "0"), "slots=0"),
        (("--synthetic", "unique", "--workload", "load=0"), "load=0"),
        (("--synthetic", "unique", "--workload", "turns=0"), "turns=0"),
        (("--synthetic", "unique", "--workload", "turns=2.5"), "workload.turns=2.5: must be int"),
        (("--synthetic", "unique", "--workload", "turn=2"), "workload.turn=2: unknown setting; did you mean turns"),
        (("--synthetic", "unique", "--engine", "prefill_tokens_s=nan"), "prefill_tokens_s=nan"),
        (("--synthetic", "unique", "--engine", "decode_step_s=fast"), "engine.decode_step_s='fast': must be float"),
        (("--synthetic", "unique", "--engine", "decode_step_s"), "engine='decode_step_s': must be KEY=VALUE"),
        (("--synthetic", "unique", "--router", "queue_limit=-1"), "queue_limit=-1"),
        (("missing.jsonl",), "missing.jsonl"),
        (("missing.jsonl", "--synthetic", "unique"), "give either"),
        (("missing.jsonl", "--workload", "turns=2"), "workload.turns=2"),
    ],
)
def test_bad_input_is_named_and_ends_with_code_2(argv: tuple[str, ...], named: str) -> None:
    result = replay(*argv)
    assert result.exit_code == 2
    assert named in " ".join(result.stderr.split())
    assert not result.stdout


def test_a_trace_without_requests_or_with_a_bad_line_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(json.dumps(HEADER) + "\n")
    empty = replay(str(path))
    assert (empty.exit_code, "has no requests" in empty.stderr) == (2, True)
    path.write_text(json.dumps(HEADER) + '\n{"arrived_s": 1}\n')
    bad = replay(str(path))
    assert bad.exit_code == 2
    assert "trace, line 2, prompt_tokens=None" in bad.stderr
