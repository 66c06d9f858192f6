"""How this machine's GPUs are built in: memory, PCIe, NVLink, MIG, NUMA, and what lies between each two of them.

All by NVML, in numbers: nothing is guessed from a GPU's name. What a device, driver or container does not tell is None,
and `GpuDetail.untold` has the driver's reason for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from lltm_ray.gpu.nvml import attempt, text

_SM, _MEM = 1, 2  # nvmlClockType_t of nvml.h
_NVLINK_MBPS = 90  # NVML_FI_DEV_NVLINK_SPEED_MBPS_COMMON
_MOST_LINKS = 36
_TO_GPU, _TO_SWITCH = 0, 2  # nvmlIntNvLinkDeviceType_t
_P2P_READ, _P2P_NVLINK = 0, 2  # nvmlGpuP2PCapsIndex_t; pynvml's own NVML_P2P_CAPS_INDEX_READ is a tuple by mistake
_P2P = ("ok", "chipset not supported", "GPU not supported", "topology not supported", "disabled", "not supported")
_LEVELS = {0: "INT", 10: "PIX", 20: "PXB", 30: "PHB", 40: "NODE", 50: "SYS"}
LEVELS = {
    "NV#": "so many NVLinks",
    "INT": "one board",
    "PIX": "at most one PCIe bridge",
    "PXB": "several PCIe bridges, no host bridge",
    "PHB": "a PCIe host bridge, usually the CPU",
    "NODE": "host bridges of one NUMA node",
    "SYS": "the link between NUMA nodes",
}
"""What a pair's level says is between the two, as `nvidia-smi topo -m` has it."""
_LANE_BYTES_S = {1: 0.25e9, 2: 0.5e9, 3: 0.985e9, 4: 1.969e9, 5: 3.938e9, 6: 7.563e9}
"""PCIe generation -> a lane's bytes per second in one direction, after line coding (PCI-SIG base specifications)."""
_WORD_BITS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class MigInstance:
    """One MIG device of a GPU."""

    uuid: str
    name: str
    gpu_instance: int | None
    compute_instance: int | None
    total_bytes: int | None
    free_bytes: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Links:
    """A GPU's NVLinks that are up, by what is at their other end."""

    switch: int = 0
    """To NVSwitches, which reach every GPU."""
    peers: dict[str, int] = field(default_factory=dict)
    """Bus id -> links to that GPU itself."""
    unknown: int = 0
    """Up, but a virtual machine or an old driver hides where they go."""

    @property
    def active(self) -> int:
        """All that are up."""
        return self.switch + self.unknown + sum(self.peers.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuDetail:
    """One GPU as NVML describes it. None: it does not tell, `untold` says why."""

    index: int
    uuid: str
    name: str
    bus_id: str | None
    total_bytes: int | None
    free_bytes: int | None
    compute_capability: tuple[int, int] | None
    """(major, minor): numbers, so that 12.0 is more than 7.5."""
    memory_bytes_s: float | None
    """Highest memory clock x bus width x 2, for a transfer on each edge."""
    flops: float | None
    """Float32 operations a second of the plain cores: cores x highest clock x 2. Tensor cores do a multiple of it."""
    pcie_generation: int | None
    """Now; an idle GPU lowers it."""
    pcie_generation_max: int | None
    pcie_width: int | None
    pcie_width_max: int | None
    numa_node: int | None
    cpus: str | None
    """Cores near it, as ranges: `0-15,32-47`."""
    links: Links
    nvlink_bytes_s: float | None
    """Of one link in one direction."""
    mig_enabled: bool | None
    migs: tuple[MigInstance, ...]
    untold: dict[str, str]
    """Field -> the driver's reason."""

    @property
    def pcie_bytes_s(self) -> float | None:
        """One direction of its PCIe link at its best."""
        lane = _LANE_BYTES_S.get(self.pcie_generation_max or 0)
        return lane * self.pcie_width_max if lane and self.pcie_width_max else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """What lies between two GPUs."""

    a: int
    b: int
    nvlinks: int
    level: str | None
    """`PIX`, `PXB`, `PHB`, `NODE`, `SYS`, `INT` of `LEVELS`; None: not told."""
    p2p: str | None
    """Whether one reads the other's memory directly: `ok`, or why not."""
    bytes_s: float | None
    """One direction: all NVLinks, else the narrower PCIe link."""
    untold: dict[str, str]

    @property
    def word(self) -> str:
        """As in `nvidia-smi topo -m`: `NV4`, `PIX`, ..., `?`."""
        return f"NV{self.nvlinks}" if self.nvlinks else self.level or "?"


@dataclass(frozen=True, slots=True, kw_only=True)
class Topology:
    """This machine's GPUs; `reason` is one sentence for what is missing, empty when all were read."""

    gpus: tuple[GpuDetail, ...] = ()
    pairs: tuple[Pair, ...] = ()
    reason: str = ""

    def pair(self, a: int, b: int) -> Pair | None:
        """What lies between the GPUs of these indices, in either order."""
        return next((pair for pair in self.pairs if {pair.a, pair.b} == {a, b}), None)


class _Asker:
    """Asks NVML by name; keeps the reason of what it is not told."""

    def __init__(self, nvml: Any) -> None:
        self.nvml = nvml
        self.untold: dict[str, str] = {}

    def __call__(self, what: str, call: str, *args: Any) -> Any:
        """The answer, or None with a reason under each field that `what` names; an empty `what` needs none."""
        function: Callable[..., Any] | None = getattr(self.nvml, call, None)
        if function is None:
            return self._note(what, f"this nvidia-ml-py has no {call}")
        try:
            return function(*args)
        except self.nvml.NVMLError as error:
            return self._note(what, str(error))

    def _note(self, what: str, reason: str) -> None:
        self.untold |= dict.fromkeys(what.split(), reason)


def read_topology() -> Topology:
    """Describe this machine's GPUs and their pairs. An absent GPU or package is a reason, no error."""
    found = attempt(_read)
    return Topology(reason=found) if isinstance(found, str) else found


def _read(nvml: Any) -> Topology:
    lost, handles, gpus = [], {}, []
    for index in range(nvml.nvmlDeviceGetCount()):
        try:
            handles[index] = nvml.nvmlDeviceGetHandleByIndex(index)
            gpus.append(_gpu(nvml, index, handles[index]))
        except nvml.NVMLError as error:  # one GPU off the bus must not hide the others
            lost.append(f"GPU {index} cannot be read: {error}")
    pairs = tuple(_pair(nvml, a, b, handles[a.index], handles[b.index]) for a, b in combinations(gpus, 2))
    reason = "; ".join(lost) or ("" if gpus else "the NVIDIA driver lists no devices")
    return Topology(gpus=tuple(gpus), pairs=pairs, reason=reason)


def _gpu(nvml: Any, index: int, handle: Any) -> GpuDetail:
    ask = _Asker(nvml)
    memory = ask("total_bytes free_bytes", "nvmlDeviceGetMemoryInfo", handle)
    mode = ask("mig_enabled", "nvmlDeviceGetMigMode", handle)
    pci = ask("bus_id", "nvmlDeviceGetPciInfo", handle)
    capability = ask("compute_capability", "nvmlDeviceGetCudaComputeCapability", handle)
    return GpuDetail(
        index=index,
        uuid=text(nvml.nvmlDeviceGetUUID(handle)),
        name=text(ask("name", "nvmlDeviceGetName", handle) or ""),
        bus_id=_bus(pci),
        total_bytes=None if memory is None else int(memory.total),
        free_bytes=None if memory is None else int(memory.free),
        compute_capability=None if capability is None else (int(capability[0]), int(capability[1])),
        memory_bytes_s=_memory_bytes_s(ask, handle),
        flops=_product(
            ask("flops", "nvmlDeviceGetNumGpuCores", handle),
            ask("flops", "nvmlDeviceGetMaxClockInfo", handle, _SM),
            2e6,
        ),
        pcie_generation=ask("pcie_generation", "nvmlDeviceGetCurrPcieLinkGeneration", handle),
        pcie_generation_max=ask("pcie_generation_max", "nvmlDeviceGetMaxPcieLinkGeneration", handle),
        pcie_width=ask("pcie_width", "nvmlDeviceGetCurrPcieLinkWidth", handle),
        pcie_width_max=ask("pcie_width_max", "nvmlDeviceGetMaxPcieLinkWidth", handle),
        numa_node=ask("numa_node", "nvmlDeviceGetNumaNodeId", handle),
        cpus=_cpus(ask, handle),
        links=_links(ask, handle),
        nvlink_bytes_s=_link_bytes_s(ask, handle),
        mig_enabled=None if mode is None else bool(mode[0]),
        migs=_migs(ask, handle) if mode and mode[0] else (),
        untold=ask.untold,
    )


def _memory_bytes_s(ask: _Asker, handle: Any) -> float | None:
    clock_mhz = ask("memory_bytes_s", "nvmlDeviceGetMaxClockInfo", handle, _MEM)
    bits = ask("memory_bytes_s", "nvmlDeviceGetMemoryBusWidth", handle)
    return _product(clock_mhz, bits, 1e6 / 8 * 2)


def _product(a: float | None, b: float | None, unit: float) -> float | None:
    return a * b * unit if a and b else None


def _cpus(ask: _Asker, handle: Any) -> str | None:
    words = ask("cpus", "nvmlDeviceGetCpuAffinity", handle, 64)  # 4096 CPUs
    if words is None:
        return None
    return ranges(
        [at * _WORD_BITS + bit for at, word in enumerate(words) for bit in range(_WORD_BITS) if word >> bit & 1]
    )


def ranges(numbers: list[int]) -> str:
    """Ascending numbers as the kernel writes CPU lists: `0-3,8`."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(f"{low}-{high}" if high > low else str(low) for low, high in parts)


def _links(ask: _Asker, handle: Any) -> Links:
    switch = unknown = 0
    peers: dict[str, int] = {}
    for link in range(_MOST_LINKS):
        if ask("" if link else "links", "nvmlDeviceGetNvLinkState", handle, link) != 1:
            continue
        bus = _bus(ask("", "nvmlDeviceGetNvLinkRemotePciInfo", handle, link))
        kind = ask("", "nvmlDeviceGetNvLinkRemoteDeviceType", handle, link)
        if kind == _TO_SWITCH:
            switch += 1
        elif kind in (_TO_GPU, None) and bus is not None:
            peers[bus] = peers.get(bus, 0) + 1
        else:
            unknown += 1
    return Links(switch=switch, peers=peers, unknown=unknown)


def _link_bytes_s(ask: _Asker, handle: Any) -> float | None:
    values = ask("nvlink_bytes_s", "nvmlDeviceGetFieldValues", handle, [_NVLINK_MBPS])
    if not values or values[0].nvmlReturn:
        return None
    return float(values[0].value.uiVal) * 1e6 or None


def _migs(ask: _Asker, handle: Any) -> tuple[MigInstance, ...]:
    found = []
    for place in range(ask("migs", "nvmlDeviceGetMaxMigDeviceCount", handle) or 0):
        mig = ask("", "nvmlDeviceGetMigDeviceHandleByIndex", handle, place)
        uuid = None if mig is None else ask("migs", "nvmlDeviceGetUUID", mig)
        if uuid is None:
            continue
        memory = ask("migs", "nvmlDeviceGetMemoryInfo", mig)
        found.append(
            MigInstance(
                uuid=text(uuid),
                name=text(ask("migs", "nvmlDeviceGetName", mig) or ""),
                gpu_instance=ask("migs", "nvmlDeviceGetGpuInstanceId", mig),
                compute_instance=ask("migs", "nvmlDeviceGetComputeInstanceId", mig),
                total_bytes=None if memory is None else int(memory.total),
                free_bytes=None if memory is None else int(memory.free),
            )
        )
    return tuple(found)


def _bus(pci: Any) -> str | None:
    return None if pci is None else text(pci.busId).lower()


def _pair(nvml: Any, a: GpuDetail, b: GpuDetail, a_handle: Any, b_handle: Any) -> Pair:
    ask = _Asker(nvml)
    level = ask("level", "nvmlDeviceGetTopologyCommonAncestor", a_handle, b_handle)
    p2p = ask("p2p", "nvmlDeviceGetP2PStatus", a_handle, b_handle, _P2P_READ)
    by_nvlink = ask("", "nvmlDeviceGetP2PStatus", a_handle, b_handle, _P2P_NVLINK) == 0
    nvlinks = _between(a, b, by_nvlink)
    return Pair(
        a=a.index,
        b=b.index,
        nvlinks=nvlinks,
        level=None if level is None else _LEVELS.get(int(level), str(level)),
        p2p=None if p2p is None else _P2P[p2p] if 0 <= p2p < len(_P2P) else "unknown",
        bytes_s=_product(nvlinks, a.nvlink_bytes_s, 1.0) if nvlinks else _narrower(a.pcie_bytes_s, b.pcie_bytes_s),
        untold=ask.untold,
    )


def _between(a: GpuDetail, b: GpuDetail, by_nvlink: bool) -> int:
    """NVLinks that a transfer between the two may use: direct ones, or the fewer of those to switches."""
    direct = a.links.peers.get(b.bus_id or "", 0)
    if direct:
        return direct
    switched = min(a.links.switch, b.links.switch)
    return switched or (min(a.links.active, b.links.active) if by_nvlink else 0)


def _narrower(a: float | None, b: float | None) -> float | None:
    return min(a, b) if a and b else None
