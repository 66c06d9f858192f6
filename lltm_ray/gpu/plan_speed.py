"""How fast a plan is: `Speeds.rate`. Pure.

The roofline (`_roofline`) of what llama.cpp does, for each engine on its own GPUs; engines add up:

- A decoding step reads every weight once and takes longer the more streams it has (`_roofline.BATCHED`), and it reads
  each stream's part of the KV cache. Sampling on one CPU thread an engine is why several engines on one GPU can make
  more than one.
- Layer split: GPUs work in turn. llama.cpp decodes all slots in one step and waits for it, so more slots do not fill
  the gaps; only a prompt's physical batches overlap.
- Tensor split: GPUs read their parts of each matrix and of the KV cache at once, and add up `REDUCTIONS` results of
  each layer over the link.
- Layers left on the host are read at the host's bandwidth.

Measured on H200s with models of 1.3 B and 5.3 B parameters, up to 64 streams; elsewhere it is an extrapolation, whose
ratios between plans of one machine are what it is for.
"""

from __future__ import annotations

from dataclasses import replace
from math import fsum

from lltm_ray._roofline import SAMPLE_S, compute_s, cycle_s, decode_s, prefill_s
from lltm_ray.gpu.plan_parts import Machine, Need, Plan, PlanGpu, Shape, Wish

REDUCTIONS = 2
"""Of a layer: behind attention's output and behind the feed-forward's."""
REDUCE_BATCH_S = 35e-6
"""More for each of them where a step has several streams: llama.cpp sends larger ones as BF16, there and back. What a
step of 16 streams on two H200s took beyond all else that is reckoned here."""
UBATCH = 512

_Slice = tuple[tuple[float, PlanGpu], ...]
"""An engine's GPUs, each with the part of the model that lies on it."""


class Speeds:
    """Rates plans for one model on one machine. Sums are exact, so that the order of the GPUs does not matter."""

    def __init__(self, shape: Shape, machine: Machine, wish: Wish, need: Need) -> None:
        self.shape, self.machine, self.wish, self.need = shape, machine, wish, need

    def rate(self, plan: Plan) -> Plan:
        """The same with its speeds; None for those that nobody can know."""
        slices = self._slices(plan)
        prefill_x = self._prefill_x(plan, slices)
        alone = [self._step_s(plan, slice_, 1, 1) for slice_ in slices]
        full = [self._step_s(plan, slice_, plan.n_parallel, plan.engines) for slice_ in slices]
        known, steps = [step for step in alone if step is not None], [step for step in full if step is not None]
        if len(steps) < len(slices):
            return replace(plan, prefill_x=prefill_x)
        n_vocab, slots = self.shape.n_vocab, plan.n_parallel
        beside = max(1, round(1 / plan.gpu_share)) if plan.gpu_share else 1
        cycles = [cycle_s(step, n_vocab=n_vocab, streams=slots, beside=beside) for step in steps]
        busy_ratio = min(1.0, self.wish.streams / (plan.engines * slots))
        flops = self._fastest_flops()
        work_s = compute_s(self._active_params(), 1, flops) if flops else None
        return replace(
            plan,
            stream_tokens_s=1 / (max(known) + n_vocab * SAMPLE_S),
            tokens_s=busy_ratio * fsum(slots / cycle for cycle in cycles),
            is_sampling_bound=2 * plan.engines * slots * n_vocab * SAMPLE_S > fsum(cycles),
            prefill_x=prefill_x,
            prefill_tokens_s=prefill_x / work_s if prefill_x is not None and work_s else None,
        )

    def _slices(self, plan: Plan) -> list[_Slice]:
        """Of each engine; one that is empty on the CPU."""
        splits = plan.tensor_splits or ((1.0,),) * len(plan.groups)
        gpus = self.machine.gpus
        return [
            tuple((part, gpus[at]) for part, at in zip(parts, group, strict=True))
            for parts, group in zip(splits, plan.groups, strict=True)
        ] or [()]

    def _step_s(self, plan: Plan, gpus: _Slice, streams: int, busy: int) -> float | None:
        """One decoding step of an engine, without sampling, while so many engines share the host's memory."""
        shape = self.shape
        demand = self.need(plan.n_parallel, max(len(gpus), 1), plan.n_gpu_layers)
        read = shape.read_ratio(streams)
        kv = shape.kv_token_bytes * streams * self.wish.slot_tokens / 2
        host_part = 1 - plan.n_gpu_layers / (shape.n_layer + 1)
        host = demand.weights_host_bytes * read * (host_part > 0) + kv * host_part
        host_s = busy * host / self.machine.ram_bytes_s
        if not gpus:
            return decode_s(host_s)
        turns = [part / gpu.bytes_s for part, gpu in gpus if gpu.bytes_s]
        if len(turns) < len(gpus):
            return None
        turn_s = max(turns) if plan.kind == "tensor" else fsum(turns)
        weights_s = demand.weights_device_bytes * read * turn_s
        kv_s = kv * (1 - host_part) * turn_s
        step_s = decode_s(weights_s, layers=shape.n_layer, streams=streams)
        return host_s + kv_s + step_s + self._exchange_s(plan, streams)

    def _exchange_s(self, plan: Plan, tokens: int) -> float:
        """Hidden states between GPUs, float32."""
        width, machine = plan.gpus_per_engine, self.machine
        if width < 2:
            return 0.0
        sent_s = tokens * self.shape.n_embd * 4 / machine.link_bytes_s
        if plan.kind == "tensor":
            each_s = machine.latency_s + REDUCE_BATCH_S * (tokens > 1) + 2 * sent_s * (width - 1) / width
            return self.shape.n_layer * REDUCTIONS * each_s
        return (width - 1) * (machine.latency_s + sent_s)

    def _active_params(self) -> float:
        """Weights that a prompt's token is computed with."""
        return self.shape.n_params * self.shape.read_ratio(1)

    def _fastest_flops(self) -> float | None:
        """Of the fastest GPU; None where one does not tell."""
        told = [gpu.flops for gpu in self.machine.gpus if gpu.flops]
        return max(told) if told and len(told) == len(self.machine.gpus) else None

    def _prefill_x(self, plan: Plan, slices: list[_Slice]) -> float | None:
        if plan.kind == "cpu":
            return None
        fastest = self._fastest_flops()
        if fastest is None and plan.kind in ("tensor", "offload"):
            return None
        batch_s = compute_s(self._active_params(), UBATCH, fastest) if fastest else 1.0  # unknown GPUs count as equal
        beside = max(1, round(1 / plan.gpu_share))
        times = [self._batch_s(plan, [batch_s * part * _slower(gpu, fastest) for part, gpu in each]) for each in slices]
        return fsum(batch_s / time for time in times) / beside

    def _batch_s(self, plan: Plan, stages_s: list[float]) -> float:
        """One physical batch of a prompt on an engine that has its GPUs for itself."""
        if plan.kind == "tensor":
            return max(stages_s) + self._exchange_s(plan, UBATCH)
        if plan.kind != "offload":
            return prefill_s(stages_s)
        demand = self.need(plan.n_parallel, len(stages_s), plan.n_gpu_layers)
        return fsum(stages_s) + demand.weights_host_bytes / self.machine.link_bytes_s


def _slower(gpu: PlanGpu, fastest: float | None) -> float:
    """How many times as long as the fastest it takes."""
    return fastest / gpu.flops if fastest and gpu.flops else 1.0
