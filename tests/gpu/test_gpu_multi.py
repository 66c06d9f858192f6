"""Several GPUs: collectives over NCCL, links as nvidia-smi shows them, memory as NVML does, a draft on a GPU.

`pytest -m gpu tests/gpu/test_gpu_multi.py`, with a CUDA llama-server as for the rest of this folder.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import time

import numpy as np
import pytest

import lltm_ray
from lltm_ray.errors import CollectiveError
from lltm_ray.gpu.nvml import processes_memory
from lltm_ray.gpu.topology import read_topology
from lltm_ray.models.gguf import read_model
from lltm_ray.models.memory import estimate
from tests.peers.gpu_drafts import QUESTIONS, write_deep
from tests.peers.gpu_plans import built_in, read_shape, write_f16
from tests.ray.conftest import HI

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(400)]

DTYPES = ("float32", "float16", "int32", "int64")
MEASURED = ("all_reduce", "broadcast", "reduce", "all_gather", "reduce_scatter", "send")
LEAST_BYTES_S = 1e9
"""Less than any link between two GPUs, through host memory, too."""
SHAPES = {"3 B": "3072,24,8,16,12288", "5 B": "4096,32,8,24,14336", "2 B, no sharing of heads": "2560,20,20,20,10240"}
WITHIN = 0.05


@pytest.fixture(scope="module")
def two(gpus):
    if len(gpus) < 2:
        pytest.fail("needs two GPUs")
    return gpus[:2]


@pytest.fixture(scope="module")
def group(two):
    from lltm_ray.actors.collectives import CollectiveGroup

    with CollectiveGroup.start(2, gpu_share=1, timeout_s=120) as group:
        print([place["gpus"] for place in group.places])
        yield group


@pytest.mark.parametrize("dtype", DTYPES)
def test_collectives_over_nccl_do_what_numpy_does(group, dtype):
    given = [np.random.default_rng(rank).integers(1, 5, (64, 32)).astype(dtype) for rank in range(2)]
    total = given[0] + given[1]
    assert group.backend == "nccl"
    for op, want in {"sum": total, "max": np.maximum(*given), "min": np.minimum(*given)}.items():
        assert all(np.array_equal(out, want) for out in group.all_reduce(given, op=op)), op
        assert np.array_equal(group.reduce(given, root=1, op=op), want), op
    assert all(np.array_equal(out, given[1]) for out in group.broadcast(given[1], root=1))
    assert all(np.array_equal(out, np.stack(given)) for out in group.all_gather(given))
    assert np.array_equal(np.concatenate(group.reduce_scatter(given)), total)
    assert np.array_equal(group.send(given[0], 0, 1), given[0])
    group.barrier()


def test_bfloat16_goes_over_nccl(group):
    import torch

    out = group.all_reduce([torch.full((7,), 1.5 + rank, dtype=torch.bfloat16) for rank in range(2)])
    assert [each.tolist() for each in out] == [[4.0] * 7] * 2


@pytest.mark.parametrize("operation", MEASURED)
def test_bandwidth_between_two_gpus_is_measured(group, operation):
    for mib in (1, 64, 512):
        records = group.measure(operation, mib * 2**20, repeats=10)
        best = max(records, key=lambda record: record.bus_bytes_s)
        print(f"{operation} {mib} MiB: {best.seconds * 1e6:.0f} us, bus {best.bus_bytes_s / 1e9:.1f} GB/s")
    pair = read_topology().pairs[0]
    print("link:", pair.word, pair.p2p, pair.bytes_s)
    assert best.bus_bytes_s > LEAST_BYTES_S
    assert pair.bytes_s is None or best.bus_bytes_s < 1.1 * pair.bytes_s * (2 if operation == "send" else 1)


def test_a_killed_rank_ends_a_call_over_nccl_with_an_error(two, group):
    """Uses the group's GPUs up: it is the last test that needs them."""
    import os
    import signal

    os.kill(group.places[1]["pid"], signal.SIGKILL)
    began = time.monotonic()
    with pytest.raises(CollectiveError) as caught:
        group.all_reduce([np.ones(4, np.float32)] * 2)
    print("after", time.monotonic() - began, "s:", caught.value)
    assert time.monotonic() - began < 60
    assert caught.value.missing == (1,)
    group.destroy()


def smi(*arguments):
    """nvidia-smi's words, without its underlined heading."""
    program = shutil.which("nvidia-smi")
    assert program, "nvidia-smi is not on PATH"
    done = subprocess.run([program, *arguments], capture_output=True, text=True, check=True, timeout=60)
    return re.sub(r"\x1b\[[0-9;]*m", "", done.stdout)


