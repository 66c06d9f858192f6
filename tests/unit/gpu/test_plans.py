"""Plans for models whose sizes are known, on machines that are described; and against what was measured."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from lltm_ray import cli
from lltm_ray._roofline import decode_s
from lltm_ray.cli import app
from lltm_ray.cli._sizes import parse_bytes, parse_gpus
from lltm_ray.cli.plan import here, need_of, shape_of, up_line
from lltm_ray.config import EngineConfig, FleetConfig, build
from lltm_ray.errors import ConfigError
from lltm_ray.gpu.plan_parts import GIB, KINDS, Machine, Plan, PlanGpu, Wish
from lltm_ray.gpu.plans import NEAR, choose
from lltm_ray.gpu.topology import Pair, read_topology
from lltm_ray.llamacpp.command import build_args, read_args
from lltm_ray.models.gguf import GgufInfo
from tests.unit.models.test_memory import model

UP = Path(cli.__file__).with_name("up.py")
T4 = PlanGpu(total_bytes=15 * GIB, free_bytes=int(14.7 * GIB), bytes_s=320e9, flops=8.1e12)
H200 = PlanGpu(total_bytes=140 * GIB, free_bytes=139 * GIB, bytes_s=4.917e12, flops=67e12)
T4_PAIR = Machine(gpus=(T4, T4), ram_bytes=30 * GIB)
"""PCIe between them, as the default link."""


def llama(gib: float, n_params: float, **shape: Any) -> GgufInfo:
    """Layers of so many GiB in all, embeddings besides."""
    fields = {"key_length": 128, "value_length": 128} | shape
    info = model(layer_bytes=int(gib * GIB / fields["n_layer"]), **fields)
    return replace(info, n_params=int(n_params))


EIGHT_Q4 = llama(3.97, 8.03e9, n_layer=32, n_embd=4096, n_head_kv=8, n_ff=14336, n_vocab=128_256)
THIRTEEN_Q8 = llama(12.5, 13e9, n_layer=40, n_embd=5120, n_head=40, n_head_kv=40, n_ff=13824, n_vocab=32_000)
SEVENTY_Q4 = llama(38, 70e9, n_layer=80, n_embd=8192, n_head=64, n_head_kv=8, n_ff=28672, n_vocab=128_256)
MEASURED = llama(
    1.8, 1.28e9, n_layer=16, n_embd=2048, n_head_kv=8, n_ff=8192, n_vocab=152_000, embedding_bytes=GIB // 2
)
"""The model of README's table of fleets on H200s: 1.3 B parameters in F16."""
FIVE = llama(9.75, 5.25e9, n_layer=24, n_embd=4096, n_head_kv=8, n_ff=14336, n_vocab=354)
"""Of README's table of plans on two H200s: 5.3 B parameters in F16, of a small vocabulary."""
TENSOR = "1 x 2 GPUs (tensor)"


def plans(info: GgufInfo, machine: Machine, wish: Wish | None = None, **config: Any) -> tuple[Plan, ...]:
    wish, engine = wish or Wish(), EngineConfig(**config)
    return choose(shape_of(info, engine), machine, wish, need_of(info, engine, wish.slot_tokens))


def kinds(found: tuple[Plan, ...]) -> list[str]:
    return [plan.kind for plan in found if plan.fits]


def named(found: tuple[Plan, ...], title: str) -> Plan:
    return next(plan for plan in found if plan.title == title)


def test_an_8b_in_four_bits_runs_once_on_each_t4() -> None:
    found = plans(EIGHT_Q4, T4_PAIR)
    best = found[0]
    assert (best.title, best.n_parallel, best.n_gpu_layers) == ("2 x 1 GPU", 4, 33)
    assert best.why.startswith("one engine per GPU; an engine takes 7.")
    assert f"x the tokens/s of {TENSOR}" in best.why
    assert named(found, "1 x 2 GPUs (layer)").why.endswith("the GPUs of a layer split work in turn")
    assert not named(found, "8 x 0.25 GPU").fits


