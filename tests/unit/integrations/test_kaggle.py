"""Machines as Kaggle and Colab make them: their folders, their variables, GPUs as NVML would list them."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import psutil
import pytest

from lltm_ray.errors import ConfigError
from lltm_ray.gpu.nvml import Inventory
from lltm_ray.integrations.kaggle import machine as module
from lltm_ray.integrations.kaggle.deadline import ENVIRONMENT, HOUR_S, read_deadline, time_left_s
from lltm_ray.integrations.kaggle.machine import Machine, Service, detect
from lltm_ray.integrations.kaggle.presets import Preset, _fits, build_fleet, choose, load_presets, tensor_split
from lltm_ray.models.catalog import load_catalog
from lltm_ray.models.random_weights import write_random
from lltm_ray.models.recommend import guess_memory
from lltm_ray.records import GpuInfo
from lltm_ray.sdk.quick import with_usable_gpus

GIB = 2**30
T4, A100, H200 = (15 * GIB, (7, 5)), (40 * GIB, (8, 0)), (140 * GIB, (9, 0))
BATCH = {"KAGGLE_KERNEL_RUN_TYPE": "Batch", "HOME": "/root"}


def gpus(*kinds: tuple[int, tuple[int, int]], name: str = "some GPU", mig: bool = False) -> Inventory:
    return Inventory(
        gpus=tuple(
            GpuInfo(
                index=0 if mig else index,
                uuid=f"{'MIG' if mig else 'GPU'}-{index}",
                name=name,
                total_bytes=total,
                free_bytes=total - 300 * 2**20,
                compute_capability=capability,
            )
            for index, (total, capability) in enumerate(kinds)
        )
    )


def machine_of(
    root: Path, *kinds: tuple[int, tuple[int, int]], environ: Mapping[str, str] | None = None, mig: bool = False
) -> Machine:
    return detect(environ=environ or {}, root=root, inventory=gpus(*kinds, mig=mig), look_online=False)


@pytest.fixture
def kaggle_root(tmp_path: Path) -> Path:
    for name in ("kaggle/working", "kaggle/input", "tmp"):
        (tmp_path / name).mkdir(parents=True)
    return tmp_path


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 20 GiB of weights: its header is whole, the rest of the file is a hole."""
    path = tmp_path_factory.mktemp("large") / "large.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(32)
    writer.add_context_length(32_768)
    writer.add_embedding_length(4096)
    writer.add_feed_forward_length(12_288)
    writer.add_head_count(32)
    writer.add_head_count_kv(8)
    shapes = {f"blk.{layer}.ffn_up.weight": (81_920, 4096) for layer in range(32)}
    for name, shape in ({"token_embd.weight": (32_000, 4096), "output.weight": (32_000, 4096)} | shapes).items():
        writer.add_tensor_info(name, shape, np.dtype(np.float16), shape[0] * shape[1] * 2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    os.truncate(path, 22 * GIB)
    return path


# --- where


def test_kaggle_is_known_by_its_variable_though_its_images_carry_those_of_colab(kaggle_root: Path) -> None:
    (kaggle_root / "content").mkdir()
    machine = detect(
        environ=BATCH | {"COLAB_RELEASE_TAG": "release-colab"}, root=kaggle_root, inventory=gpus(), look_online=False
    )
    assert (machine.service, machine.reason) == (Service.KAGGLE, "KAGGLE_KERNEL_RUN_TYPE=Batch")
    assert machine.kept_dir == kaggle_root / "kaggle/working"
    assert machine.kept_limit_bytes == 20 * 10**9
    assert machine.input_dirs == (kaggle_root / "kaggle/input",)
    assert machine.scratch_dir == kaggle_root / "tmp"


def test_kaggle_is_known_by_its_folders_alone(kaggle_root: Path) -> None:
    assert machine_of(kaggle_root).service is Service.KAGGLE


def test_who_only_uses_kaggles_command_line_is_not_on_kaggle(tmp_path: Path) -> None:
    machine = machine_of(tmp_path, environ={"KAGGLE_USERNAME": "me", "KAGGLE_KEY": "k", "HOME": "/home/me"})
    assert machine.service is Service.PLAIN
    assert (machine.kept_dir, machine.kept_limit_bytes, machine.input_dirs) == (Path.cwd(), None, ())


def test_colab_needs_its_variable_and_its_folder(tmp_path: Path) -> None:
    environ = {"COLAB_RELEASE_TAG": "release-colab-20260101", "HOME": "/root"}
    assert machine_of(tmp_path, environ=environ).service is Service.PLAIN
    (tmp_path / "content").mkdir()
    machine = machine_of(tmp_path, environ=environ)
    assert (machine.service, machine.kept_dir) == (Service.COLAB, tmp_path / "content")


def test_caches_move_to_scratch_only_where_they_would_fill_the_kept_folder(kaggle_root: Path) -> None:
    (kaggle_root / "kaggle/temp").mkdir()
    assert machine_of(kaggle_root, environ=BATCH).cache_environment == {}
    inside = BATCH | {"HF_HOME": str(kaggle_root / "kaggle/working/hub")}
    assert machine_of(kaggle_root, environ=inside).cache_environment == {
        "HF_HOME": str(kaggle_root / "kaggle/temp/huggingface")
    }


def test_the_kept_folders_size_counts_all_files_and_no_links_out_of_it(kaggle_root: Path) -> None:
    kept = kaggle_root / "kaggle/working"
    (kept / "deep/er").mkdir(parents=True)
    (kept / "a").write_bytes(b"x" * 1000)
    (kept / "deep/er/b").write_bytes(b"x" * 500)
    (kept / "out").symlink_to(kaggle_root / "kaggle")
    size = machine_of(kaggle_root).kept_bytes()
    assert 1500 <= size < 1500 + 4096


def test_a_mounted_model_is_used_by_its_path(kaggle_root: Path) -> None:
    folder = kaggle_root / "kaggle/input/qwen/gguf/q4/1"
    folder.mkdir(parents=True)
    (kaggle_root / "kaggle/input/images").mkdir()
    write_random(folder / "Llama-3.2-1B-Instruct-Q4_K_M.gguf")
    machine = machine_of(kaggle_root, T4, T4, environ=BATCH)
    path = str(folder / "Llama-3.2-1B-Instruct-Q4_K_M.gguf")
    for model in ("llama-3.2-1b-q4_k_m", "Llama-3.2-1B-Instruct-Q4_K_M.gguf", f"a/b:{Path(path).name}@main"):
        assert build_fleet(model=model, machine=machine).model == path
    assert build_fleet(model="qwen2.5-0.5b-q4_k_m", machine=machine).model == "qwen2.5-0.5b-q4_k_m"


@pytest.mark.parametrize("through_a_proxy", [False, True])
def test_the_network_is_on_when_the_hub_or_the_proxy_to_it_takes_a_connection(through_a_proxy: bool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as hub:
        url = f"http://127.0.0.1:{hub.getsockname()[1]}"
        environ = {"HF_ENDPOINT": "http://hub.invalid", "HTTP_PROXY": url} if through_a_proxy else {"HF_ENDPOINT": url}
        assert detect(environ=environ, inventory=gpus()).is_online
        assert not detect(environ=environ | {"HF_HUB_OFFLINE": "1"}, inventory=gpus()).is_online
    assert not detect(environ=environ, inventory=gpus()).is_online


# --- GPUs


def test_devices_are_those_that_this_process_sees() -> None:
    two = gpus(T4, T4)
    assert [
        gpu.index for gpu in detect(environ={"CUDA_VISIBLE_DEVICES": "1"}, inventory=two, look_online=False).gpus
    ] == [1]
    none = detect(environ={"CUDA_VISIBLE_DEVICES": ""}, inventory=two, look_online=False)
    assert (none.gpus, "hides all 2 GPUs" in none.gpu_reason) == ((), True)


def test_a_gpu_too_old_for_llama_cpp_is_left_out_and_named(tmp_path: Path) -> None:
    machine = machine_of(tmp_path, T4, (12 * GIB, (3, 7)))
    assert (len(machine.gpus), "too old" in machine.gpu_reason, "3.7" in machine.gpu_reason) == (1, True, True)


def test_mig_devices_get_an_engine_each_and_never_one_over_several(tmp_path: Path, large: Path) -> None:
    slice_ = (20 * GIB, (9, 0))
    uuids = "MIG-0,MIG-1,MIG-2"
    machine = machine_of(tmp_path, slice_, slice_, slice_, environ={"CUDA_VISIBLE_DEVICES": uuids}, mig=True)
    config = build_fleet(machine=machine)
    assert (config.engines, config.gpu_share) == (3, 1.0)
    config = build_fleet(model=str(large), machine=machine)
    assert (config.engines, config.gpu_share) == (3, 1.0)
    with pytest.raises(ConfigError, match="one MIG device"):
        build_fleet(machine=machine, split="equal")
    unnamed = machine_of(tmp_path, slice_, slice_, slice_, mig=True)
    assert (len(unnamed.gpus), f"CUDA_VISIBLE_DEVICES={uuids}" in unnamed.gpu_reason) == (1, True)


# --- presets


def test_the_table_of_the_old_presets_is_kept() -> None:
    table = {
        "dual-t4": (2, 8192, 2048, 512, 4),
        "single-t4": (1, 4096, 1024, 256, 2),
        "colab-a100": (1, 16_384, 4096, 1024, 8),
        "rtx-4090": (1, 16_384, 4096, 1024, 8),
        "rtx-3090": (1, 8192, 2048, 512, 4),
        "cpu": (0, 2048, 512, 128, 1),
    }
    known = load_presets()
    assert {*table, "l4", "h100", "h200"} == set(known)
    for name, values in table.items():
        preset = known[name]
        assert (preset.gpus, preset.n_ctx, preset.n_batch, preset.n_ubatch, preset.n_parallel) == values


def test_every_preset_makes_a_fleet_on_its_machine(tmp_path: Path) -> None:
    for name, preset in load_presets().items():
        config = build_fleet(name, machine=machine_of(tmp_path, *[H200] * preset.gpus))
        assert config.engine.n_ctx == preset.n_ctx
        assert config.engines * (config.gpu_share or 0) == preset.gpus
        assert config.engine.flash_attn == "auto"


def test_two_t4_run_two_engines_of_a_model_that_fits_one_and_one_engine_of_a_larger_one(
    kaggle_root: Path, large: Path
) -> None:
    machine = machine_of(kaggle_root, T4, T4, environ=BATCH)
    for preset in ("dual-t4", "auto"):
        small = build_fleet(preset, model="tiny", machine=machine)
        assert (small.engines, small.gpu_share) == (2, 1.0)
        wide = build_fleet(preset, model=str(large), machine=machine)
        assert (wide.engines, wide.gpu_share) == (1, 2.0)
        assert (wide.engine.split_mode, wide.engine.tensor_split) == ("layer", ())
    assert small.telemetry is not None
    assert small.telemetry.segment_dir == str(kaggle_root / "kaggle/working/lltm_ray/telemetry")


def test_a_catalogue_model_is_judged_by_its_parameters_before_it_is_here(tmp_path: Path) -> None:
    machine = machine_of(tmp_path, (8 * GIB, (7, 5)), (8 * GIB, (7, 5)))
    assert build_fleet(model="llama-3.2-1b-q4_k_m", machine=machine).engines == 2
    assert build_fleet(model="qwen3-14b-q4_k_m", machine=machine).engines == 1
    assert "not known" in str(choose(model="owner/repo:file.gguf", machine=machine))


def test_a_catalogue_model_is_estimated_as_models_recommend_does() -> None:
    for name, entry in load_catalog().items():
        for spare, fits in ((2**20, True), (-(2**20), False)):
            free = int((guess_memory(entry) + spare) / 0.98)
            gpu = replace(gpus(T4).gpus[0], total_bytes=1024 * GIB, free_bytes=free)
            assert _fits(name, None, [gpu], Preset(name="p")) == fits, name


def test_four_gpus_are_paired_where_a_model_needs_two(tmp_path: Path, large: Path) -> None:
    config = build_fleet(model=str(large), machine=machine_of(tmp_path, T4, T4, T4, T4))
    assert (config.engines, config.gpu_share) == (2, 2.0)


@pytest.mark.parametrize("name", ["NVIDIA H200", "Frobnicator 9000"])
def test_auto_goes_by_memory_and_capability_never_by_the_name(name: str) -> None:
    def slots(kind: tuple[int, tuple[int, int]]) -> tuple[int, int]:
        machine = detect(environ={}, inventory=gpus(kind, kind, name=name), look_online=False)
        config = build_fleet(machine=machine)
        assert (len(machine.gpus), config.engines, config.gpu_share) == (2, 2, 1.0)
        return config.engine.n_parallel, config.engine.n_batch

    assert slots(T4) == (2, 2048)
    assert slots(A100) == (8, 4096)
    assert slots(H200) == (32, 4096)
    assert slots((96 * GIB, (12, 0))) == (16, 4096), "12.0 is more than 8.0, though not as text"
    assert slots((40 * GIB, (7, 5))) == (8, 2048)
    assert slots((6 * GIB, (8, 6))) == (1, 1024)


def test_no_gpu_is_a_fleet_on_the_cpu_that_says_why(tmp_path: Path) -> None:
    inventory = Inventory(reason="no NVIDIA driver is installed here")
    machine = detect(environ={}, root=tmp_path, inventory=inventory, look_online=False)
    config = build_fleet(machine=machine)
    assert (config.engines, config.gpu_share) == (1, 0.0)
    assert "no NVIDIA driver" in str(choose(machine=machine))
    assert build_fleet("cpu", machine=machine_of(tmp_path, T4)).gpu_share == 0.0


def test_a_preset_for_more_gpus_than_there_are_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="2 GPUs, this machine has 1"):
        build_fleet("dual-t4", machine=machine_of(tmp_path, T4))
    with pytest.raises(ConfigError, match="must be auto or one of dual-t4"):
        build_fleet("KAGGLE_DUAL_T4", machine=machine_of(tmp_path, T4))


def test_what_is_given_wins_over_the_preset(tmp_path: Path) -> None:
    machine = machine_of(tmp_path, T4, T4)
    config = build_fleet("dual-t4", machine=machine, engines=1, engine={"n_parallel": 9}, gateway={"port": 8080})
    assert (config.engines, config.engine.n_parallel, config.engine.n_batch) == (1, 9, 2048)
    assert config.gateway is not None
    assert config.gateway.port == 8080


def test_splits_are_made_for_the_gpus_that_there_are(tmp_path: Path) -> None:
    three = machine_of(tmp_path, T4, T4, (30 * GIB, (8, 6))).gpus
    assert tensor_split("equal", three) == (1.0, 1.0, 1.0)
    balanced = tensor_split("balanced", three)
    assert balanced[2] == pytest.approx(0.5, abs=0.01)
    assert balanced[0] == balanced[1] == pytest.approx(0.25, abs=0.01)
    assert tensor_split((70, 30, 0), three) == (70.0, 30.0, 0.0)
    assert tensor_split("equal", three[:1]) == ()
    for wrong in ((1, 1), (0, 0, 0), (1, 1, -1), "custom"):
        with pytest.raises(ConfigError, match="split"):
            tensor_split(wrong, three)


def test_a_split_makes_one_engine_over_all_gpus(tmp_path: Path) -> None:
    machine = machine_of(tmp_path, T4, T4)
    config = build_fleet("dual-t4", machine=machine, split=(60, 40))
    assert (config.engines, config.gpu_share, config.engine.tensor_split) == (1, 2.0, (60.0, 40.0))


def test_gpus_without_a_server_that_can_use_them_are_left_alone_aloud(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    machine = machine_of(tmp_path, T4, T4)
    config = build_fleet(machine=with_usable_gpus(machine, "embedded"))
    assert (config.engines, config.gpu_share) == (1, 0.0)
    assert "2 GPUs are not used" in caplog.text
    server = tmp_path / "llama-server"
    server.write_text("#!/bin/sh\n", encoding="utf-8")
    server.chmod(0o755)
    assert with_usable_gpus(machine, str(server)) is machine


# --- time


def test_a_session_ends_after_the_services_hours_unless_told_otherwise(kaggle_root: Path) -> None:
    def hours(environ: Mapping[str, str], limit_s: float | None = None) -> float | None:
        found = read_deadline(limit_s, began_unix_s=1000.0, environ=environ, root=kaggle_root)
        return None if found is None else (found.at_unix_s - 1000) / HOUR_S

    assert hours(BATCH) == 12
    assert hours(BATCH | {"TPU_NAME": "local"}) == 9
    assert hours(BATCH | {ENVIRONMENT: "7200"}) == 2
    assert hours(BATCH | {ENVIRONMENT: "7200"}, limit_s=3600) == 1
    for wrong in ("soon", "-1", "nan"):
        with pytest.raises(ConfigError, match="seconds"):
            hours(BATCH | {ENVIRONMENT: wrong})


def test_a_plain_machine_has_all_the_time_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_deadline(environ={}, root=tmp_path) is None
    monkeypatch.setenv(ENVIRONMENT, "")
    monkeypatch.delenv("KAGGLE_KERNEL_RUN_TYPE", raising=False)
    assert time_left_s() == float("inf")


def test_the_session_began_with_the_containers_first_process(kaggle_root: Path) -> None:
    found = read_deadline(60, environ=BATCH, root=kaggle_root)
    assert found is not None
    assert found.at_unix_s == pytest.approx(psutil.Process(1).create_time() + 60)
    before_s, left_s, after_s = time.time(), found.left_s, time.time()
    assert found.at_unix_s - after_s <= left_s <= found.at_unix_s - before_s


def test_on_a_plain_machine_a_given_limit_counts_from_this_processs_start(tmp_path: Path) -> None:
    found = read_deadline(3600, environ={}, root=tmp_path)
    assert found is not None
    assert found.at_unix_s == pytest.approx(psutil.Process().create_time() + 3600)


def test_a_file_that_is_removed_while_sizes_are_added_counts_nothing(
    kaggle_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = machine_of(kaggle_root)
    for name in ("a", "b"):
        (machine.kept_dir / name).write_bytes(b"12345")
    read = module._entries

    def then_remove(folder: str) -> list[os.DirEntry[str]]:
        found = read(folder)
        (machine.kept_dir / "b").unlink(missing_ok=True)
        return found

    monkeypatch.setattr(module, "_entries", then_remove)
    assert machine.kept_bytes() == 5
