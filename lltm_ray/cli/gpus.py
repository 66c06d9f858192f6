"""`lltm-ray gpus`: this machine's GPUs, what lies between them, and the NCCL that would use it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from lltm_ray.cli._output import ERR, OUT, JsonFlag, errors_end_the_command, human_bytes, print_json, print_table
from lltm_ray.gpu.nccl import Nccl, read_nccl
from lltm_ray.gpu.nvml import read_inventory, visible
from lltm_ray.gpu.topology import LEVELS, GpuDetail, Topology, read_topology

_COLUMNS = ("gpu", "name", "free", "of", "capability", "GB/s", "PCIe", "NUMA", "CPUs", "NVLinks", "MIG", "cuda", "ray")


@errors_end_the_command()
def gpus(*, as_json: JsonFlag = False) -> None:
    """Show this machine's GPUs: memory, links, MIG, how each two are connected, and NCCL.

    `cuda` is the number a process with this environment sees, `ray` the id that Ray gives out. A dash: not told.
    """
    topology, nccl = read_topology(), read_nccl()
    ids = visible_ids(topology, os.environ)
    if as_json:
        print_json({**asdict(topology), "visible": ids, "nccl": asdict(nccl)})
        return
    if topology.reason:
        ERR.print(f"No GPU is shown: {topology.reason}." if not topology.gpus else topology.reason, markup=False)
    if topology.gpus:
        _show(topology, ids)
    _show_nccl(nccl)


def visible_ids(topology: Topology, environ: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """UUID of each device a process here sees -> its CUDA number and the id that Ray gives out.

    Ray gives out the entries of CUDA_VISIBLE_DEVICES where it is set, else numbers from 0.
    """
    given = environ.get("CUDA_VISIBLE_DEVICES")
    seen = visible(read_inventory(), given) if topology.gpus else ()
    entries = [entry.strip() for entry in given.split(",")] if given else [str(at) for at in range(len(seen))]
    return {gpu.uuid: {"cuda": at, "ray": entries[at]} for at, gpu in enumerate(seen)}


def _show(topology: Topology, ids: Mapping[str, Mapping[str, Any]]) -> None:
    print_table(_COLUMNS, [_row(gpu, ids) for gpu in topology.gpus])
    migs = [(gpu.index, mig) for gpu in topology.gpus for mig in gpu.migs]
    if migs:
        rows = [
            (
                index,
                mig.gpu_instance,
                mig.compute_instance,
                mig.name,
                _bytes(mig.total_bytes),
                mig.uuid,
                _id(ids, mig.uuid),
            )
            for index, mig in migs
        ]
        print_table(("gpu", "instance", "compute", "name", "memory", "uuid", "ray"), rows, title="\nMIG devices")
    if len(topology.gpus) > 1:
        _show_pairs(topology)


def _row(gpu: GpuDetail, ids: Mapping[str, Mapping[str, Any]]) -> Sequence[Any]:
    capability = ".".join(map(str, gpu.compute_capability)) if gpu.compute_capability else None
    return (
        gpu.index,
        gpu.name,
        _bytes(gpu.free_bytes),
        _bytes(gpu.total_bytes),
        capability,
        gpu.memory_bytes_s and round(gpu.memory_bytes_s / 1e9),
        _pcie(gpu),
        gpu.numa_node,
        gpu.cpus,
        gpu.links.active,
        None if gpu.mig_enabled is None else f"{len(gpu.migs)} devices" if gpu.mig_enabled else "off",
        _id(ids, gpu.uuid, "cuda"),
        _id(ids, gpu.uuid),
    )


def _pcie(gpu: GpuDetail) -> str | None:
    """Now, and at its best where that is more: `gen1 x16 (gen4 x16)`."""
    now, best = (gpu.pcie_generation, gpu.pcie_width), (gpu.pcie_generation_max, gpu.pcie_width_max)
    told = [f"gen{generation} x{width}" for generation, width in (now, best) if generation and width]
    return told[0] if len(set(told)) == 1 else f"{told[0]} ({told[1]})" if told else None


def _show_pairs(topology: Topology) -> None:
    indices = [gpu.index for gpu in topology.gpus]
    words = {(pair.a, pair.b): pair.word for pair in topology.pairs}
    words |= {(b, a): word for (a, b), word in words.items()}
    rows = [[f"GPU{a}", *("X" if a == b else words[a, b] for b in indices)] for a in indices]
    print_table(("", *(f"GPU{index}" for index in indices)), rows, title="\nbetween them")
    used = {"NV#" if pair.nvlinks else pair.word for pair in topology.pairs}
    for word in filter(LEVELS.__contains__, sorted(used)):
        OUT.print(f"  {word}: {LEVELS[word]}", style="dim", markup=False)
    direct = [
        (f"GPU{pair.a} - GPU{pair.b}", pair.word, pair.p2p, pair.bytes_s and round(pair.bytes_s / 1e9, 1))
        for pair in topology.pairs
    ]
    print_table(("pair", "by", "peer to peer", "GB/s one way"), direct, title="\ndirect access")


def _show_nccl(nccl: Nccl) -> None:
    found = f"{nccl.version_text} from {nccl.origin} ({nccl.path})" if nccl.version else nccl.reason
    OUT.print(f"NCCL: {found}", markup=False, soft_wrap=True)
    for name, value in nccl.environment.items():
        OUT.print(f"  {name}={value}", markup=False, soft_wrap=True)


def _bytes(count: int | None) -> str | None:
    return None if count is None else human_bytes(count)


def _id(ids: Mapping[str, Mapping[str, Any]], uuid: str, kind: str = "ray") -> Any:
    return ids.get(uuid, {}).get(kind)
