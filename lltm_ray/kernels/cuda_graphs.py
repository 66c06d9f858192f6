"""CUDA graphs of one function, kept by the shapes of its inputs.

A graph replays a fixed sequence of launches on fixed addresses. So each captured graph has inputs of its own, into
which every call copies, and outputs of its own, which the next replay writes over. Whatever else the function reads,
such as weights, must live as long as the graph, and in the same place.

::

    graphs = GraphPool(decode)
    graphs.capture(tokens, cache)             # once a set of shapes: warm-up on a side stream, then capture
    logits = graphs(tokens, cache)            # copies in, replays, and returns copies of the outputs
    with graphs.replay(tokens, cache) as out: # the outputs themselves, valid inside; another thread waits
        ...

All graphs of a pool share one memory pool; a lock keeps two replays from running at once, which such sharing needs.
Replays must be ordered on the device too: call from one stream, or wait between streams.
"""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from lltm_ray._optional import load
from lltm_ray.errors import ConfigError
from lltm_ray.kernels._arrays import dtype_name, require_array, torch_of

Key = tuple[tuple[tuple[int, ...], str, str], ...]
"""Shape, element type and device of each input."""


@dataclass(frozen=True, slots=True)
class _Captured:
    graph: Any
    inputs: tuple[Any, ...]
    outputs: Any


class GraphPool:
    """Captured graphs of `function`, at most `limit` of them: the least recently used goes first.

    Args:
        function: takes CUDA tensors by position, and returns a tensor or tuples, lists and dicts of tensors. It must
            not wait for the device, nor depend on values on the host.
        limit: most graphs kept.
        warm_ups: calls before the capture, which compile kernels and fill caches.
    """

    def __init__(self, function: Callable[..., Any], *, limit: int = 16, warm_ups: int = 3) -> None:
        if limit < 1:
            raise ConfigError("limit", limit, "must be at least 1")
        if warm_ups < 1:
            raise ConfigError("warm_ups", warm_ups, "must be at least 1: what compiles on first use cannot be captured")
        self._function = function
        self._limit = limit
        self._warm_ups = warm_ups
        self._lock = threading.RLock()
        self._captured: OrderedDict[Key, _Captured] = OrderedDict()
        self._memory: Any = None
        self._sides: dict[Any, Any] = {}

    def __len__(self) -> int:
        return len(self._captured)

    def __contains__(self, inputs: tuple[Any, ...]) -> bool:
        """Whether inputs of these shapes, types and devices were captured."""
        return _key(inputs) in self._captured

    def capture(self, *inputs: Any) -> None:
        """Capture the function for inputs like these; nothing where that was done before. Waits for the device.

        No other thread may use the device meanwhile: CUDA would end the capture with an error.

        Raises:
            ConfigError: an input is no CUDA tensor, or they are on different devices.
            RuntimeError: PyTorch's own: the function cannot be captured. Nothing is kept then.
        """
        key = _key(inputs)
        _require_cuda(inputs)
        with self._lock:
            if key in self._captured:
                return
            self._captured[key] = self._capture(inputs)
            if len(self._captured) > self._limit:
                _, oldest = self._captured.popitem(last=False)
                load("torch").cuda.synchronize(oldest.inputs[0].device)
                oldest.graph.reset()

    def __call__(self, *inputs: Any) -> Any:
        """Copy `inputs` in, replay, and return copies of the outputs. Does not wait for the device.

        Raises:
            ConfigError: inputs of shapes, types or devices that were not captured.
        """
        with self.replay(*inputs) as outputs:
            return _copied(outputs)

    @contextlib.contextmanager
    def replay(self, *inputs: Any) -> Iterator[Any]:
        """Like a call, but the outputs are the graph's own: the next replay of any graph here writes over them.

        Raises:
            ConfigError: inputs of shapes, types or devices that were not captured.
        """
        key = _key(inputs)
        with self._lock:
            captured = self._captured.get(key)
            if captured is None:
                raise ConfigError("inputs", key, f"were not captured; captured are {list(self._captured)}")
            self._captured.move_to_end(key)
            torch = load("torch")
            with torch.cuda.device(inputs[0].device), torch.no_grad():
                for own, given in zip(captured.inputs, inputs, strict=True):
                    own.copy_(given)
                captured.graph.replay()
                yield captured.outputs

    def clear(self) -> None:
        """Drop all graphs and their memory, after waiting for the device."""
        with self._lock:
            for captured in self._captured.values():
                load("torch").cuda.synchronize(captured.inputs[0].device)
                captured.graph.reset()
            self._captured.clear()

    def _capture(self, inputs: tuple[Any, ...]) -> _Captured:
        torch = load("torch")
        with torch.cuda.device(inputs[0].device), torch.no_grad():
            own = tuple(given.detach().clone() for given in inputs)
            side = self._sides.setdefault(inputs[0].device, torch.cuda.Stream())
            current = torch.cuda.current_stream()
            side.wait_stream(current)
            with torch.cuda.stream(side):
                for _ in range(self._warm_ups):
                    self._function(*own)
                    self._restore(own, inputs)
            current.wait_stream(side)
            torch.cuda.synchronize()
            # A pool that no graph holds any more is gone, also after a capture that failed.
            memory = self._memory if self._captured else torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=memory, stream=side):
                outputs = self._function(*own)
            self._memory = memory
            return _Captured(graph, own, outputs)

    @staticmethod
    def _restore(own: tuple[Any, ...], inputs: tuple[Any, ...]) -> None:
        """A function that writes to its inputs starts from the given ones each time."""
        for mine, given in zip(own, inputs, strict=True):
            mine.copy_(given)


def _key(inputs: tuple[Any, ...]) -> Key:
    for given in inputs:
        require_array("inputs", given)
    return tuple((tuple(given.shape), dtype_name(given), str(getattr(given, "device", "cpu"))) for given in inputs)


def _require_cuda(inputs: tuple[Any, ...]) -> None:
    if not inputs:
        raise ConfigError("inputs", inputs, "a graph needs at least one input")
    for given in inputs:
        if torch_of(given) is None or not given.is_cuda:
            raise ConfigError("inputs", str(getattr(given, "device", "cpu")), "CUDA graphs take CUDA tensors")
        if given.device != inputs[0].device:
            raise ConfigError("inputs", str(given.device), f"all must be on {inputs[0].device}")


def _copied(outputs: Any) -> Any:
    if torch_of(outputs) is not None:
        return outputs.clone()
    if isinstance(outputs, dict):
        return {name: _copied(each) for name, each in outputs.items()}
    if isinstance(outputs, tuple) and hasattr(outputs, "_fields"):
        return type(outputs)(*map(_copied, outputs))
    if isinstance(outputs, list | tuple):
        return type(outputs)(map(_copied, outputs))
    return outputs
