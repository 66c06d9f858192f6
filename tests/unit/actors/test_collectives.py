"""Ranks as threads of one process: what no group could do that kept its state in the process."""

from __future__ import annotations

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from types import SimpleNamespace

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from lltm_ray.actors import collectives
from lltm_ray.actors.collectives_record import CollectiveRecord, bus_factor, span_of, together
from lltm_ray.config import TelemetryConfig
from lltm_ray.errors import CollectiveError, ConfigError, DTypeError, ShapeError
from lltm_ray.telemetry.batch import pack, unpack
from lltm_ray.telemetry.service import TelemetryService

RANKS = 3
DTYPES = ("float32", "float16", "bfloat16", "int32", "int64")
REDUCED = {"sum": np.add, "product": np.multiply, "min": np.minimum, "max": np.maximum}


def record(**changes):
    fields = {"operation": "all_reduce", "backend": "gloo", "dtype": "float32", "ranks": 4, "nbytes": 8_000_000}
    return CollectiveRecord(**fields | {"seconds": 0.002, "began_unix_nano": 10} | changes)


@pytest.mark.parametrize(
    ("operation", "ranks", "factor"),
    [
        ("all_reduce", 2, 1.0),
        ("all_reduce", 4, 1.5),
        ("all_gather", 4, 0.75),
        ("reduce_scatter", 2, 0.5),
        ("broadcast", 8, 1.0),
        ("reduce", 8, 1.0),
        ("send", 2, 1.0),
    ],
)
def test_bus_bandwidth_is_reckoned_as_nccl_tests_do(operation, ranks, factor):
    assert bus_factor(operation, ranks) == factor
    one = record(operation=operation, ranks=ranks)
    assert (one.algorithm_bytes_s, one.bus_bytes_s) == (4e9, 4e9 * factor)


def test_a_call_took_as_long_as_its_slowest_rank_from_when_the_first_began():
    slow, quick = record(seconds=3.0, began_unix_nano=7), record(seconds=1.0, began_unix_nano=5)
    assert together([quick, slow]) == record(seconds=3.0, began_unix_nano=5)


def test_a_call_is_a_row_that_telemetry_takes():
    row = span_of(record())
    assert list(unpack("spans", pack("spans", [row]))) == [row]
    assert row.name == "collective all_reduce"
    assert row.end_unix_nano - row.start_unix_nano == 2_000_000
    told = json.loads(row.attributes)
    assert (told["lltm.collective.bus_bytes_s"], told["lltm.collective.nbytes"]) == (6e9, 8_000_000)


def test_a_fleet_that_is_told_of_calls_has_their_metrics():
    service = TelemetryService(TelemetryConfig(), None)
    rows = [span_of(record()), span_of(record(seconds=0.004)), span_of(record(operation="send", backend="nccl"))]
    service.put("collectives", {"spans": pack("spans", rows)}, {})
    text = service.metrics().decode()
    told = {
        (sample.name, sample.labels["lltm_collective_operation"]): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name.startswith("lltm_collective")
    }
    service.close()
    assert told["lltm_collective_calls_total", "all_reduce"] == 2
    assert told["lltm_collective_bytes_total", "all_reduce"] == 16_000_000
    assert told["lltm_collective_duration_seconds_total", "all_reduce"] == pytest.approx(0.006)
    assert told["lltm_collective_bus_bandwidth", "all_reduce"] == pytest.approx(3e9)
    assert told["lltm_collective_calls_total", "send"] == 1


@pytest.fixture
def group():
    member = SimpleNamespace(call=SimpleNamespace(remote=lambda *_: None))
    return collectives.CollectiveGroup([member] * RANKS, backend="gloo", timeout_s=1.0, fleet="f")


def test_a_fleet_is_told_of_calls_that_fail(group, monkeypatch):
    told, lost = [], CollectiveError("rank 1 died", "all_reduce", (1,))

    def settle(*_):
        raise lost

    monkeypatch.setattr(collectives, "tell", lambda *said: told.append(said))
    monkeypatch.setattr(group, "_settle", settle)
    with pytest.raises(CollectiveError):
        group.all_reduce([np.ones(4, np.float32)] * RANKS)
    with pytest.raises(CollectiveError):
        group.send(np.ones(2), 0, 1)
    seen = [(fleet, each.operation, each.nbytes, each.dtype, error) for fleet, each, error in told]
    assert seen == [("f", "all_reduce", 16, "float32", lost), ("f", "send", 16, "float64", lost)]
    assert span_of(told[0][1], lost).error_type == "CollectiveError"


