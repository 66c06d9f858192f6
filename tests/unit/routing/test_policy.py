from hypothesis import given
from hypothesis import strategies as st

from lltm_ray.routing.policy import EngineView, choose


def view(name: str, busy: int = 0, total: int = 4, *, model: str = "m", last_used: int = 0) -> EngineView:
    return EngineView(name, model, total, busy, last_used)


def test_the_smallest_share_of_busy_slots_wins_not_the_smallest_count():
    assert choose([view("small", busy=1, total=2), view("large", busy=3, total=8)], model="m") == "large"


def test_among_equals_the_one_used_longest_ago_wins():
    engines = [view("a", last_used=5), view("b", last_used=3), view("c", last_used=4)]
    assert choose(engines, model="m") == "b"


def test_excluded_full_foreign_and_slotless_engines_are_never_chosen():
    engines = [view("full", busy=4), view("foreign", model="other"), view("none", total=0), view("tried")]
    assert choose(engines, model="m", exclude={"tried"}) is None


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 4), st.sampled_from("mn"), st.integers(0, 9)), max_size=12),
    st.sets(st.integers(0, 11)),
)
def test_a_choice_is_a_candidate_and_no_candidate_is_less_loaded(rows, banned):
    engines = [view(str(i), *row[:2], model=row[2], last_used=row[3]) for i, row in enumerate(rows)]
    exclude = {str(i) for i in banned}
    free = [e for e in engines if e.model == "m" and e.busy < e.slots_total and e.name not in exclude]
    name = choose(engines, model="m", exclude=exclude)
    if not free:
        assert name is None
        return
    chosen = next(e for e in free if e.name == name)
    assert all(
        (chosen.busy / chosen.slots_total, chosen.last_used) <= (e.busy / e.slots_total, e.last_used) for e in free
    )
