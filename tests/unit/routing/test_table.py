from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from lltm_ray.routing.table import LONG_PREFILL_TOKENS, EngineView, Table

NAMES = [f"e{i}" for i in range(7)]


@dataclass(slots=True)
class Rich(EngineView):
    note: str = ""


def view(name: str, busy: int = 0, total: int = 4, *, last_used: int = 0, **more) -> EngineView:
    return EngineView(name, "m", total, busy, last_used, **more)


def brute(rows, k, exclude=(), adapter=""):
    usable = [row for row in rows if not row.is_suspect]
    if adapter:
        usable = [row for row in usable if adapter in row.adapters]
    free = [row for row in usable if row.busy < row.slots_total and row.name not in exclude]
    return [row.name for row in sorted(free, key=lambda row: (row.busy / row.slots_total, row.last_used, row.name))[:k]]


class TableMachine(RuleBasedStateMachine):
    """The table does what a plain dictionary and `sorted` do."""

    def __init__(self):
        super().__init__()
        self.table = Table()
        self.rows: dict[str, EngineView] = {}
        self.gone: list[EngineView] = []

    @rule(
        name=st.sampled_from(NAMES),
        busy=st.integers(0, 5),
        total=st.integers(0, 4),
        used=st.integers(0, 9),
        adapters=st.frozensets(st.sampled_from("ab")),
    )
    def add(self, name, busy, total, used, adapters):
        if name in self.rows:
            self.gone.append(self.rows[name])
        self.rows[name] = view(name, busy, total, last_used=used, adapters=adapters)
        self.table.add(self.rows[name])

    @rule(name=st.sampled_from(NAMES))
    def remove(self, name):
        assert self.table.remove(name) is self.rows.get(name)
        if name in self.rows:
            self.gone.append(self.rows.pop(name))

    @precondition(lambda self: self.rows)
    @rule(data=st.data(), tokens=st.sampled_from([0, 10, 5000]), by_name=st.booleans())
    def live(self, data, tokens, by_name):
        row = self.rows[data.draw(st.sampled_from(sorted(self.rows)))]
        busy, newest = row.busy, max(each.last_used for each in self.rows.values())
        self.table.claim(row.name if by_name else row, uncached_tokens=tokens)
        assert (row.busy, row.last_used > newest) == (busy + 1, True)
        if data.draw(st.booleans()):
            self.table.began(row, uncached_tokens=tokens)
            self.table.release(row, is_decoding=True)
            assert row.busy == busy

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def release(self, data):
        row = self.rows[data.draw(st.sampled_from(sorted(self.rows)))]
        busy = row.busy
        self.table.release(row.name)
        assert row.busy == max(0, busy - 1)

    @precondition(lambda self: self.gone)
    @rule(data=st.data())
    def a_dead_row_moves_nobody_else(self, data):
        row = data.draw(st.sampled_from(self.gone))
        before = [(each.name, each.busy, each.last_used) for each in self.rows.values()]
        self.table.claim(row)
        self.table.release(row)
        assert before == [(each.name, each.busy, each.last_used) for each in self.rows.values()]

    @rule(name=st.sampled_from(NAMES), is_suspect=st.booleans())
    def suspect(self, name, is_suspect):
        self.table.suspect(name, is_suspect)
        assert name not in self.rows or self.rows[name].is_suspect is is_suspect

    @rule(name=st.sampled_from(NAMES), total=st.integers(0, 6))
    def resize(self, name, total):
        self.table.resize(name, total)

    @rule(name=st.sampled_from(NAMES))
    def touch(self, name):
        if name in self.rows:
            self.table.touch(name)

    @invariant()
    def the_order_is_that_of_a_full_sort(self):
        for exclude in ((), {"e0", "e3"}):
            for adapter in ("", "a", "b"):
                found = self.table.least_loaded(4, exclude, adapter)
                assert [row.name for row in found] == brute(self.rows.values(), 4, exclude, adapter)
                assert all(row is self.rows[row.name] for row in found)

    @invariant()
    def the_sums_are_right(self):
        rows = self.rows.values()
        assert self.table.names == tuple(sorted(self.rows))
        assert self.table.busy_total == sum(row.busy for row in rows)
        assert self.table.slots_total == sum(row.slots_total for row in rows)
        free = (max(0, row.slots_total - row.busy) for row in rows if not row.is_suspect)
        assert self.table.free_slots == sum(free)