def test_a_group_that_has_ended_refuses_every_call(group):
    group._members = []
    group.destroy()
    calls = (lambda: group.send(np.ones(2), 0, 1), group.barrier, lambda: group.measure("all_reduce", 8))
    for call in calls:
        with pytest.raises(CollectiveError, match="was destroyed"):
            call()


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


@pytest.fixture
def ranks(torch):
    """Runs a function of (rank's communicator) on every rank of a fresh group at once; its answers or errors."""
    from lltm_ray.actors.communicator import Communicator, serve_store

    opened = []
    pool = ThreadPoolExecutor(RANKS)

    def open_group(timeout_s=5.0, **options):
        store, where = serve_store("127.0.0.1", RANKS, timeout_s)

        def join(rank):
            return Communicator(where, rank, store=None if rank else store, timeout_s=timeout_s, **options)

        group = list(pool.map(join, range(RANKS)))
        opened.extend(group)

        def run(work):
            def outcome(each):
                try:
                    return work(each)
                except Exception as error:
                    return error

            return list(pool.map(outcome, group))

        return run

    yield open_group
    for each in opened:
        each.destroy()
    pool.shutdown()


def numbers(rank, dtype, rows=6):
    """Small whole numbers: exact in every type, whatever the order of additions."""
    import torch

    return torch.from_numpy(np.random.default_rng(rank).integers(1, 5, (rows, 4))).to(getattr(torch, dtype))


@pytest.mark.torch
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_operation_does_what_numpy_does(ranks, dtype):
    run = ranks()
    given = [numbers(rank, dtype).double().numpy() for rank in range(RANKS)]

    def plain(tensor):
        return tensor.double().numpy()

    for op, function in REDUCED.items():
        want = function.reduce(given)
        for rank, out in enumerate(run(lambda me, op=op: in_place(me, "all_reduce", numbers(me.rank, dtype), op=op))):
            np.testing.assert_array_equal(plain(out), want, err_msg=f"all_reduce {op} on {rank}")
        outs = run(lambda me, op=op: in_place(me, "reduce", numbers(me.rank, dtype), root=1, op=op))
        np.testing.assert_array_equal(plain(outs[1]), want)
        for rank, out in enumerate(run(lambda me, op=op: me.reduce_scatter(numbers(me.rank, dtype), op)[0])):
            np.testing.assert_array_equal(plain(out), want[2 * rank : 2 * rank + 2])
    for out in run(lambda me: in_place(me, "broadcast", numbers(me.rank, dtype), root=2)):
        np.testing.assert_array_equal(plain(out), given[2])
    for out in run(lambda me: me.all_gather(numbers(me.rank, dtype))[0]):
        np.testing.assert_array_equal(plain(out), np.stack(given))

    def ring(me):
        mine, got = numbers(me.rank, dtype), numbers(9, dtype) * 0
        if me.rank == 0:
            me.send(mine, 1)
            me.recv(got, RANKS - 1)
        else:
            me.recv(got, me.rank - 1)
            me.send(mine, (me.rank + 1) % RANKS)
        return got

    for rank, out in enumerate(run(ring)):
        np.testing.assert_array_equal(plain(out), given[rank - 1])


def in_place(me, operation, tensor, **options):
    told = getattr(me, operation)(tensor, **options)
    assert told.operation == operation
    assert told.nbytes == tensor.numel() * tensor.element_size()
    assert told.seconds > 0
    return tensor


@pytest.mark.torch
def test_an_average_is_of_floats_only(ranks, torch):
    run = ranks()
    outs = run(lambda me: in_place(me, "all_reduce", torch.full((2,), float(me.rank)), op="avg"))
    assert [out.tolist() for out in outs] == [[1.0, 1.0]] * RANKS
    assert all(isinstance(error, DTypeError) for error in run(lambda me: me.all_reduce(numbers(0, "int32"), "avg")))


@pytest.mark.torch
def test_a_barrier_holds_the_early_until_the_last_has_come(ranks):
    late = threading.Event()

    def come(me):
        if me.rank == 1:
            time.sleep(0.3)
            late.set()
        me.barrier()
        return late.is_set()

    assert ranks()(come) == [True] * RANKS