def test_a_13b_in_eight_bits_needs_both_t4s() -> None:
    found = plans(THIRTEEN_Q8, T4_PAIR, Wish(streams=4))
    assert not named(found, "2 x 1 GPU").fits
    assert kinds(found)[:2] == ["layer", "tensor"]
    assert found[0].tensor_splits == ((0.5, 0.5),)
    assert found[0].need_bytes > T4.free_bytes


def test_a_70b_spans_both_t4s_and_the_host() -> None:
    found = plans(SEVENTY_Q4, T4_PAIR, Wish(streams=2, slot_tokens=2048))
    assert found[0].title == "1 x 2 GPUs + CPU"
    assert 0 < found[0].n_gpu_layers < 80
    assert named(found, "1 x 2 GPUs (layer)").why.startswith("does not fit: an engine takes 4")
    small = plans(SEVENTY_Q4, replace(T4_PAIR, ram_bytes=4 * GIB), Wish(streams=2, slot_tokens=2048))
    assert kinds(small) == []


def test_a_context_that_is_eight_times_as_long_is_counted() -> None:
    short, long = (
        named(plans(EIGHT_Q4, T4_PAIR, Wish(streams=2, slot_tokens=tokens)), "2 x 1 GPU") for tokens in (4096, 32_768)
    )
    assert long.need_bytes - short.need_bytes > 2 * GIB


def test_gpus_of_different_size_divide_a_model_by_their_free_memory() -> None:
    pair = replace(T4_PAIR, gpus=(T4, replace(T4, total_bytes=30 * GIB, free_bytes=int(29.4 * GIB))))
    layer = named(plans(THIRTEEN_Q8, pair, Wish(streams=4)), "1 x 2 GPUs (layer)")
    assert layer.tensor_splits == ((0.333, 0.667),)
    alone, tensor = (named(plans(THIRTEEN_Q8, pair, Wish(streams=4)), each) for each in ("2 x 1 GPU", TENSOR))
    assert alone.budget_bytes < 15 * GIB  # the smaller one decides: engines are alike
    assert (tensor.budget_bytes, tensor.tensor_splits) == (2 * alone.budget_bytes, ((0.5, 0.5),))


@pytest.mark.parametrize("info", [EIGHT_Q4, THIRTEEN_Q8, SEVENTY_Q4], ids=["8b", "13b", "70b"])
def test_the_order_of_unequal_gpus_does_not_matter(info: GgufInfo) -> None:
    def rated(*gpus: PlanGpu) -> list[tuple[Any, ...]]:
        found = plans(info, replace(T4_PAIR, gpus=gpus))
        speeds = ("tokens_s", "stream_tokens_s", "prefill_x", "prefill_tokens_s")
        return [
            (plan.title, plan.fits, plan.budget_bytes, plan.why, *(getattr(plan, name) for name in speeds))
            for plan in found
        ]

    assert rated(T4, H200, T4, H200) == rated(H200, H200, T4, T4) == rated(T4, T4, H200, H200)


