"""Several quantizations over a Ray cluster: `quantize_many`, one task a file."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event, Thread
from typing import Any

import ray

from lltm_ray.actors.crew import cause_of
from lltm_ray.actors.quantize_job import Quantized, QuantizeJob, run_job
from lltm_ray.actors.remote import node_ip
from lltm_ray.errors import CancelledError, ConfigError, LltmRayError
from lltm_ray.models.quantize.plan import make_plan
from lltm_ray.models.quantize.rewrite import Progress
from lltm_ray.models.whole_file import check_space

log = logging.getLogger(__name__)

ManyProgress = Callable[[QuantizeJob, str, int, int], None]
"""`(job, tensor, done, total)`, bytes of the source."""
TELL_EVERY_S = 0.25
ANSWER_TIMEOUT_S = 30.0
END_TIMEOUT_S = 30.0
"""How long cancelled tasks have to remove what they had written."""
_RETRIES = 2
"""After a lost worker or node; a file appears whole or not at all, so doing it again is safe."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of one job: exactly one of `done` and `error` is set."""

    job: QuantizeJob
    done: Quantized | None = None
    error: LltmRayError | None = None
    node: str = ""
    """Address of the node that ran it; the file lies there, if its folder is not shared."""


class _Board:
    """Where tasks write how far they are, and read whether to go on."""

    def __init__(self) -> None:
        self._said: dict[int, tuple[str, int, int]] = {}
        self._cancelled = False

    def tell(self, index: int, name: str, done: int, total: int) -> bool:
        """True: end it."""
        self._said[index] = (name, done, total)
        return self._cancelled

    def read(self) -> dict[int, tuple[str, int, int]]:
        """Of the jobs that have begun."""
        return self._said

    def cancel(self) -> set[int]:
        """Those that have begun, and will now be told."""
        self._cancelled = True
        return set(self._said)


_BOARD: Any = ray.remote(num_cpus=0, max_restarts=0)(_Board)  # another one would not know that all is cancelled


def quantize_many(
    jobs: Sequence[QuantizeJob], *, progress: ManyProgress | None = None, cancel: Event | None = None
) -> list[Outcome]:
    """Quantize on the Ray cluster that this process is in; each task asks for as many CPUs as it has threads.

    Sources and folders of `out` must be there on every node. A job that fails does not keep the others from being done.

    Args:
        jobs: what to make; `options.threads` 0 shares the cluster's CPUs between them.
        progress: hears of each job that runs, about four times a second.
        cancel: set by another thread, it cancels all that is not done; so does an exception, KeyboardInterrupt too.

    Returns:
        One outcome a job, in their order.

    Raises:
        ConfigError: two jobs write one file, or no node has the threads that a job asks for.
        DiskFullError: the files together do not fit where they are to be written.
    """
    _check(jobs)
    jobs = _with_threads(jobs)
    board = _BOARD.remote()
    refs: dict[Any, int] = {}
    outcomes: dict[int, Outcome] = {}
    try:
        ray.get(board.read.remote())  # a worker takes seconds to start; a job that ran before could not be cancelled
        refs |= {_task(job).remote(job, index, board): index for index, job in enumerate(jobs)}
        _collect(jobs, refs, outcomes, board, progress=progress, cancel=cancel)
    finally:
        try:
            for ref in _end({ref: index for ref, index in refs.items() if index not in outcomes}, board):
                outcomes[refs[ref]] = _outcome(ref, jobs[refs[ref]])
        finally:
            ray.kill(board)
    return [outcomes.get(index) or _cancelled(job) for index, job in enumerate(jobs)]


def _task(job: QuantizeJob) -> Any:
    return ray.remote(_run).options(num_cpus=job.options.threads, max_retries=_RETRIES)


def _run(job: QuantizeJob, index: int, board: Any) -> Outcome:
    """On a worker."""
    with _listening(board, index) as (moved, cancel):
        try:
            return Outcome(job=job, done=run_job(job, progress=moved, cancel=cancel), node=node_ip())
        except LltmRayError as error:
            return Outcome(job=job, error=error, node=node_ip())