def test_devices_are_as_nvidia_smi_lists_them(gpus):
    query = "index,uuid,pci.bus_id,memory.total,pcie.link.gen.max,pcie.link.width.max,compute_cap"
    rows = smi(f"--query-gpu={query}", "--format=csv,noheader,nounits").strip().splitlines()
    found = read_topology()
    print(found)
    assert len(found.gpus) == len(rows)
    for row, gpu in zip(rows, found.gpus, strict=True):
        index, uuid, bus, mib, generation, width, capability = (cell.strip() for cell in row.split(","))
        assert (gpu.index, gpu.uuid, gpu.bus_id) == (int(index), uuid, bus.lower())
        assert round((gpu.total_bytes or 0) / 2**20) == int(mib)
        assert ".".join(map(str, gpu.compute_capability or ())) == capability
        for told, ours in ((generation, gpu.pcie_generation_max), (width, gpu.pcie_width_max)):
            assert (str(ours) if ours is not None else told) == told  # None where nvidia-smi says [N/A]
        assert gpu.memory_bytes_s is None or 1e11 < gpu.memory_bytes_s < 2e13


def test_pairs_are_as_nvidia_smi_shows_them(two):
    lines = [line.split() for line in smi("topo", "-m").splitlines() if line.strip()]
    heading = next(line for line in lines if line[0] == "GPU0" and line[1:2] == ["GPU1"])
    columns = [word for word in heading if re.fullmatch(r"GPU\d+", word)]
    rows = {line[0]: line[1:] for line in lines if line is not heading and line[0] in columns}
    topology = read_topology()
    for a in columns:
        for b in columns:
            if a == b:
                assert rows[a][columns.index(b)] == "X"
                continue
            pair = topology.pair(int(a[3:]), int(b[3:]))
            assert pair is not None
            print(a, b, pair)
            assert pair.word == rows[a][columns.index(b)]


@pytest.mark.parametrize("shape", SHAPES)
def test_an_estimate_is_within_5_percent_of_what_nvml_sees(gpus, tmp_path, shape):
    path = write_f16(tmp_path / "m.gguf", read_shape(SHAPES[shape]))
    info, slots, n_ctx = read_model(path), 4, 4 * 8192
    settings = {"n_parallel": slots, "n_ctx": n_ctx}
    with lltm_ray.Cluster.start(
        model=str(path), name="memory", engines=1, gpu_share=1.0, engine=settings, gateway={"port": 0}
    ) as cluster:
        cluster.batch([HI] * 8, max_tokens=32)
        engine = cluster.status().engines[0]
        used = sum(processes_memory(gpu.uuid).get(engine.server_pid, 0) for gpu in gpus)
    config = lltm_ray.EngineConfig(**settings)
    found = estimate(info, n_ctx=n_ctx, n_parallel=slots, n_gpu_layers=info.n_layer + 1, config=config)
    print(f"{shape}: estimated {found.device_bytes / 2**20:.0f} MiB, NVML {used / 2**20:.0f} MiB; {found}")
    assert used, "the driver does not tell the memory of processes here"
    assert abs(found.device_bytes - used) <= WITHIN * used


def test_drafted_tokens_are_accepted_on_a_gpu_make_it_faster_and_stand_in_the_trace(gpus, tmp_path):
    """Of a target that takes 10 ms a token and says what tiny says."""
    target = write_deep(tmp_path / "deep.gguf", built_in("tiny"))
    texts, speeds = {}, {}
    for draft_max in (0, 4):
        engine = {"n_ctx": 4096, "n_parallel": 1}
        engine |= {"model_draft": "tiny-draft", "draft_max": draft_max} if draft_max else {}
        with lltm_ray.Cluster.start(
            model=str(target), name="draft", engines=1, gpu_share=1.0, engine=engine, gateway={"port": 0}
        ) as cluster:
            answers = [
                cluster.chat([{"role": "user", "content": each}], max_tokens=48, temperature=0)
                for each in (QUESTIONS[-1], *QUESTIONS)
            ][1:]  # the first warms up
            texts[draft_max] = [answer.text for answer in answers]
            spent_ms = sum(answer.timings.predicted_ms for answer in answers)
            speeds[draft_max] = 1e3 * sum(answer.usage.output_tokens for answer in answers) / spent_ms
            time.sleep(2)  # telemetry's sender pauses
            attempts = cluster.telemetry.tables("attempts")["attempts"].to_pydict()
        drafted, accepted = sum(attempts["draft_tokens"]), sum(attempts["accepted_tokens"])
        print(f"draft_max {draft_max}: {speeds[draft_max]:.0f} tokens/s, {accepted} of {drafted} accepted")
        assert (drafted > 0) == (draft_max > 0)
    assert accepted > 0.5 * drafted
    assert texts[0] == texts[4]
    assert speeds[4] > 1.3 * speeds[0]
