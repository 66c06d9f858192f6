"""One rank of a group: collectives over `torch.distributed`'s backends, without its process-wide default group.

A backend is used by itself, so that a process may be in several groups, an ended one leaves nothing behind, and whoever
called `init_process_group` for his own work is not disturbed. Ray 2.60 has `ray.util.collective`; it is not used: its
NCCL side needs CuPy and waits for ever for a dead member, and its groups live in a table of the process.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn

from lltm_ray._optional import load
from lltm_ray.actors.collectives_record import CollectiveRecord
from lltm_ray.errors import CollectiveError, ConfigError, DTypeError, ShapeError
from lltm_ray.telemetry.collective import OPERATIONS

log = logging.getLogger(__name__)

REDUCTIONS = ("sum", "product", "min", "max", "avg")
DTYPES = ("float32", "float16", "bfloat16", "float64", "int32", "int64", "int8", "uint8")
_MOST_DIMS = 8
_ROLL_CALL_S = 1.0
_SPIN_S = 0.002
_PAUSE_S = 0.0002


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendezvous:
    """Where the ranks of a group find each other: the store of rank 0."""

    host: str
    port: int
    size: int


def serve_store(host: str, size: int, timeout_s: float) -> tuple[Any, Rendezvous]:
    """Rank 0's store on a free port of this address only, and where it is. Keep the store as long as the group.

    It asks nobody for a key: choose loopback, or an address that only the cluster reaches.
    """
    distributed = load_distributed()
    listener = socket.create_server((host, 0))
    port = int(listener.getsockname()[1])
    store = distributed.TCPStore(
        host,
        port,
        size,
        is_master=True,
        timeout=timedelta(seconds=timeout_s),
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )
    return store, Rendezvous(host=host, port=port, size=size)


def load_distributed() -> Any:
    """`torch.distributed`.

    Raises:
        MissingExtraError: PyTorch is not installed, or was built without it.
    """
    return load("torch.distributed", extra="torch", feature="collectives between actors")


class _Undone(RuntimeError):
    """A wait that was called off, or took too long."""

    def __init__(self, why: str, missing: tuple[int, ...] = ()) -> None:
        super().__init__(why)
        self.missing = missing


class Communicator:
    """This process in a group. Calls block; tensors are changed in place; every rank makes the same calls in order.

    Args:
        rendezvous: of the group.
        rank: of this process, from 0.
        device: `cpu` (gloo) or a CUDA device such as `cuda:0` (NCCL).
        store: rank 0's own, from `serve_store`; None connects to it.
        address: of this host, for gloo to bind; NCCL chooses by NCCL_SOCKET_IFNAME.
        timeout_s: longest wait of a call, joining included.
        is_watched: a driver makes the calls of all ranks, compares them, and sees who is dead. Else the ranks tell each
            other operation, type and shape before each call, and after a failed one who is still there.

    Raises:
        CollectiveError: not all ranks came in time; `missing` names them.
        MissingExtraError: no PyTorch.
    """

    def __init__(  # noqa: PLR0913 -- a group's coordinates, by name
        self,
        rendezvous: Rendezvous,
        rank: int,
        *,
        device: str = "cpu",
        store: Any = None,
        address: str = "127.0.0.1",
        timeout_s: float = 60.0,
        is_watched: bool = False,
    ) -> None:
        if not 0 <= rank < rendezvous.size:
            raise ConfigError("rank", rank, f"must be from 0 to {rendezvous.size - 1}")
        self.rank, self.size = rank, rendezvous.size
        self.backend = "gloo" if device == "cpu" else "nccl"
        self._torch, self._distributed = load("torch", extra="torch"), load_distributed()
        self.device = self._torch.device(device)
        self._timeout_s, self._is_watched = timeout_s, is_watched
        self._failure: CollectiveError | None = None
        self._told: tuple[int, ...] | None = None
        self._store: Any = store
        self._group: Any = None
        try:
            self._store = store or self._connect(rendezvous)
            self._meet()
            self._group = self._make_group(address)
            self.barrier()  # connects every rank while all are known to be there
        except RuntimeError as error:
            self._fail("join", error)

    def all_reduce(self, tensor: Any, op: str = "sum") -> CollectiveRecord:
        """Every rank's tensor becomes the reduction of all."""
        options = self._distributed.AllreduceOptions()
        options.reduceOp = self._reduction(op, tensor)
        record = self._run("all_reduce", tensor, lambda: self._group.allreduce([tensor], options), op=op)
        if op == "avg":
            tensor.div_(self.size)
        return record

    def broadcast(self, tensor: Any, root: int = 0) -> CollectiveRecord:
        """Every rank's tensor becomes the root's."""
        options = self._distributed.BroadcastOptions()
        options.rootRank, options.rootTensor = self._peer("root", root), 0
        return self._run("broadcast", tensor, lambda: self._group.broadcast([tensor], options), root=root)

    def reduce(self, tensor: Any, root: int = 0, op: str = "sum") -> CollectiveRecord:
        """The root's tensor becomes the reduction of all; what is in the others' then is not defined."""
        options = self._distributed.ReduceOptions()
        options.reduceOp = self._reduction(op, tensor)
        options.rootRank, options.rootTensor = self._peer("root", root), 0
        record = self._run("reduce", tensor, lambda: self._group.reduce([tensor], options), op=op, root=root)
        if op == "avg" and self.rank == root:
            tensor.div_(self.size)
        return record

    def all_gather(self, tensor: Any) -> tuple[Any, CollectiveRecord]:
        """Every rank's tensors, stacked in order of rank: shape (size, *shape)."""
        out = self._torch.empty((self.size, *tensor.shape), dtype=tensor.dtype, device=tensor.device)
        flat = out.view(-1) if tensor.dim() == 0 else out.view(-1, *tensor.shape[1:])
        given = tensor.view(1) if tensor.dim() == 0 else tensor
        return out, self._run("all_gather", tensor, lambda: self._group._allgather_base(flat, given), factor=self.size)

    def reduce_scatter(self, tensor: Any, op: str = "sum") -> tuple[Any, CollectiveRecord]:
        """Each rank's part of the reduction of all: rows `rank * n / size` to the next rank's, of n rows."""
        if tensor.dim() == 0 or tensor.shape[0] % self.size:
            raise ShapeError(f"reduce_scatter of shape {tuple(tensor.shape)}: rows must divide by {self.size} ranks")
        shape = (tensor.shape[0] // self.size, *tensor.shape[1:])
        out = self._torch.empty(shape, dtype=tensor.dtype, device=tensor.device)
        options = self._distributed.ReduceScatterOptions()
        options.reduceOp = self._reduction(op, tensor)
        start = lambda: self._group._reduce_scatter_base(out, tensor, options)  # noqa: E731
        record = self._run("reduce_scatter", tensor, start, op=op)
        if op == "avg":
            out.div_(self.size)
        return out, record

    def barrier(self) -> CollectiveRecord:
        """Returns when every rank has come: a reduction of one number, which NCCL has no lighter word for."""
        tensor = self._torch.zeros(1, dtype=self._torch.int32, device=self.device)
        options = self._distributed.AllreduceOptions()
        return self._run("barrier", tensor, lambda: self._group.allreduce([tensor], options))

    def send(self, tensor: Any, to: int) -> CollectiveRecord:
        """To one rank, which calls `recv`; only these two are in the call."""
        self._peer("to", to, not_me=True)
        return self._run("send", tensor, lambda: self._group.send([tensor], to, 0), is_pair=True)

    def recv(self, tensor: Any, source: int) -> CollectiveRecord:
        """The tensor becomes what that rank sends."""
        self._peer("source", source, not_me=True)
        return self._run("recv", tensor, lambda: self._group.recv([tensor], source, 0), is_pair=True)

    def abort(self, missing: tuple[int, ...] = ()) -> None:
        """From another thread: the group has ended, and every later call says so with a `CollectiveError` at once.

        The running one does so too on NCCL. On gloo, which cannot be called off, it ends with the connection to a rank
        that has died, or after its own time.
        """
        self._told = missing

    def destroy(self) -> None:
        """Close every connection. Idempotent; the process keeps nothing of the group."""
        group, self._group, self._store = self._group, None, None
        if group is not None:
            end = getattr(group, "abort" if self._failure else "shutdown", None)  # what it lacks, forgetting it does
            if end is not None:
                end()
        self._failure = self._failure or CollectiveError("the group was destroyed; make another", "destroy")

    def _connect(self, rendezvous: Rendezvous) -> Any:
        limit = timedelta(seconds=self._timeout_s)
        return self._distributed.TCPStore(
            rendezvous.host, rendezvous.port, rendezvous.size, False, limit, wait_for_workers=False
        )

    def _meet(self) -> None:
        """Nobody goes on before all are there: NCCL's own start waits for ever."""
        self._store.set(f"here/{self.rank}", "1")
        deadline = time.monotonic() + self._timeout_s
        while missing := self._absent("here"):
            if self._told is not None or time.monotonic() > deadline:
                raise _Undone(f"not all {self.size} ranks came", self._told or missing)
            time.sleep(0.01)

    def _absent(self, roll: str) -> tuple[int, ...]:
        return tuple(rank for rank in range(self.size) if not self._store.check([f"{roll}/{rank}"]))

    def _make_group(self, address: str) -> Any:
        distributed, limit = self._distributed, timedelta(seconds=self._timeout_s)
        store = distributed.PrefixStore(self.backend, self._store)
        if self.backend == "gloo":
            options = distributed.ProcessGroupGloo._Options()
            options._devices = [distributed.ProcessGroupGloo.create_device(hostname=address)]
            options._timeout = limit
            return distributed.ProcessGroupGloo(store, self.rank, self.size, options)
        self._torch.cuda.set_device(self.device)
        options = distributed.ProcessGroupNCCL.Options()
        options._timeout = limit * 2 + timedelta(seconds=60)  # ours is first: NCCL's watchdog would end the process
        return distributed.ProcessGroupNCCL(store, self.rank, self.size, options)

    def _run(  # noqa: PLR0913 -- what the ranks must agree on, by name
        self,
        operation: str,
        tensor: Any,
        start: Callable[[], Any],
        *,
        op: str = "sum",
        root: int = 0,
        factor: int = 1,
        is_pair: bool = False,
    ) -> CollectiveRecord:
        self._check(tensor)
        try:
            if self._told is not None:
                raise _Undone("called off")
            if not (self._is_watched or is_pair) and operation != "barrier":
                self._agree([OPERATIONS.index(operation), REDUCTIONS.index(op), root, *_header(tensor)])
            self._synchronize()
            began_unix_nano, began_s = time.time_ns(), time.perf_counter()
            self._wait(start())
            seconds = time.perf_counter() - began_s
        except RuntimeError as error:
            self._fail(operation, error)
        return CollectiveRecord(
            operation=operation,
            backend=self.backend,
            dtype=_name(tensor),
            ranks=self.size,
            nbytes=0 if operation == "barrier" else tensor.numel() * tensor.element_size() * factor,
            seconds=seconds,
            began_unix_nano=began_unix_nano,
        )

    def _check(self, tensor: Any) -> None:
        if self._failure is not None:
            raise self._failure
        if tensor.device != self.device:
            raise ConfigError("tensor.device", str(tensor.device), f"the group is on {self.device}")
        if _name(tensor) not in DTYPES:
            raise DTypeError(f"{_name(tensor)} cannot be sent: take one of {', '.join(DTYPES)}")
        if not tensor.is_contiguous() or tensor.dim() > _MOST_DIMS:
            raise ShapeError(
                f"a tensor of shape {tuple(tensor.shape)} must be contiguous, of {_MOST_DIMS} axes at most"
            )

    def _agree(self, mine: list[int]) -> None:
        """Every rank is about to do the same; one of them that is not makes all refuse."""
        own = self._torch.tensor(mine, dtype=self._torch.int64, device=self.device)
        seen = self._torch.empty(self.size * len(mine), dtype=self._torch.int64, device=self.device)
        self._wait(self._group._allgather_base(seen, own))
        rows = seen.view(self.size, len(mine)).tolist()
        if any(row != rows[0] for row in rows):
            told = "; ".join(f"rank {rank}: {_words(row)}" for rank, row in enumerate(rows))
            raise ShapeError(f"the ranks of a group must make the same call: {told}")

    def _wait(self, work: Any) -> None:
        """NCCL's work is polled, for its own wait has no limit and cannot be called off. Gloo's has both.

        A dead rank's connections end, and so do those of each rank that fails.
        """
        if self.backend == "gloo":
            work.wait(timedelta(seconds=self._timeout_s))
            return
        began = time.monotonic()
        while not work.is_completed():
            waited = time.monotonic() - began
            if self._told is not None:
                raise _Undone("called off")
            if waited > self._timeout_s:
                raise _Undone(f"it took longer than {self._timeout_s:g} s")
            time.sleep(0 if waited < _SPIN_S else _PAUSE_S)
        work.wait()
        self._synchronize()

    def _synchronize(self) -> None:
        if self.backend == "nccl":
            self._torch.cuda.synchronize(self.device)

    def _fail(self, operation: str, error: RuntimeError) -> NoReturn:
        """End the group: what is left of it would mix up later calls."""
        missing = self._told or getattr(error, "missing", None) or (() if self._is_watched else self._roll_call())
        why = "" if isinstance(error, CollectiveError) else f" ({str(error).splitlines()[0][:200]})"
        self._failure = CollectiveError(
            f"{operation} failed on rank {self.rank} of {self.size}{why}", operation, missing
        )
        self.destroy()
        raise self._failure from error

    def _roll_call(self) -> tuple[int, ...]:
        """Ranks that do not say within a second that they have failed, too; rank 0 if its store does not answer."""
        found: list[tuple[int, ...]] = [(0,)]
        caller = threading.Thread(target=self._call_roll, args=(found,), daemon=True)
        caller.start()
        caller.join(2 * _ROLL_CALL_S)
        return found[-1]

    def _call_roll(self, found: list[tuple[int, ...]]) -> None:
        try:
            self._store.set(f"roll/{self.rank}", "1")
            deadline = time.monotonic() + _ROLL_CALL_S
            while (missing := self._absent("roll")) and time.monotonic() < deadline:
                time.sleep(0.01)
            found.append(missing)
        except (RuntimeError, AttributeError) as error:  # the store has ended, or was never reached
            log.debug("no roll call: %s", error)

    def _reduction(self, op: str, tensor: Any) -> Any:
        if op not in REDUCTIONS:
            raise ConfigError("op", op, f"must be one of {', '.join(REDUCTIONS)}")
        if op == "avg" and not tensor.dtype.is_floating_point:
            raise DTypeError(f"avg of {_name(tensor)} would lose its fraction: take sum, or a float type")
        return getattr(self._distributed.ReduceOp, "SUM" if op == "avg" else op.upper())

    def _peer(self, field: str, rank: int, *, not_me: bool = False) -> int:
        if not 0 <= rank < self.size or (not_me and rank == self.rank):
            raise ConfigError(
                field, rank, f"must be another rank from 0 to {self.size - 1}" if not_me else "no such rank"
            )
        return rank


def _name(tensor: Any) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _header(tensor: Any) -> list[int]:
    sizes = list(tensor.shape)
    return [DTYPES.index(_name(tensor)), len(sizes), *sizes, *[0] * (_MOST_DIMS - len(sizes))]


def _words(row: list[int]) -> str:
    operation, op, root, dtype, dims = row[:5]
    call = OPERATIONS[operation]
    more = f", {REDUCTIONS[op]}" if "reduce" in call else ""
    more += f", root {root}" if call in ("broadcast", "reduce") else ""
    return f"{call} of {DTYPES[dtype]} {tuple(row[5 : 5 + dims])}{more}"