def test_each_engine_is_rated_on_its_own_gpus_and_they_add_up() -> None:
    one, other, both = (
        named(plans(EIGHT_Q4, replace(T4_PAIR, gpus=gpus), Wish(streams=4 * len(gpus))), f"{len(gpus)} x 1 GPU")
        for gpus in ((T4,), (H200,), (T4, H200))
    )
    assert both.tokens_s == pytest.approx((one.tokens_s or 0) + (other.tokens_s or 0))
    assert both.prefill_tokens_s == pytest.approx((one.prefill_tokens_s or 0) + (other.prefill_tokens_s or 0))
    assert both.stream_tokens_s == one.stream_tokens_s
    wide = named(plans(THIRTEEN_Q8, replace(T4_PAIR, gpus=(H200, T4, T4, H200))), "2 x 2 GPUs (layer)")
    assert wide.groups == ((0, 3), (1, 2))
    assert wide.budget_bytes < 2 * T4.total_bytes, "the two small ones may meet"
    uneven = replace(T4, free_bytes=T4.free_bytes // 2)
    split = named(plans(EIGHT_Q4, replace(T4_PAIR, gpus=(uneven, T4, H200, H200))), "2 x 2 GPUs (layer)")
    assert split.tensor_splits == ((0.5, 0.5), (0.333, 0.667))
    dark = plans(EIGHT_Q4, replace(T4_PAIR, gpus=(H200, replace(T4, bytes_s=None))))
    assert named(dark, "2 x 1 GPU").tokens_s is None


@pytest.mark.parametrize(
    ("info", "gpus", "title", "streams", "tokens_s"),
    [
        (MEASURED, 1, "1 x 1 GPU", 64, 1457),
        (MEASURED, 1, "2 x 0.5 GPU", 64, 2978),
        (MEASURED, 1, "4 x 0.25 GPU", 64, 4663),
        (MEASURED, 2, "2 x 1 GPU", 64, 3102),
        (MEASURED, 2, "4 x 0.5 GPU", 64, 5083),
        (FIVE, 2, "2 x 1 GPU", 1, 275),
        (FIVE, 2, "2 x 1 GPU", 16, 2601),
        (FIVE, 2, "4 x 0.5 GPU", 16, 1339),
        (FIVE, 2, "1 x 2 GPUs (layer)", 1, 275),
        (FIVE, 2, "1 x 2 GPUs (layer)", 16, 2202),
        (FIVE, 2, "1 x 2 GPUs (tensor)", 1, 301),
        (FIVE, 2, "1 x 2 GPUs (tensor)", 16, 2109),
    ],
)
def test_speeds_are_within_12_percent_of_those_measured_on_h200s(
    info: GgufInfo, gpus: int, title: str, streams: int, tokens_s: float
) -> None:
    machine = Machine(gpus=(H200,) * gpus, link_bytes_s=450e9, is_nvlink=True, ram_bytes=100 * GIB)
    found = plans(info, machine, Wish(streams=streams, slot_tokens=512))
    assert named(found, title).tokens_s == pytest.approx(tokens_s, rel=0.12)


@pytest.mark.parametrize(("streams", "tokens_s"), [(1, 783), (8, 3663), (32, 9666), (64, 13_004)])
def test_steps_without_sampling_are_as_llama_batched_bench_measured_them(streams: int, tokens_s: float) -> None:
    """On an H200, 1.3 B parameters in Q4_K_M: 0.8 GB in 16 layers."""
    assert streams / decode_s(0.8e9 / 4.917e12, layers=16, streams=streams) == pytest.approx(tokens_s, rel=0.07)


def test_several_engines_on_a_gpu_pay_where_sampling_is_the_limit() -> None:
    found = plans(MEASURED, Machine(gpus=(H200,), ram_bytes=100 * GIB), Wish(streams=64, slot_tokens=512))
    assert found[0].title == "4 x 0.25 GPU"
    assert "one CPU thread" in found[0].why
    quiet = plans(MEASURED, Machine(gpus=(H200,), ram_bytes=100 * GIB), Wish(streams=1))
    assert quiet[0].title == "1 x 1 GPU"


def test_a_tensor_split_is_worth_more_over_a_faster_link() -> None:
    slow, fast = (
        named(plans(EIGHT_Q4, replace(T4_PAIR, link_bytes_s=link, is_nvlink=link > 1e11)), TENSOR).tokens_s
        for link in (1e9, 450e9)
    )
    assert slow is not None
    assert fast is not None
    assert fast > slow


def test_a_tensor_split_is_told_but_neither_taken_nor_possible_with_a_quantized_cache() -> None:
    machine = Machine(gpus=(H200, H200), link_bytes_s=450e9, is_nvlink=True)
    found = plans(SEVENTY_Q4, machine, Wish(streams=1))
    best, tensor = found[0], named(found, TENSOR)
    assert (best.title, tensor.split_mode) == ("2 x 1 GPU", "tensor")
    assert (tensor.tokens_s or 0) > (best.tokens_s or 0) / NEAR
    assert "experimental in llama.cpp" in tensor.why
    assert "tensor" not in kinds(plans(SEVENTY_Q4, machine, cache_type_k="q8_0", cache_type_v="q8_0"))
    assert "row" not in {plan.split_mode for plan in found}, "llama.cpp's CUDA backend refuses it"


def test_nvlinks_count_although_nvml_does_not_tell_their_speed() -> None:
    pair = Pair(a=0, b=1, nvlinks=18, level=None, p2p="ok", bytes_s=None, untold={})
    machine = here(replace(read_topology(), gpus=(), pairs=(pair,)))
    assert (machine.link_bytes_s, machine.is_nvlink) == (450e9, True)
    assert here(replace(read_topology(), gpus=(), pairs=(replace(pair, nvlinks=0),))) == Machine()


def test_unknown_bandwidth_gives_no_speeds_and_ranks_by_fit() -> None:
    dark = replace(T4_PAIR, gpus=(replace(T4, bytes_s=None),) * 2)
    found = plans(EIGHT_Q4, dark)
    assert found[0].kind == "replicas"
    assert found[0].tokens_s is None
    assert "not known" in found[0].why


def test_experts_that_are_not_used_are_not_read() -> None:
    dense = shape_of(EIGHT_Q4, EngineConfig())
    mixed = replace(dense, expert_ratio=0.9, expert_use=0.125)
    assert mixed.read_ratio(1) == pytest.approx(0.1 + 0.9 * 0.125)
    assert mixed.read_ratio(64) == pytest.approx(1.0, abs=0.001)
    assert dense.read_ratio(1) == 1.0


@given(
    gpus=st.integers(1, 4),
    gib=st.floats(1, 200),
    streams=st.integers(1, 64),
    slot_tokens=st.integers(256, 32_768),
    ram_gib=st.integers(1, 256),
)
def test_what_fits_stands_first_and_every_plan_has_a_reason(
    gpus: int, gib: float, streams: int, slot_tokens: int, ram_gib: int
) -> None:
    gpu = replace(T4, total_bytes=int(gib * GIB), free_bytes=int(gib * GIB))
    machine = Machine(gpus=(gpu,) * gpus, ram_bytes=ram_gib * GIB)
    found = plans(EIGHT_Q4, machine, Wish(streams=streams, slot_tokens=slot_tokens))
    fits = [plan.fits for plan in found]
    assert fits == sorted(fits, reverse=True)
    for plan in found:
        assert plan.why
        assert plan.kind in KINDS
        assert plan.engines * plan.n_parallel >= streams
        assert not plan.fits or plan.need_bytes <= plan.budget_bytes
        assert plan.engines * plan.gpu_share <= gpus


def test_more_memory_never_makes_the_best_plan_slower() -> None:
    speeds = []
    for gib in (6, 8, 10, 12, 16, 24, 48):
        gpu = replace(T4, total_bytes=gib * GIB, free_bytes=gib * GIB)
        best = plans(EIGHT_Q4, replace(T4_PAIR, gpus=(gpu, gpu)))[0]
        speeds.append(best.tokens_s or 0.0)
    assert all(late >= 0.85 * early for early, late in pairwise(speeds))


@pytest.mark.parametrize("kind", ["layer", "row"])
def test_a_split_reaches_llama_server_also_without_a_tensor_split(kind: str) -> None:
    """The setting of another SDK was lost unless `tensor_split` was given."""
    args = build_args(
        EngineConfig(split_mode=kind, main_gpu=1),
        model_path="/m.gguf",
        host="127.0.0.1",
        port=1,
        alias="m",
        api_key_file=None,
    )
    found = read_args(args)
    assert (found["--split-mode"], found["--main-gpu"]) == (kind, 1)
    assert "--tensor-split" not in found


def test_the_line_that_is_printed_starts_the_fleet_that_was_planned() -> None:
    tensor = named(plans(THIRTEEN_Q8, T4_PAIR, Wish(streams=4)), TENSOR)
    command, table = up_line("m.gguf", tensor, "q8_0")
    assert command == (
        "lltm-ray up --config plan.toml --model m.gguf --engines 1 --gpu-share 2 --n-parallel 4 --ctx 16384"
        " --split-mode tensor"
    )
    import tomllib

    fleet = build(FleetConfig, {"model": "m.gguf", "gpu_share": 2.0} | tomllib.loads(table))
    assert (fleet.engine.cache_type_k, fleet.engine.cache_type_v) == ("q8_0", "q8_0")
    options = set(re.findall(r"^    (\w+): Annotated", UP.read_text(encoding="utf-8"), re.MULTILINE))
    assert {word[2:].replace("-", "_") for word in command.split() if word.startswith("--")} <= options


def plan_command(*argv: str) -> Result:
    return CliRunner().invoke(app, ["plan", *argv], env={"COLUMNS": "200"})


def test_the_command_plans_for_machines_that_are_only_described() -> None:
    result = plan_command("tiny", "--gpus", "2", "--vram", "16GiB", "--bandwidth", "320", "--ram", "32G")
    assert result.exit_code == 0
    assert "lltm-ray up --model tiny --engines" in result.stdout
    assert "slots each: for 8 requests at once over all engines (--streams)" in result.stderr
    assert "No split by rows" in result.stderr
    told = json.loads(plan_command("tiny", "--gpus", "2", "--vram", "16GiB", "--json").stdout)
    assert [gpu["total_bytes"] for gpu in told["machine"]["gpus"]] == [16 * GIB] * 2
    assert told["plans"][0]["fits"]
    assert told["up"]["command"].startswith("lltm-ray up")


def test_a_model_that_only_the_catalogue_knows_cannot_be_planned_and_it_is_said_what_brings_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    result = plan_command("llama-3.2-1b-q4_k_m", "--gpus", "1", "--vram", "16GiB")
    told = " ".join(result.stderr.split())
    assert result.exit_code == 1
    assert "its file is not here, and the catalogue has no layers and heads to plan with" in told
    assert "`lltm-ray models pull llama-3.2-1b-q4_k_m`" in told


def test_what_does_not_fit_is_an_error_with_a_remedy_after_the_table() -> None:
    result = plan_command("tiny", "--gpus", "1", "--vram", "1MiB", "--ram", "1MiB")
    assert result.exit_code == 1
    assert "smaller quantization" in result.stderr
    assert "too much" in result.stdout


def test_without_a_gpu_the_plan_is_for_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    if read_topology().gpus:
        monkeypatch.setattr("lltm_ray.cli.plan.read_topology", lambda: replace(read_topology(), gpus=(), pairs=()))
    result = plan_command("tiny")
    assert result.exit_code == 0
    assert "--gpu-share 0 " in result.stdout


@pytest.mark.parametrize(
    ("argv", "field"),
    [
        (["--gpus", "2"], "gpus"),
        (["--vram", "16GiB"], "vram"),
        (["--gpus", "2", "--vram", "much"], "vram"),
        (["--gpus", "-1", "--vram", "1G"], "gpus"),
        (["--gpus", "1", "--vram", "1G", "--bandwidth", "0"], "bandwidth"),
        (["--streams", "0"], "streams"),
        (["--slot-ctx", "10"], "slot_tokens"),
        (["--cache-type", "f8"], "cache_type_k"),
    ],
)
def test_what_cannot_be_is_refused_by_its_name(argv: list[str], field: str) -> None:
    result = plan_command("tiny", *argv)
    assert result.exit_code == 2
    assert field in result.stderr


def test_sizes_are_read_in_both_systems() -> None:
    sizes = [parse_bytes("vram", each) for each in ("16GiB", "80 GB", "1.5g", "7000000b")]
    assert sizes == [16 * GIB, 80 * 10**9, 1_500_000_000, 7_000_000]
    assert parse_gpus("vram", "2X16GiB,1x8G") == [16 * GIB, 16 * GIB, 8 * 10**9]
    for wrong in ("16", "16 gallons", "0GiB", "-1", "4i", "9" * 400):
        with pytest.raises(ConfigError, match="vram"):
            parse_bytes("vram", wrong)


def test_a_machine_without_gpus_has_none_to_plan_with() -> None:
    assert here(replace(read_topology(), gpus=(), pairs=())) == Machine()
    with pytest.raises(ConfigError, match="ram_bytes"):
        plans(EIGHT_Q4, Machine())
