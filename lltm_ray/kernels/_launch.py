"""How Triton kernels of this package are launched: settings chosen by a tuner, times taken by CUDA events.

Settings are tried on the caller's own arrays, which all these kernels may write more than once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise
from typing import Any

from lltm_ray._optional import load
from lltm_ray.kernels._arrays import on_device_of
from lltm_ray.kernels.tuning import Settings, Tuner, TuningKey, shape_class

_WARM_UPS, _REPEATS = 2, 5


def launch(
    run: Callable[[Settings], None],
    name: str,
    candidates: Sequence[Settings],
    *,
    tuner: Tuner | None,
    sizes: tuple[int, ...],
    tensor: Any,
) -> None:
    """Run with the first of `candidates`, or with the fastest where a tuner is given.

    While a CUDA graph is captured nothing can be measured: the tuner's remembered choice is taken, or the first.

    Args:
        run: launches the kernel with given settings; may be called any number of times.
        name: of the kernel, for the tuner.
        candidates: settings to try.
        tuner: measures once for a device, shape class and element type.
        sizes: what the shape class is made of.
        tensor: on the device to run on.
    """
    with on_device_of(tensor):
        if tuner is None or not tensor.is_cuda:
            run(candidates[0])
            return
        device, capability = _device(tensor.device.index)
        key = TuningKey(
            kernel=name,
            device=device,
            compute_capability=capability,
            shape_class=shape_class(*sizes),
            dtype=str(tensor.dtype).removeprefix("torch."),
        )
        if load("torch").cuda.is_current_stream_capturing():
            run(tuner.remembered(key, candidates) or candidates[0])
            return
        run(tuner.choose(key, candidates, lambda settings: _seconds(lambda: run(settings))))


@cache
def _device(index: int) -> tuple[str, tuple[int, int]]:
    cuda = load("torch").cuda
    major, minor = cuda.get_device_capability(index)
    return str(cuda.get_device_name(index)), (int(major), int(minor))


def _seconds(run: Callable[[], None]) -> float:
    """Median time of a launch on the current stream; infinity for settings that take more than the device has."""
    torch, resources = load("torch"), load("triton.runtime.errors:OutOfResources", extra="torch")
    try:
        for _ in range(_WARM_UPS):
            run()
    except resources:
        return float("inf")
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(_REPEATS + 1)]
    marks[0].record()
    for mark in marks[1:]:
        run()
        mark.record()
    marks[-1].synchronize()
    times = sorted(before.elapsed_time(after) for before, after in pairwise(marks))
    return float(times[len(times) // 2]) / 1e3
