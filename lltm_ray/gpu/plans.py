"""Which way of using some GPUs for a model is best, and why: `choose`. Pure: numbers in, ranked plans out.

`plan_speed` rates each plan. Engines of a plan are alike, GPUs need not be: which of them meet in an engine is Ray's to
say, so a plan counts with the unluckiest deal, the largest together and the smallest together, however they are listed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import ceil

from lltm_ray.errors import ConfigError
from lltm_ray.gpu.plan_parts import EXPERIMENTAL, GIB, KINDS, Demand, Machine, Need, Plan, PlanGpu, Shape, Wish
from lltm_ray.gpu.plan_speed import REDUCTIONS, Speeds
from lltm_ray.gpu.shares import memory_budget

SHARES = (2, 4)
"""Engines on one GPU that are looked at."""
NEAR = 0.85
"""Of the best speed, which is as exact as this model is: a simpler plan is taken before it."""


def choose(shape: Shape, machine: Machine, wish: Wish, need: Need) -> tuple[Plan, ...]:
    """Every way to use the machine, the best first, those that do not fit last; each says why.

    Raises:
        ConfigError: the machine has neither a GPU nor memory.
    """
    if not machine.gpus and not machine.ram_bytes:
        raise ConfigError("ram_bytes", 0, "a machine without GPUs needs memory: give its bytes")
    scene = _Scene(shape, machine, wish, need)
    speeds = Speeds(shape, machine, wish, need)
    plans = [speeds.rate(plan) for plan in scene.candidates()]
    ranked = _ranked(plans)
    return tuple(replace(plan, why=_why(plan, ranked, machine)) for plan in ranked)


def _ranked(plans: Sequence[Plan]) -> list[Plan]:
    order = list(KINDS)
    simple = sorted(plans, key=lambda plan: (order.index(plan.kind), plan.gpus_per_engine, plan.engines))
    fitting = [plan for plan in simple if plan.fits]
    if all(plan.tokens_s is not None for plan in fitting):
        fitting.sort(key=lambda plan: -(plan.tokens_s or 0.0))  # stable: of two equals the simpler one
        steady = [plan for plan in fitting if plan.kind not in EXPERIMENTAL]
        near = [plan for plan in steady if (plan.tokens_s or 0.0) >= NEAR * (steady[0].tokens_s or 0.0)]
        best = min(near, key=simple.index, default=None)
        fitting.sort(key=lambda plan: plan is not best)
    return fitting + [plan for plan in simple if not plan.fits]


class _Scene:
    def __init__(self, shape: Shape, machine: Machine, wish: Wish, need: Need) -> None:
        self.shape, self.machine, self.wish, self.need = shape, machine, wish, need
        self.all_layers = shape.n_layer + 1

    def candidates(self) -> Iterator[Plan]:
        """Each way once; of layer and tensor splits, every width that divides the GPUs."""
        count = len(self.machine.gpus)
        if not count:
            yield self._cpu()
            return
        yield self._plan("replicas", count, 1, 1.0)
        for per_gpu in SHARES:
            if count * per_gpu <= self.wish.streams:
                yield self._plan("shares", count * per_gpu, 1, 1.0 / per_gpu)
        for width in range(2, count + 1):
            if count % width == 0:
                yield self._plan("layer", count // width, width, float(width))
                if not self.shape.is_kv_quantized:
                    yield self._plan("tensor", count // width, width, float(width))
        if self.machine.ram_bytes:
            for width in {1, count}:
                yield from self._offload(count // width, width)
            yield self._cpu()

    def _plan(self, kind: str, engines: int, width: int, share: float, layers: int | None = None) -> Plan:
        slots = ceil(self.wish.streams / engines)
        layers = self.all_layers if layers is None else layers
        demand = self.need(slots, width, layers)
        groups = self._groups(width, share)
        budget = self._budget(kind, groups, share)
        slack = (width - 1) * demand.weights_device_bytes // self.shape.n_layer  # layers are not divided
        return Plan(
            kind=kind,
            engines=engines,
            gpus_per_engine=width,
            gpu_share=share,
            n_parallel=slots,
            n_ctx=slots * self.wish.slot_tokens,
            n_gpu_layers=layers,
            split_mode="tensor" if kind == "tensor" else "layer",
            groups=tuple(groups),
            tensor_splits=tuple(self._split(kind, group) for group in groups) if width > 1 else (),
            need_bytes=demand.device_bytes + slack,
            budget_bytes=budget,
            fits=demand.device_bytes + slack <= budget and self._host_holds(demand, engines, layers),
        )

    def _groups(self, width: int, share: float) -> list[tuple[int, ...]]:
        """The GPUs of each engine by their places, the largest first; engines on one GPU each have it."""
        gpus = self.machine.gpus
        order = sorted(range(len(gpus)), key=lambda at: _size(gpus[at]), reverse=True)
        found = [tuple(sorted(order[at : at + width])) for at in range(0, len(order), width)]
        return [group for group in found for _ in range(max(1, round(1 / share)))]

    def _budget(self, kind: str, groups: Sequence[tuple[int, ...]], share: float) -> int:
        """Of the engine with the least; parts that are even are bounded by the smallest GPU."""
        budgets = [memory_budget(gpu.total_bytes, gpu.free_bytes, min(share, 1.0)) for gpu in self.machine.gpus]
        held = [[budgets[at] for at in group] for group in groups]
        return min(len(each) * min(each) if kind == "tensor" else sum(each) for each in held)

    def _split(self, kind: str, group: tuple[int, ...]) -> tuple[float, ...]:
        if kind == "tensor":
            return (round(1 / len(group), 3),) * len(group)
        free = [self.machine.gpus[at].free_bytes for at in group]
        return tuple(round(each / max(1, sum(free)), 3) for each in free)

    def _host_holds(self, demand: Demand, engines: int, layers: int) -> bool:
        """Whole models are mapped and may leave the page cache; layers that compute on the host may not."""
        return layers == self.all_layers or demand.host_bytes * engines <= self.machine.ram_bytes

    def _offload(self, engines: int, width: int) -> Iterator[Plan]:
        """As many layers on the GPUs as they hold; none where they hold all."""
        share = float(width)
        if self._plan("offload", engines, width, share).fits:
            return
        low, high = 1, self.shape.n_layer
        while low < high:
            middle = (low + high + 1) // 2
            if self._plan("offload", engines, width, share, middle).fits:
                low = middle
            else:
                high = middle - 1
        yield self._plan("offload", engines, width, share, low)

    def _cpu(self) -> Plan:
        slots = self.wish.streams
        demand = self.need(slots, 1, 0)
        return Plan(
            kind="cpu",
            engines=1,
            gpus_per_engine=0,
            gpu_share=0.0,
            n_parallel=slots,
            n_ctx=slots * self.wish.slot_tokens,
            n_gpu_layers=0,
            split_mode="none",
            groups=(),
            tensor_splits=(),
            need_bytes=demand.host_bytes,
            budget_bytes=self.machine.ram_bytes,
            fits=demand.host_bytes <= self.machine.ram_bytes,
        )


def _size(gpu: PlanGpu) -> tuple[float, ...]:
    return gpu.free_bytes, gpu.total_bytes, gpu.bytes_s or 0.0, gpu.flops or 0.0


def _why(plan: Plan, ranked: Sequence[Plan], machine: Machine) -> str:
    held = f"{plan.need_bytes / GIB:.1f} of {plan.budget_bytes / GIB:.1f} GiB"
    if not plan.fits:
        return f"does not fit: an engine takes {held}"
    room = f"{KINDS[plan.kind]}; an engine takes {held}"
    best = ranked[0]
    other = best if plan is not best else next((each for each in ranked[1:] if each.fits), None)
    if other is None:
        return f"{room}; nothing else fits"
    if not plan.tokens_s or not other.tokens_s:
        return f"{room}; memory bandwidth is not known, so it is placed by how simple it is"
    slower = plan if plan.tokens_s < other.tokens_s else other
    return f"{room}; {plan.tokens_s / other.tokens_s:.2f}x the tokens/s of {other.title}: {_cause(slower, machine)}"


def _cause(plan: Plan, machine: Machine) -> str:
    """What keeps a plan from being faster."""
    if plan.is_sampling_bound:
        return f"a server samples its streams in turn on one CPU thread, {plan.n_parallel} in {plan.title}"
    link = f"{machine.link_bytes_s / 1e9:.0f} GB/s {'NVLink' if machine.is_nvlink else 'PCIe'}"
    return {
        "replicas": "each engine reads all weights for its own streams",
        "shares": "engines on one GPU take turns, and each reads all weights for its own streams",
        "layer": "the GPUs of a layer split work in turn",
        "tensor": f"a tensor split adds up {REDUCTIONS} results a layer over {link}",
        "offload": f"layers on the host are read at {machine.ram_bytes_s / 1e9:.0f} GB/s",
        "cpu": f"the host's memory gives {machine.ram_bytes_s / 1e9:.0f} GB/s",
    }[plan.kind]
