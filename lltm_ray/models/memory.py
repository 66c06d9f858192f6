"""Does a model fit a share, and how: `plan_fit` chooses context, slots and layers; `estimate`, what they take.

Pure: no I/O. More memory never gives less context. In order, a share's memory buys: something that runs at all (512
tokens, one slot); the slots asked for; a comfortable context; all layers on the GPU; then all the context it can hold.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lltm_ray.config import EngineConfig
from lltm_ray.errors import ModelDoesNotFitError
from lltm_ray.models.footprint import CTX_MULTIPLE, MemoryEstimate, MemoryModel, estimate
from lltm_ray.models.gguf import GgufInfo

__all__ = ["MemoryEstimate", "MemoryPlan", "estimate", "plan_fit"]

SMALLEST_SLOT_TOKENS = 512
"""Below this a chat template and a question hardly leave room for an answer."""
COMFORTABLE_SLOT_TOKENS = 2048
"""A slot's context for which layers move to the CPU, but for no more: decode on the CPU is some ten times slower."""
DEFAULT_SLOT_TOKENS = 8192
"""Most a slot gets unasked on a CPU or without a known budget: attention over more takes a CPU seconds a token, and
memory that looks free there is shared with everything else on the machine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """Settings that fit, what they take, and in sentences what was reduced to get there."""

    n_ctx: int
    """Tokens for all slots together."""
    n_parallel: int
    n_gpu_layers: int
    """As llama.cpp counts them; `n_layer + 1` is everything, 0 the CPU alone."""
    estimate: MemoryEstimate
    shrunk: tuple[str, ...] = ()


def plan_fit(info: GgufInfo, *, budget_bytes: int | None, config: EngineConfig, on_gpu: bool) -> MemoryPlan:
    """Fit a model into a share.

    Args:
        info: the model (`read_model`).
        budget_bytes: memory of the share: of its GPUs together, or of the host without one. None: unknown, no limit.
        config: what is set is kept (n_ctx, n_gpu_layers); what is None is chosen. `n_parallel` is lowered only
            if n_ctx is not set and even 512 tokens a slot do not fit.
        on_gpu: whether the share has a GPU; without one n_gpu_layers is 0.

    Raises:
        ModelDoesNotFitError: a set value does not fit, or nothing does; with the bytes needed and a remedy.
        ConfigError: a cache type this model cannot use.
    """
    return _Planner(info, budget_bytes, config, on_gpu).plan()


def _largest(low: int, high: int, fits: Callable[[int], bool]) -> int:
    """The largest of low..high that fits, where `low` is known to and fitting is monotone."""
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


class _Planner:
    def __init__(self, info: GgufInfo, budget_bytes: int | None, config: EngineConfig, on_gpu: bool) -> None:
        self.info, self.budget, self.config, self.on_gpu = info, budget_bytes, config, on_gpu
        self.model = MemoryModel(info, config)
        self.trained = info.n_ctx_train or DEFAULT_SLOT_TOKENS
        roomy = on_gpu and budget_bytes is not None
        most = self.trained if roomy else min(self.trained, DEFAULT_SLOT_TOKENS)
        self.most_units = max(most // CTX_MULTIPLE, 1)
        self.least_units = min(SMALLEST_SLOT_TOKENS // CTX_MULTIPLE, self.most_units)

    def plan(self) -> MemoryPlan:
        if self.config.n_ctx is not None:
            return self._result(self.config.n_ctx, self.config.n_parallel, self._layers_for(self.config.n_ctx))
        if self._may_choose_layers():
            comfort = min(COMFORTABLE_SLOT_TOKENS // CTX_MULTIPLE, self.most_units)
            slots = self.config.n_parallel
            if not self._fits(self._tokens(comfort, slots), slots, self.model.n_all_layers):
                return self._plan_partly_offloaded(comfort)
            return self._plan_context(self.model.n_all_layers, comfort)
        return self._plan_context(self._fixed_layers(), self.least_units)

    def _plan_partly_offloaded(self, comfort: int) -> MemoryPlan:
        slots = self.config.n_parallel
        n_ctx = self._tokens(comfort, slots)
        if self._fits(n_ctx, slots, 1):
            layers = _largest(1, self.model.n_all_layers, lambda count: self._fits(n_ctx, slots, count))
            return self._result(n_ctx, slots, layers)
        return self._plan_context(1, self.least_units)

    def _plan_context(self, layers: int, least: int) -> MemoryPlan:
        """The largest context from `least` on, else fewer slots of the smallest one, else refuse."""
        slots = self.config.n_parallel
        if self._fits(self._tokens(least, slots), slots, layers):
            fits = lambda units: self._fits(self._tokens(units, slots), slots, layers)  # noqa: E731
            return self._result(self._tokens(_largest(least, self.most_units, fits), slots), slots, layers)
        smallest = self.least_units
        if not self._fits(self._tokens(smallest, 1), 1, layers):
            self._refuse(self._tokens(smallest, 1), 1, layers, self._remedy())
        slots = _largest(1, slots, lambda count: self._fits(self._tokens(smallest, count), count, layers))
        return self._result(self._tokens(smallest, slots), slots, layers)

    def _layers_for(self, n_ctx: int) -> int:
        """Layers for a context that was asked for, which is kept or refused."""
        slots = self.config.n_parallel
        fewest = 1 if self._may_choose_layers() else self._fixed_layers()
        if not self._fits(n_ctx, slots, fewest):
            self._refuse(n_ctx, slots, fewest, f"n_ctx={n_ctx} was asked for; {self._advise_context(fewest)}")
        if not self._may_choose_layers():
            return fewest
        return _largest(1, self.model.n_all_layers, lambda count: self._fits(n_ctx, slots, count))

    def _may_choose_layers(self) -> bool:
        return self.on_gpu and self.config.n_gpu_layers is None

    def _fixed_layers(self) -> int:
        return min(self.config.n_gpu_layers or 0, self.model.n_all_layers) if self.on_gpu else 0

    def _tokens(self, units: int, slots: int) -> int:
        return units * CTX_MULTIPLE * slots

    def _need(self, n_ctx: int, slots: int, layers: int) -> int:
        found = self.model.estimate(n_ctx, slots, layers)
        if not self.on_gpu:
            return found.host_bytes
        # llama.cpp sends large batches to the GPU even with all weights on the CPU, so its buffers stay.
        return found.device_bytes if layers else found.compute_bytes

    def _fits(self, n_ctx: int, slots: int, layers: int) -> bool:
        return self.budget is None or self._need(n_ctx, slots, layers) <= self.budget

    def _refuse(self, n_ctx: int, slots: int, layers: int, remedy: str) -> None:
        raise ModelDoesNotFitError(self.info.name, self._need(n_ctx, slots, layers), self.budget or 0, remedy)

    def _advise_context(self, layers: int) -> str:
        slots = self.config.n_parallel
        if not self._fits(self._tokens(self.least_units, slots), slots, layers):
            return self._remedy()
        asked = self.config.n_ctx or 0
        units = _largest(
            self.least_units,
            max(asked // (CTX_MULTIPLE * slots), self.least_units),
            lambda count: self._fits(self._tokens(count, slots), slots, layers),
        )
        return f"n_ctx={self._tokens(units, slots)} fits, or set cache_type_k and cache_type_v to q8_0"

    def _remedy(self) -> str:
        where = "a larger gpu_share" if self.on_gpu else "a machine with more memory"
        fewer = ", or a smaller n_gpu_layers" if self.on_gpu and self.config.n_gpu_layers else ""
        return f"take a smaller quantization or model, {where}{fewer}"

    def _result(self, n_ctx: int, slots: int, layers: int) -> MemoryPlan:
        found = self.model.estimate(n_ctx, slots, layers)
        said = tuple(self._explain(n_ctx, slots, layers))
        return MemoryPlan(n_ctx=n_ctx, n_parallel=slots, n_gpu_layers=layers, estimate=found, shrunk=said)

    def _explain(self, n_ctx: int, slots: int, layers: int) -> list[str]:
        said = []
        if slots < self.config.n_parallel:
            said.append(f"n_parallel is {slots} instead of {self.config.n_parallel}: more slots do not fit")
        slot_tokens = n_ctx // slots
        if self.config.n_ctx is None and slot_tokens < self.trained // CTX_MULTIPLE * CTX_MULTIPLE:
            capped = slot_tokens == self.most_units * CTX_MULTIPLE
            why = "set n_ctx for more" if capped else "that is all the share can hold"
            said.append(f"n_ctx is {n_ctx}, {slot_tokens} a slot of the model's {self.trained}: {why}")
        if self._may_choose_layers() and layers < self.model.n_all_layers:
            said.append(f"n_gpu_layers is {layers} of {self.model.n_all_layers}: the others run on the CPU")
        if not self.on_gpu and self.config.n_gpu_layers:
            said.append(f"n_gpu_layers is 0 instead of {self.config.n_gpu_layers}: the share has no GPU")
        return said
