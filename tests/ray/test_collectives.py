"""Groups of actors on the shared cluster: `-m torch`, on PyTorch's CPU (gloo)."""

import os
import signal
import time
from datetime import timedelta

import numpy as np
import pytest
import ray

from lltm_ray.errors import CollectiveError, ConfigError, PlacementError, ShapeError

pytestmark = pytest.mark.torch
RANKS = 3


@pytest.fixture(scope="module")
def group(ray_cluster):
    from lltm_ray.actors.collectives import CollectiveGroup

    with CollectiveGroup.start(RANKS, gpu_share=0, timeout_s=20) as group:
        yield group


def values(dtype="float32"):
    return [np.random.default_rng(rank).integers(1, 5, (6, 4)).astype(dtype) for rank in range(RANKS)]


@pytest.mark.parametrize("dtype", ["float32", "float16", "int32", "int64"])
def test_arrays_of_a_driver_come_back_as_numpy_has_them(group, dtype):
    given = values(dtype)
    total = sum(given)
    assert all(np.array_equal(out, total) and out.dtype == dtype for out in group.all_reduce(given))
    assert np.array_equal(group.reduce(given, root=2, op="max"), np.maximum.reduce(given))
    assert all(np.array_equal(out, given[1]) for out in group.broadcast(given[1], root=1))
    assert all(np.array_equal(out, np.stack(given)) for out in group.all_gather(given))
    assert np.array_equal(np.concatenate(group.reduce_scatter(given)), total)
    assert np.array_equal(group.send(given[2], 2, 0), given[2])
    group.barrier()
    calls = ["all_reduce", "reduce", "broadcast", "all_gather", "reduce_scatter", "send", "barrier"]
    assert [record.operation for record in group.records][-7:] == calls
    assert all(record.seconds > 0 and record.backend == "gloo" for record in group.records)


def test_tensors_keep_a_type_that_numpy_has_not(group):
    import torch

    out = group.all_reduce([torch.full((5,), rank, dtype=torch.bfloat16) for rank in range(RANKS)])
    assert [each.dtype for each in out] == [torch.bfloat16] * RANKS
    assert out[0].tolist() == [3.0] * 5


def test_values_that_differ_are_refused_before_the_call_and_the_group_goes_on(group):
    given = values()
    with pytest.raises(ShapeError, match="rank 2"):
        group.all_reduce([given[0], given[1], given[2][:3]])
    with pytest.raises(ShapeError, match="rank 1"):
        group.all_gather([given[0], given[1].astype("int32"), given[2]])
    with pytest.raises(ShapeError, match="2 values for 3 ranks"):
        group.all_reduce(given[:2])
    with pytest.raises(ConfigError, match="op='mean'"):
        group.all_reduce(given, op="mean")
    assert np.array_equal(group.all_reduce(given)[0], sum(given))


def test_the_commands_own_check_finds_every_operation_right(group):
    from lltm_ray.cli.collectives import DTYPES, check

    found = dict(check(group))
    assert len(found) == 6 * len(DTYPES) + 1
    assert [name for name, is_right in found.items() if not is_right] == []


def test_bandwidth_is_measured_in_the_ranks(group):
    records = group.measure("all_reduce", 2**20, repeats=2)
    assert [(record.nbytes, record.ranks) for record in records] == [(2**20, RANKS)] * 2
    assert all(0 < record.bus_bytes_s < 1e12 for record in records)
    assert len(group.measure("send", 2**20, repeats=2)) == 2


def test_a_killed_rank_ends_the_call_at_once_and_is_named():
    from lltm_ray.actors.collectives import CollectiveGroup

    with CollectiveGroup.start(RANKS, gpu_share=0, timeout_s=60) as group:
        os.kill(group.places[1]["pid"], signal.SIGKILL)
        began = time.monotonic()
        with pytest.raises(CollectiveError) as caught:
            group.all_reduce(values())
        assert time.monotonic() - began < 30  # not the 60 s that a call may take
        assert caught.value.missing == (1,)
        with pytest.raises(CollectiveError):
            group.barrier()


def hurry(member):
    member._group._timeout_s = 2
    member._group._group._set_default_timeout(timedelta(seconds=2))  # gloo's own: it ends what runs by that only


def test_a_rank_that_hangs_is_named_after_the_time_that_a_call_may_take():
    from lltm_ray.actors.collectives import CollectiveGroup

    with CollectiveGroup.start(RANKS, gpu_share=0, timeout_s=30) as group:
        group._timeout_s = 2  # to join may take longer on a busy machine
        ray.get([each.__ray_call__.remote(hurry) for each in group._members])
        os.kill(group.places[0]["pid"], signal.SIGSTOP)  # it holds the group's store
        with pytest.raises(CollectiveError, match="missing: rank 0") as caught:
            group.all_reduce(values())
        assert caught.value.operation == "all_reduce"


def test_more_gpus_than_there_are_is_said_at_once(ray_cluster):
    from lltm_ray.actors.collectives import CollectiveGroup

    with pytest.raises(PlacementError, match="each of 3 ranks"):
        CollectiveGroup.start(3, gpu_share=1)
    with pytest.raises(ConfigError, match="ranks"):
        CollectiveGroup.start(0)
    assert ray.is_initialized()
