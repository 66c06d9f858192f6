"""Groups of Ray actors that compute together: all_reduce, broadcast, gather and the like, on NCCL or gloo.

`CollectiveGroup` is the driver's face of it; a rank of one's own actor is a `communicator.Communicator`. A call ends
with an answer or an error that says which rank is missing; it does not hang, and a group that failed is at its end.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

import ray

from lltm_ray._optional import load
from lltm_ray.actors import names
from lltm_ray.actors.collectives_record import CollectiveRecord, span_of, together
from lltm_ray.actors.communicator import Communicator, Rendezvous, serve_store
from lltm_ray.actors.crew import cause_of
from lltm_ray.actors.remote import find, node_ip
from lltm_ray.errors import CollectiveError, ConfigError, PlacementError, ShapeError

_START_S = 60.0
_GRACE_S = 5.0
"""After the first rank failed, for the others to say so."""
_KEPT = 1000
_OWN_DEADLINES = {
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    "TORCH_NCCL_ENABLE_MONITORING": "0",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
}
"""Else PyTorch's watchdog ends the process of a call that is late, before it can say who is missing."""


class Member:
    """One rank, as an actor. `work` calls run one at a time; `control` ones beside them."""

    def __init__(self) -> None:
        os.environ.update(_OWN_DEADLINES)
        self._store: Any = None
        self._group: Communicator | None = None

    def place(self) -> dict[str, Any]:
        """Where it runs: node, address, process, UUIDs of its GPUs as CUDA numbers them."""
        load("torch", extra="torch", feature="collectives between actors")
        found = {"node": ray.get_runtime_context().get_node_id(), "address": node_ip(), "pid": os.getpid()}
        return found | {"gpus": [str(each) for each in ray.get_gpu_ids()]}

    def serve(self, host: str, size: int, timeout_s: float) -> Rendezvous:
        """Rank 0's part of the meeting."""
        self._store, where = serve_store(host, size, timeout_s)
        return where

    def join(self, where: Rendezvous, rank: int, device: str, address: str, timeout_s: float) -> None:
        """Become that rank. What calls are made with is compared by the driver, who sees it all."""
        self._group = Communicator(
            where, rank, device=device, store=self._store, address=address, timeout_s=timeout_s, is_watched=True
        )

    def call(self, operation: str, value: Any, options: dict[str, Any]) -> tuple[Any, CollectiveRecord]:
        """One operation on a NumPy array or a tensor; the answer is of the same kind, or None if unwanted."""
        group = self._joined()
        if operation == "barrier":
            return None, group.barrier()
        is_wanted = options.pop("is_wanted", True)
        tensor, give_back = to_tensor(value, group.device)
        found = getattr(group, operation)(tensor, **options)
        out, record = found if isinstance(found, tuple) else (tensor, found)
        return give_back(out) if is_wanted else None, record

    def measure(self, operation: str, nbytes: int, repeats: int) -> list[CollectiveRecord]:
        """Float32 of that size, made here: what the wire gives, without Ray's object store."""
        group = self._joined()
        torch = load("torch", extra="torch")
        parts = group.size if operation in ("all_gather", "reduce_scatter") else 1
        count = max(nbytes // 4 // parts, 1) * (group.size if operation == "reduce_scatter" else 1)
        tensor = torch.ones(count, dtype=torch.float32, device=group.device)
        calls = {"send": lambda: group.send(tensor, 1) if group.rank == 0 else group.recv(tensor, 0)}
        call: Any = calls.get(operation, lambda: getattr(group, operation)(tensor))
        if operation == "send" and group.rank > 1:
            return []
        call()
        records = []
        for _ in range(repeats):
            if operation != "send":
                group.barrier()
            found = call()
            tensor.fill_(1.0)
            records.append(found[1] if isinstance(found, tuple) else found)
        return records

    @ray.method(concurrency_group="control")
    def abort(self, missing: tuple[int, ...]) -> None:
        """End what runs."""
        if self._group is not None:
            self._group.abort(missing)

    def destroy(self) -> None:
        """Leave the group."""
        if self._group is not None:
            self._group.destroy()
        self._group = self._store = None

    def _joined(self) -> Communicator:
        if self._group is None:
            raise CollectiveError("this rank is in no group", "call")
        return self._group


_MEMBER: Any = ray.remote(num_cpus=0, max_restarts=0, concurrency_groups={"control": 1})(Member)  # type: ignore[call-overload]


class CollectiveGroup:
    """Ranks 0 to n - 1, an actor each. A context manager: its end destroys the group and ends the actors.

    Calls take a NumPy array or tensor for each rank and give one for each. Not for several threads at once.
    """

    def __init__(self, members: Sequence[Any], *, backend: str, timeout_s: float, fleet: str | None = None) -> None:
        self.backend = backend
        self.size = len(members)
        self.records: deque[CollectiveRecord] = deque(maxlen=_KEPT)
        """Of the last calls, as their slowest rank saw them."""
        self._members, self._timeout_s, self._fleet = list(members), timeout_s, fleet
        self._failure: CollectiveError | None = None

    @classmethod
    def start(
        cls, ranks: int = 2, *, gpu_share: float | None = None, timeout_s: float = 60.0, fleet: str | None = None
    ) -> Self:
        """Make the actors and let them meet.

        Args:
            ranks: how many.
            gpu_share: GPUs of each: 1 for NCCL, 0 for gloo on CPUs. None: 1 where Ray has so many, else 0.
            timeout_s: longest wait of any call.
            fleet: whose telemetry is told of every call, those that failed too, while it runs.

        Raises:
            CollectiveError: a rank did not come.
            ConfigError: no such number of ranks, or two ranks would share a GPU, which NCCL refuses.
            MissingExtraError: a node has no PyTorch.
            PlacementError: Ray has not so many GPUs.
        """
        if not 1 <= ranks <= 1024:
            raise ConfigError("ranks", ranks, "must be from 1 to 1024")
        gpus = float(ray.cluster_resources().get("GPU", 0.0))  # type: ignore[no-untyped-call]
        share = (1.0 if 0 < ranks <= gpus else 0.0) if gpu_share is None else gpu_share
        if share * ranks > gpus:
            raise PlacementError(f"{share:g} GPU for each of {ranks} ranks", f"{gpus:g} GPUs in all")
        made: Any = _MEMBER.options(num_gpus=share)
        group = cls(
            [made.remote() for _ in range(ranks)],
            backend="nccl" if share else "gloo",
            timeout_s=timeout_s,
            fleet=fleet,
        )
        try:
            group._meet()
        except BaseException:
            group.destroy()
            raise
        return group

    def all_reduce(self, values: Sequence[Any], op: str = "sum") -> list[Any]:
        """The reduction of all (`sum`, `product`, `min`, `max`, `avg`), once for each rank."""
        return self._call("all_reduce", self._alike(values), op=op)

    def broadcast(self, value: Any, root: int = 0) -> list[Any]:
        """The root's value, once for each rank."""
        self._peer("root", root)
        blank = value * 0
        return self._call("broadcast", [value if rank == root else blank for rank in range(self.size)], root=root)

    def reduce(self, values: Sequence[Any], root: int = 0, op: str = "sum") -> Any:
        """The reduction of all, from the root."""
        self._peer("root", root)
        return self._call("reduce", self._alike(values), root=root, op=op, wanted=[root])[root]

    def all_gather(self, values: Sequence[Any]) -> list[Any]:
        """All values stacked, once for each rank."""
        return self._call("all_gather", self._alike(values))

    def reduce_scatter(self, values: Sequence[Any], op: str = "sum") -> list[Any]:
        """Each rank's share of the rows of the reduction of all."""
        values = self._alike(values)
        if not values[0].shape or values[0].shape[0] % self.size:
            why = f"rows must divide by {self.size} ranks"
            raise ShapeError(f"reduce_scatter of shape {tuple(values[0].shape)}: {why}")
        return self._call("reduce_scatter", values, op=op)

    def barrier(self) -> None:
        """Returns when every rank has come."""
        self._call("barrier", [None] * self.size)

    def send(self, value: Any, source: int, to: int) -> Any:
        """From one rank to another; what arrived."""
        self._peer("source", source)
        self._peer("to", to)
        if source == to:
            raise ConfigError("to", to, "must be another rank than source")
        members = self._usable()
        with self._telling("send", value):
            sent = members[source].call.remote("send", value, {"to": to, "is_wanted": False})
            got = members[to].call.remote("recv", value * 0, {"source": source})
            found = self._settle("send", {source: sent, to: got})
        self._note([found[source][1], found[to][1]], "send")
        return found[to][0]

    def measure(self, operation: str, nbytes: int, repeats: int = 5) -> list[CollectiveRecord]:
        """Time an operation on float32 made in the ranks; `send` is rank 0 to rank 1. One record a repeat."""
        members = self._usable()
        with self._telling(operation, None):
            refs = {rank: member.measure.remote(operation, nbytes, repeats) for rank, member in enumerate(members)}
            found = self._settle(operation, refs, self._timeout_s * (repeats + 1))
        ranks = [records for records in found.values() if records]
        return [self._note(records, operation) for records in zip(*ranks, strict=True)]

    def destroy(self) -> None:
        """Destroy the group on every rank, then end the actors. Idempotent."""
        members, self._members = self._members, []
        if self._failure is None and members:
            ray.wait([member.destroy.remote() for member in members], num_returns=len(members), timeout=_GRACE_S)
        for member in members:
            ray.kill(member)
        self._failure = self._failure or CollectiveError("the group was destroyed; make another", "destroy")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.destroy()

    def _meet(self) -> None:
        members = self._members
        places = self._settle("start", {rank: each.place.remote() for rank, each in enumerate(members)}, _START_S)
        self.places = [places[rank] for rank in range(self.size)]
        self._check_gpus()
        is_local = len({place["node"] for place in self.places}) == 1
        hosts = ["127.0.0.1" if is_local else place["address"] for place in self.places]
        where = self._settle("start", {0: members[0].serve.remote(hosts[0], self.size, self._timeout_s)})[0]
        device = "cpu" if self.backend == "gloo" else "cuda:0"
        joins = {
            rank: each.join.remote(where, rank, device, hosts[rank], self._timeout_s)
            for rank, each in enumerate(members)
        }
        self._settle("join", joins)

    def _check_gpus(self) -> None:
        """NCCL takes no two ranks on one GPU."""
        taken = [(place["node"], gpu) for place in self.places for gpu in place["gpus"][:1]]
        shared = [gpu for _, gpu in taken if sum(gpu == other for _, other in taken) > 1]
        if self.backend == "nccl" and len(set(taken)) < len(taken):
            raise ConfigError(
                "gpu_share", shared[0], "two ranks share this GPU, NCCL wants one each: take 1, or 0 (gloo)"
            )

    def _alike(self, values: Sequence[Any]) -> list[Any]:
        """Refused here, before any rank waits for another."""
        if len(values) != self.size:
            raise ShapeError(f"{len(values)} values for {self.size} ranks: give one for each")
        kinds = [(type(value).__name__, str(value.dtype), tuple(value.shape)) for value in values]
        other = next((rank for rank, kind in enumerate(kinds) if kind != kinds[0]), None)
        if other is not None:
            raise ShapeError(f"every rank's value must be alike: rank 0 has {kinds[0]}, rank {other} {kinds[other]}")
        return list(values)

    def _call(
        self, operation: str, values: list[Any], *, wanted: Sequence[int] | None = None, **options: Any
    ) -> list[Any]:
        refs, members = {}, self._usable()
        with self._telling(operation, values[0]):
            for rank, (member, value) in enumerate(zip(members, values, strict=True)):
                asked = options | ({} if wanted is None else {"is_wanted": rank in wanted})
                refs[rank] = member.call.remote(operation, value, asked)
            found = self._settle(operation, refs)
        self._note([record for _, record in found.values()], operation)
        return [found[rank][0] for rank in range(self.size)]

    def _usable(self) -> list[Any]:
        if self._failure is not None:
            raise self._failure
        return self._members

    def _settle(self, operation: str, refs: dict[int, Any], limit_s: float | None = None) -> dict[int, Any]:
        """Every rank's answer, or the one error that says who is missing; nobody waits for a dead rank."""
        self._usable()
        deadline = time.monotonic() + (limit_s or self._timeout_s) + _GRACE_S
        waiting = {ref: rank for rank, ref in refs.items()}
        found: dict[int, Any] = {}
        dead: list[int] = []
        failed: dict[int, BaseException] = {}
        while waiting and (left := deadline - time.monotonic()) > 0:
            ready, _ = ray.wait(list(waiting), timeout=left)
            for ref in ready:
                rank = waiting.pop(ref)
                try:
                    found[rank] = ray.get(ref)
                except ray.exceptions.RayActorError:
                    dead.append(rank)
                except ray.exceptions.RayTaskError as error:
                    failed[rank] = cause_of(error)
            if ready and (dead or failed):
                deadline = min(deadline, time.monotonic() + _GRACE_S)
            for rank in waiting.values() if dead else ():
                self._members[rank].abort.remote(tuple(dead))
        if not dead and not waiting and not failed:
            return found
        raise self._fail(operation, dead, failed, sorted(waiting.values()))

    def _fail(
        self, operation: str, dead: list[int], failed: dict[int, BaseException], silent: list[int]
    ) -> BaseException:
        """Of a call that all refused alike, their error, and the group goes on; else the group has ended."""
        broken = {rank: error for rank, error in failed.items() if isinstance(error, CollectiveError)}
        refused = {rank: error for rank, error in failed.items() if rank not in broken}
        if refused and not (dead or silent or broken):
            return next(iter(refused.values()))
        told = {rank for error in broken.values() for rank in error.missing} - set(broken)
        missing = tuple(sorted(dead or refused or silent or told))
        if dead or not (refused or broken):
            why = "a rank died" if dead else "a rank did not answer in time"
        else:
            why = "; ".join(sorted({str(error) for error in (refused or broken).values()}))[:500]
        self._failure = CollectiveError(f"{operation} of {self.size} ranks failed: {why}", operation, missing)
        return self._failure

    def _peer(self, field: str, rank: int) -> None:
        if not 0 <= rank < self.size:
            raise ConfigError(field, rank, f"must be a rank from 0 to {self.size - 1}")

    @contextmanager
    def _telling(self, operation: str, value: Any) -> Iterator[None]:
        """A call that fails is told of, too, with the size of a rank's tensor and the time until that was clear."""
        began_unix_nano, began_s = time.time_ns(), time.perf_counter()
        try:
            yield
        except Exception as error:
            if self._fleet is not None:
                record = CollectiveRecord(
                    operation=operation,
                    backend=self.backend,
                    dtype=str(getattr(value, "dtype", "")).removeprefix("torch."),
                    ranks=self.size,
                    nbytes=int(getattr(value, "nbytes", 0)),
                    seconds=time.perf_counter() - began_s,
                    began_unix_nano=began_unix_nano,
                )
                tell(self._fleet, record, error)
            raise

    def _note(self, records: Sequence[CollectiveRecord], operation: str) -> CollectiveRecord:
        record = replace(together(records), operation=operation)
        self.records.append(record)
        if self._fleet is not None:
            tell(self._fleet, record)
        return record


def tell(fleet: str, record: CollectiveRecord, error: Exception | None = None) -> None:
    """The fleet's telemetry, if it runs; nobody waits for it."""
    from lltm_ray.telemetry.outbox import Outbox

    actor = find(names.telemetry(fleet))
    if actor is not None:
        outbox = Outbox()
        outbox.add("spans", span_of(record, error))
        actor.put.remote("collectives", outbox.take(), {})


def to_tensor(value: Any, device: Any) -> tuple[Any, Any]:
    """A NumPy array or tensor as a contiguous tensor of that device that may be written, and the way back.

    bfloat16 of `ml_dtypes` goes by its bits: neither NumPy nor PyTorch knows the other's.
    """
    import numpy as np

    torch = load("torch", extra="torch", feature="collectives between actors")
    if isinstance(value, torch.Tensor):
        return value.to(device, copy=True).contiguous(), lambda out: out.to(value.device)
    array = np.array(value)
    if array.dtype.name == "bfloat16":
        tensor = torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return tensor.to(device), lambda out: out.cpu().view(torch.int16).numpy().view(array.dtype)
    return torch.from_numpy(array).to(device), lambda out: out.cpu().numpy()