@pytest.mark.torch
@pytest.mark.parametrize("wrong", ["shape", "dtype", "operation", "root"])
def test_ranks_that_make_different_calls_all_refuse_and_can_go_on(ranks, torch, wrong):
    run = ranks()

    def call(me):
        odd = me.rank == 2
        shape, dtype = (4 if odd and wrong == "shape" else 3,), "int64" if odd and wrong == "dtype" else "float32"
        tensor = torch.zeros(shape, dtype=getattr(torch, dtype))
        if odd and wrong == "operation":
            return me.all_reduce(tensor)
        return me.broadcast(tensor, root=1 if odd and wrong == "root" else 0)

    errors = run(call)
    assert all(isinstance(error, ShapeError) for error in errors)
    assert "rank 2: " in str(errors[0])
    assert [out.tolist() for out in run(lambda me: in_place(me, "all_reduce", torch.ones(1)))] == [[3.0]] * RANKS


def limit(me, timeout_s):
    me._timeout_s = timeout_s
    me._group._set_default_timeout(timedelta(seconds=timeout_s))  # gloo's own: it ends what runs by that only


@pytest.mark.torch
def test_a_rank_that_does_not_come_is_named_by_the_others(ranks, torch):
    run = ranks(timeout_s=20.0)
    run(lambda me: limit(me, 1.0))  # to join may take longer on a busy machine
    found = run(lambda me: None if me.rank == 1 else me.all_reduce(torch.ones(4)))
    assert isinstance(found[0], CollectiveError)
    assert isinstance(found[2], CollectiveError)
    assert (found[0].missing, found[0].operation) == ((1,), "all_reduce")
    again = run(lambda me: None if me.rank == 1 else me.barrier())
    assert isinstance(again[0], CollectiveError)


@pytest.mark.torch
def test_a_group_that_was_called_off_ends_before_its_next_call(ranks, torch):
    run = ranks(timeout_s=20.0)
    began = time.monotonic()
    found = run(lambda me: me.abort((2,)) or me.all_reduce(torch.ones(4)) if me.rank == 0 else None)
    assert isinstance(found[0], CollectiveError)
    assert (found[0].missing, "called off" in str(found[0])) == ((2,), True)
    assert time.monotonic() - began < 10  # not the 20 s that a call may take


@pytest.mark.torch
def test_a_group_that_is_not_complete_says_who_is_missing(torch):
    from lltm_ray.actors.communicator import Communicator, serve_store

    store, where = serve_store("127.0.0.1", 2, 0.5)
    with pytest.raises(CollectiveError) as caught:
        Communicator(where, 0, store=store, timeout_s=0.5)
    assert caught.value.missing == (1,)
    assert caught.value.operation == "join"


@pytest.mark.torch
def test_what_can_be_refused_alone_is_refused_before_anybody_waits(ranks, torch):
    run = ranks()
    calls = {
        DTypeError: lambda me: me.all_reduce(torch.zeros(2, dtype=torch.complex64)),
        ShapeError: lambda me: me.all_reduce(torch.zeros(4, 4).t()[1:]),
        ConfigError: lambda me: me.broadcast(torch.zeros(2), root=RANKS),
    }
    for kind, call in calls.items():
        assert all(isinstance(error, kind) for error in run(call)), kind
    assert all(isinstance(error, ShapeError) for error in run(lambda me: me.reduce_scatter(torch.zeros(4))))
    assert all(isinstance(error, ConfigError) for error in run(lambda me: me.send(torch.zeros(1), me.rank)))


@pytest.mark.torch
def test_a_destroyed_group_refuses_and_leaves_nothing_in_the_process(ranks, torch):
    run = ranks()
    run(lambda me: me.destroy())
    assert not torch.distributed.is_initialized()
    assert all(isinstance(error, CollectiveError) for error in run(lambda me: me.barrier()))


@pytest.mark.torch
def test_numpy_and_tensors_go_both_ways_and_bfloat16_by_its_bits(torch):
    from lltm_ray.actors.collectives import to_tensor

    fixed = np.arange(4.0)
    fixed.flags.writeable = False  # as Ray gives arrays
    tensor, back = to_tensor(fixed, torch.device("cpu"))
    tensor += 1
    assert back(tensor).tolist() == [1.0, 2.0, 3.0, 4.0]
    assert fixed.tolist() == [0.0, 1.0, 2.0, 3.0]
    mine = torch.arange(6, dtype=torch.bfloat16).view(2, 3).t()
    tensor, back = to_tensor(mine, torch.device("cpu"))
    assert tensor.is_contiguous()
    assert torch.equal(back(tensor), mine)
