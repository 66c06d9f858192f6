"""Which samples of slots a node's sampler tells routers."""

import pytest

from lltm_ray.actors.sampler import REPEAT_S, SlotChanges
from lltm_ray.routing.gossip import SlotSample

START_S = 1000.0


def sample(at_s, **state):
    fields = {"server_pid": 1, "is_busy": False, "tokens": 50, "task_id": 3} | state
    return SlotSample(engine="a", slot=0, at_unix_nano=int((START_S + at_s) * 1e9), **fields)


def test_a_slot_at_rest_is_told_for_a_while_and_then_no_more():
    changes = SlotChanges()
    told = [len(changes.of([sample(at_s)])) for at_s in (0.0, 1.0, REPEAT_S, REPEAT_S + 0.5, 60.0)]
    assert told == [1, 1, 1, 0, 0]


@pytest.mark.parametrize("change", [{"tokens": 0}, {"task_id": 4}, {"is_busy": True}, {"server_pid": 2}])
def test_a_change_is_told_again(change):
    changes = SlotChanges()
    changes.of([sample(0.0)])
    assert changes.of([sample(60.0)]) == []
    assert changes.of([sample(61.0, **change)]) == [sample(61.0, **change)]


def test_a_long_answer_is_no_news_with_every_token():
    changes = SlotChanges()
    told = [len(changes.of([sample(at_s, is_busy=True, tokens=int(at_s))])) for at_s in (0.0, 60.0, 61.0)]
    assert told == [1, 0, 0]


def test_what_is_gone_is_forgotten():
    changes = SlotChanges()
    changes.of([sample(0.0)])
    changes.of([])
    assert changes.of([sample(60.0)]) == [sample(60.0)]
