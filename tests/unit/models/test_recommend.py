"""Recommendations, against llama-quantize's own sizes (`python -m tests.peers.file_types` writes file_sizes.json)."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lltm_ray.cli import app
from lltm_ray.config import EngineConfig
from lltm_ray.errors import ConfigError
from lltm_ray.gpu.nvml import Inventory
from lltm_ray.models.catalog import load_catalog
from lltm_ray.models.file_types import FILE_TYPES, file_type_of, quantized
from lltm_ray.models.gguf import read_gguf
from lltm_ray.models.gpus import COMMON, common_gpus, fit_gpus
from lltm_ray.models.memory import estimate
from lltm_ray.models.recommend import guess_memory, recommend, recommend_entry, recommend_models, type_in_name
from lltm_ray.records import GpuInfo
from tests.peers.file_types import SHAPES
from tests.sparse_models import LLAMA_8B, LLAMA_70B, write_sparse

GIB = 2**30
SIZES = json.loads(Path(__file__).with_name("file_sizes.json").read_text(encoding="utf-8"))
OLD_REGISTRY = {
    "gemma-3-1b-Q4_K_M": "gemma-3-1b-q4_k_m", "gemma-3-1b-Q5_K_M": "gemma-3-1b-q4_k_m",
    "gemma-2-2b-Q4_K_M": "gemma-2-2b-q4_k_m", "llama-3.1-8b-Q4_K_M": "llama-3.1-8b-q4_k_m",
    "llama-3.1-8b-Q5_K_M": "llama-3.1-8b-q4_k_m", "phi-3-mini-Q4_K_M": "phi-3-mini-4k-q4",
    "phi-3-mini-Q5_K_M": "phi-3.5-mini-q4_k_m", "mistral-7b-Q4_K_M": "mistral-7b-v0.3-q4_k_m",
    "mistral-7b-Q5_K_M": "mistral-7b-v0.3-q4_k_m", "tinyllama-1.1b-Q5_K_M": "tinyllama-1.1b-q4_k_m",
    "gemma-3-4b-Q4_K_M": "gemma-3-4b-q4_k_m", "gemma-3-12b-Q4_K_M": "gemma-3-12b-q4_k_m",
    "llama-3.2-1b-Q4_K_M": "llama-3.2-1b-q4_k_m", "llama-3.2-3b-Q4_K_M": "llama-3.2-3b-q4_k_m",
    "qwen-2.5-1.5b-Q4_K_M": "qwen2.5-1.5b-q4_k_m", "qwen-2.5-3b-Q4_K_M": "qwen2.5-3b-q4_k_m",
    "qwen-2.5-7b-Q4_K_M": "qwen2.5-7b-q4_k_m", "deepseek-r1-1.5b-Q4_K_M": "deepseek-r1-qwen-1.5b-q4_k_m",
    "deepseek-r1-7b-Q4_K_M": "deepseek-r1-qwen-7b-q4_k_m", "phi-4-Q4_K_M": "phi-4-14b-q4_k_m",
    "mistral-7b-v0.3-Q4_K_M": "mistral-7b-v0.3-q4_k_m",
}  # fmt: skip
"""A name of llamatelemetry's registry -> the entry of the same model."""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {name: write_sparse(folder / f"{name}.gguf", shape, tokens=False) for name, shape in SHAPES.items()}


@pytest.mark.parametrize("shape", SHAPES)
def test_sizes_are_those_that_llama_quantize_plans(models, shape):
    ours = {kind: round(quantized(models[shape], kind).tensor_bytes / 2**20, 2) for kind in FILE_TYPES}
    assert ours == pytest.approx(SIZES[shape], abs=0.011)


def test_bits_are_those_of_an_8b_model(models):
    info = models["8B"]
    for kind, file_type in FILE_TYPES.items():
        assert 8 * quantized(info, kind).tensor_bytes / info.n_params == pytest.approx(file_type.bits, abs=0.006)


def test_file_types_fall_in_quality_as_far_as_llama_quantize_tells():
    told = [each.loss for each in FILE_TYPES.values() if each.loss is not None]
    assert told == sorted(told)
    assert len(told) == 11


def test_a_file_type_is_recognised_by_its_tensors_and_from_any_the_sizes_are_the_same(models):
    info = models["8B"]
    for kind in ("Q4_K_M", "Q4_K_S", "Q3_K_L", "Q5_K_S", "IQ4_XS", "Q8_0", "F16"):
        made = quantized(info, kind)
        assert file_type_of(made) == kind
        assert quantized(made, "Q6_K").tensor_bytes == quantized(info, "Q6_K").tensor_bytes
    with pytest.raises(ConfigError, match="must be one of F16"):
        quantized(info, "Q9")