@contextmanager
def _listening(board: Any, index: int) -> Iterator[tuple[Progress, Event]]:
    """Tells the board how far the job is, and sets the event when it is to end or nobody waits for it any more.

    A thread does it: a program may be silent for minutes, and Ray's own cancelling of a running task neither wakes a
    wait nor lets its caller know when the task has cleaned up. A board that does not answer may do so again; one that
    has died will not.
    """
    said, cancel, ended = ("", 0, 0), Event(), Event()

    def moved(name: str, done: int, total: int) -> None:
        nonlocal said
        said = (name, done, total)

    def listen() -> None:
        while not ended.is_set():
            try:
                if ray.get(board.tell.remote(index, *said), timeout=ANSWER_TIMEOUT_S):
                    cancel.set()
            except ray.exceptions.ActorDiedError:
                cancel.set()
            except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError) as error:
                log.warning("the progress of job %d is not heard: %s", index, error)
            ended.wait(TELL_EVERY_S)

    thread = Thread(target=listen, name="quantize-listener", daemon=True)
    thread.start()
    try:
        yield moved, cancel
    finally:
        ended.set()
        thread.join()


def _collect(
    jobs: Sequence[QuantizeJob],
    refs: dict[Any, int],
    outcomes: dict[int, Outcome],
    board: Any,
    *,
    progress: ManyProgress | None,
    cancel: Event | None,
) -> None:
    """Fill `outcomes` until all are there, or `cancel` is set."""
    pending = list(refs)
    while pending and not (cancel is not None and cancel.is_set()):
        ready, pending = ray.wait(pending, num_returns=len(pending), timeout=TELL_EVERY_S)
        for ref in ready:
            outcomes[refs[ref]] = _outcome(ref, jobs[refs[ref]])
        if progress is not None and pending:
            for index, said in _read(board).items():
                if index not in outcomes and said[0]:
                    progress(jobs[index], *said)


def _read(board: Any) -> dict[int, tuple[str, int, int]]:
    """What is on it; nothing, where it does not answer."""
    try:
        said: dict[int, tuple[str, int, int]] = ray.get(board.read.remote(), timeout=ANSWER_TIMEOUT_S)
        return said
    except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError) as error:
        log.warning("the progress of quantization is not heard: %s", error)
        return {}


def _outcome(ref: Any, job: QuantizeJob) -> Outcome:
    try:
        outcome: Outcome = ray.get(ref)
        return outcome
    except ray.exceptions.TaskCancelledError:
        return _cancelled(job)
    except ray.exceptions.RayError as error:
        cause = cause_of(error)
        return Outcome(job=job, error=cause if isinstance(cause, LltmRayError) else LltmRayError(f"{job.out}: {error}"))


def _cancelled(job: QuantizeJob) -> Outcome:
    return Outcome(job=job, error=CancelledError(f"{job.out}: cancelled before it was done"))


def _end(refs: dict[Any, int], board: Any) -> list[Any]:
    """Jobs that run remove what they have written and end; those that wait do not begin. Returns those that ended."""
    if not refs:
        return []
    try:
        begun = ray.get(board.cancel.remote(), timeout=ANSWER_TIMEOUT_S)
    except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError) as error:
        log.warning("jobs are cancelled by Ray, nobody else can tell them: %s", error)
        begun = set()
    for ref in (ref for ref, index in refs.items() if index not in begun):
        ray.cancel(ref)
    ended: list[Any] = ray.wait(list(refs), num_returns=len(refs), timeout=END_TIMEOUT_S)[0]
    return ended


def _check(jobs: Sequence[QuantizeJob]) -> None:
    outs = [str(Path(job.out).absolute()) for job in jobs]
    for out in outs:
        if outs.count(out) > 1:
            raise ConfigError("out", out, "is given to two jobs")
    needed = {}
    for job in jobs:
        try:
            needed[Path(job.out)] = make_plan(job.source, job.options).nbytes
        except LltmRayError:  # its own task will say so, and where
            continue
    check_space(needed)


def _with_threads(jobs: Sequence[QuantizeJob]) -> list[QuantizeJob]:
    """Threads for those that leave it open, and none that no node could ever give."""
    nodes = ray.nodes()  # type: ignore[no-untyped-call]
    cpus = [int(node["Resources"].get("CPU", 0)) for node in nodes if node["Alive"]]
    largest = max(cpus, default=0)
    share = max(1, min(largest, sum(cpus) // max(len(jobs), 1)))
    for job in jobs:
        if (job.options.threads or share) > largest:
            why = f"no node of the cluster has so many CPUs; the largest has {largest}"
            raise ConfigError("threads", job.options.threads or share, why)
    return [replace(job, options=replace(job.options, threads=job.options.threads or share)) for job in jobs]