TestTableMachine = TableMachine.TestCase
TestTableMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 4), st.integers(0, 9)), max_size=12),
    st.sets(st.integers(0, 11)),
    st.integers(0, 5),
)
def test_the_least_loaded_are_those_of_a_full_sort(rows, banned, k):
    views = [view(str(i), busy, total, last_used=used) for i, (busy, total, used) in enumerate(rows)]
    exclude = {str(i) for i in banned}
    assert [row.name for row in Table(views).least_loaded(k, exclude)] == brute(views, k, exclude)


def test_rows_are_kept_as_they_are_also_those_of_a_subclass():
    row = Rich("a", "m", 4, note="mine")
    table = Table([row])
    assert table.claim("a") is row
    assert table.get("a") is row
    assert table.least_loaded(1)[0].note == "mine"


def test_the_smallest_share_of_busy_slots_is_first_not_the_smallest_count():
    table = Table([view("small", 1, 2), view("large", 3, 8)])
    assert [row.name for row in table.least_loaded(2)] == ["large", "small"]


def test_an_adapter_that_many_hold_is_found_by_walking_past_those_that_do_not():
    rows = [view(f"e{i:03}", i % 4, adapters=frozenset({"x"}) if i % 2 else frozenset()) for i in range(400)]
    table = Table(rows)
    assert [row.name for row in table.least_loaded(5, adapter="x")] == brute(rows, 5, adapter="x")
    assert len(table.holders("x")) == 200


def test_nobody_holds_an_adapter_any_more_when_its_engine_left_or_is_suspect():
    table = Table([view("a", adapters=frozenset({"x"})), view("b")])
    table.suspect("a", is_suspect=True)
    assert not table.holders("x")
    table.suspect("a", is_suspect=False)
    assert table.holders("x") == {"a"}
    table.remove("a")
    assert not table.holders("x")


def test_a_claim_is_first_prefill_then_decoding_and_leaves_nothing_behind():
    table = Table([view("a")])
    row = table.claim("a", uncached_tokens=LONG_PREFILL_TOKENS)
    assert (row.prefilling_tokens, row.long_prefills, row.decoding) == (LONG_PREFILL_TOKENS, 1, 0)
    table.began(row, uncached_tokens=LONG_PREFILL_TOKENS)
    assert (row.prefilling_tokens, row.long_prefills, row.decoding) == (0, 0, 1)
    table.release(row, is_decoding=True)
    assert row == view("a", last_used=1)


def test_a_claim_that_ends_before_its_first_byte_takes_its_prefill_with_it():
    table = Table([view("a")])
    table.claim("a", uncached_tokens=900)
    table.claim("a", uncached_tokens=100)
    table.release("a", uncached_tokens=900)
    row = table.get("a")
    assert (row.busy, row.prefilling_tokens, row.long_prefills) == (1, 100, 0)


def test_a_claim_of_an_unknown_name_is_an_error_and_its_release_is_not():
    table = Table()
    with pytest.raises(KeyError):
        table.claim("ghost")
    table.release("ghost")
    assert table.busy_total == 0


def test_the_version_and_the_names_change_with_the_membership_only():
    table = Table([view("b"), view("a")])
    names, version = table.names, table.version
    table.claim("a")
    table.suspect("b", is_suspect=True)
    assert table.names is names
    assert table.version == version
    table.add(view("c"))
    assert table.names == ("a", "b", "c")
    assert table.version != version