def test_70b_on_two_gpus_of_16_gb_fits_as_iq3_xs(models):
    found = recommend(models["70B"], [16 * GIB, 16 * GIB])
    assert found.best == "IQ3_XS"
    assert next(each for each in found.choices if each.file_type == "IQ3_XS").memory_bytes <= 32 * GIB


def test_an_8b_on_16_gb_is_not_told_to_take_a_small_quantization(models):
    here = quantized(models["8B"], "Q4_K_M")
    assert 4.8e9 < here.file_bytes < 5e9
    found = recommend(here, [16 * GIB], n_ctx=8192)
    assert found.best == "Q8_0"
    assert "Q4_K_M, so Q8_0 takes the original weights" in found.reason
    assert [each.file_type for each in found.choices if each.from_here] == ["Q4_K_M"]
    assert next(each for each in found.choices if each.file_type == "Q4_K_M").largest_ctx > 32_768


def test_2_gb_and_80_gb_are_not_told_the_same(models):
    small, large = (recommend(models["8B"], [size * GIB]) for size in (2, 80))
    assert (small.best, large.best) == (None, "F16")
    assert "take a smaller model" in small.reason
    assert recommend(models["odd rows"], [2 * GIB]).best in ("F16", "Q8_0")


def test_the_best_fits_and_everything_better_does_not(models):
    for gib in (4, 6, 8, 12, 24):
        for slots, n_ctx in ((1, None), (4, 8192)):
            found = recommend(models["8B"], [gib * GIB], n_ctx=n_ctx, n_parallel=slots)
            fits = [each.file_type for each in found.choices if each.fits]
            assert found.best == (fits[0] if fits else None)
            for each in found.choices:
                assert each.fits == (each.memory_bytes <= gib * GIB)
                assert each.fits == (each.largest_ctx is not None and each.largest_ctx >= found.n_ctx)


def test_memory_is_that_of_the_planner(models):
    found = recommend(models["8B"], [24 * GIB], n_ctx=8192, n_parallel=2)
    for each in found.choices:
        need = estimate(
            quantized(models["8B"], each.file_type), n_ctx=16_384, n_parallel=2, n_gpu_layers=33,
            config=EngineConfig(n_parallel=2),
        )  # fmt: skip
        assert each.memory_bytes == need.device_bytes


def test_bad_sizes_are_refused(models):
    for gpus, options in (([], {}), ([0], {}), ([GIB], {"n_ctx": 0}), ([GIB], {"n_parallel": 0})):
        with pytest.raises(ConfigError):
            recommend(models["small"], gpus, **options)


def test_every_name_of_the_old_registry_has_a_successor():
    assert len(OLD_REGISTRY) == 21
    assert set(OLD_REGISTRY.values()) <= set(load_catalog())


def test_every_entry_of_the_catalogue_says_its_type_in_its_files_name():
    for entry in load_catalog().values():
        assert any(kind.startswith(type_in_name(entry.file)) for kind in FILE_TYPES), entry.file
        assert type_in_name(entry.file)
    assert type_in_name("model-00001-of-00003.gguf") == ""
    assert type_in_name("Qwen3-8B-IQ4_XS.gguf") == "IQ4_XS"


@pytest.mark.parametrize(("shape", "n_params"), [("tied 3B", 3_212_749_824), ("8B", 8_030_261_248), ("70B", 7.06e10)])
def test_what_is_guessed_of_an_entry_is_near_what_its_file_takes(models, shape, n_params):
    entry = replace(next(iter(load_catalog().values())), parameters=int(n_params))
    exact = next(
        each for each in recommend(models[shape], [90 * GIB]).choices if each.file_type == type_in_name(entry.file)
    )
    assert guess_memory(entry) == pytest.approx(exact.memory_bytes, rel=0.1)
    guessed = recommend_entry(entry, [90 * GIB])
    assert not guessed.exact
    for near, true in zip(guessed.choices, recommend(models[shape], [90 * GIB]).choices, strict=True):
        assert near.file_bytes == pytest.approx(true.file_bytes, rel=0.08)


def test_more_memory_lists_more_models_and_the_largest_first():
    entries = load_catalog().values()
    small, large = (recommend_models(entries, [size * GIB]) for size in (2, 16))
    assert {each.name for each, _ in small} < {each.name for each, _ in large}
    sizes = [each.parameters for each, _ in large]
    assert sizes == sorted(sizes, reverse=True)
    assert all(need <= 16 * GIB for _, need in large)


def test_gpus_of_every_size_hold_more_the_larger_they_are(models):
    fits = fit_gpus(models["8B"], common_gpus())
    assert [each.gpu for each in fits] == list(COMMON)
    assert [(each.whole, each.n_layers, each.n_ctx) for each in fits] == sorted(
        (each.whole, each.n_layers, each.n_ctx) for each in fits
    )
    small, large = fits[0], fits[-1]
    assert (small.whole, large.whole, large.n_ctx) == (False, True, 131_072)
    assert 0 < small.n_layers < 33
    nothing = fit_gpus(models["70B"], [("none", 100 * 2**20)])[0]
    assert (nothing.whole, nothing.n_layers, nothing.n_ctx) == (False, 0, 0)


def run(*argv):
    return CliRunner().invoke(app, ["models", *map(str, argv)], env={"COLUMNS": "200"})


def test_the_command_prints_a_table_and_the_reason(tmp_path):
    write_sparse(tmp_path / "m.gguf", LLAMA_70B, tokens=False)
    done = run("recommend", tmp_path / "m.gguf", "--vram", "2x16GiB")
    assert done.exit_code == 0
    assert "IQ3_XS *" in done.stdout
    assert "best quality that fits 32 GiB" in " ".join(done.stdout.split())
    told = json.loads(run("recommend", tmp_path / "m.gguf", "--vram", "80GiB,80GiB", "--slots", "2", "--json").stdout)
    assert (told["best"], told["n_parallel"], told["exact"]) == ("F16", 2, True)


def test_the_command_takes_an_entry_that_is_not_here_and_says_what_it_cannot_know():
    done = run("recommend", "qwen2.5-14b-q4_k_m", "--vram", "16GiB")
    assert done.exit_code == 0
    assert "estimated" in done.stdout
    assert "Not downloaded" in done.stderr


def test_the_command_without_a_model_lists_those_that_fit():
    done = json.loads(run("recommend", "--vram", "4GiB", "--json").stdout)
    assert done
    assert all(each["memory_bytes"] <= 4 * GIB for each in done)
    assert "of the catalogue fit" in run("recommend", "--vram", "4GB").stderr


@pytest.mark.parametrize("wrong", ["x", "16 apples", "0GiB", "999x1GiB", "-1GiB", "ax2GiB"])
def test_a_wrong_size_is_the_users_mistake(wrong):
    done = run("recommend", f"--vram={wrong}")
    assert done.exit_code == 2
    assert "vram" in done.stderr


def test_context_without_a_model_is_refused():
    assert run("recommend", "--vram", "4GiB", "--context", "100").exit_code == 2


def test_show_tells_which_gpus_hold_a_model_and_lists_its_tensors(tmp_path):
    info = write_sparse(tmp_path / "m.gguf", LLAMA_8B, tokens=False)
    told = json.loads(run("show", tmp_path / "m.gguf", "--json", "--tensors").stdout)
    assert [each["name"] for each in told["tensors"]] == [each.name for each in info.tensors]
    assert sum(each["bytes"] for each in told["tensors"]) == read_gguf(tmp_path / "m.gguf").tensor_bytes
    whole = {each["gpu"]: each["whole"] for each in told["gpus"]}
    assert (whole["T4"], whole["RTX 3090, 4090"], whole["H200"]) == (False, True, True)
    shown = run("show", tmp_path / "m.gguf", "--tensors").stdout
    assert "31 layers" in shown
    assert "blk.31.ffn_down.weight" in shown
    assert "14336 x 4096" in shown
    assert "tensors" not in json.loads(run("show", tmp_path / "m.gguf", "--json").stdout)


def test_show_puts_this_machines_gpus_first(tmp_path, monkeypatch):
    write_sparse(tmp_path / "m.gguf", LLAMA_8B, tokens=False)
    gpus = tuple(GpuInfo(index=at, uuid=f"GPU-{at}", name="T", total_bytes=15 * GIB, free_bytes=GIB) for at in (0, 1))
    monkeypatch.setattr("lltm_ray.cli.models_show.read_inventory", lambda: Inventory(gpus=gpus))
    told = json.loads(run("show", tmp_path / "m.gguf", "--json").stdout)
    assert [each["gpu"] for each in told["gpus"]][:3] == ["here: T (0)", "here: T (1)", next(iter(COMMON))]
    shown = [line for line in run("show", tmp_path / "m.gguf").stdout.splitlines() if line.startswith("here:")]
    assert len(shown) == 2
