"""The life of a server, as data against data."""

from hypothesis import given
from hypothesis import strategies as st

from lltm_ray.llamacpp import lifecycle as lc
from lltm_ray.llamacpp.lifecycle import Life, Policy, step
from lltm_ray.records import EngineState as S

POLICY = Policy(restart_limit=2)


def run(*events: lc.Event, life: Life | None = None) -> tuple[Life, list[lc.Effect]]:
    life, seen = life or Life(), []
    for event in events:
        life, effects = step(life, event, POLICY)
        seen += effects
    return life, seen


READY = run(lc.Start(), lc.BecameReady())[0]


def test_a_start_spawns_once_however_often_it_is_asked_for():
    life, effects = run(lc.Start(), lc.Start(), lc.BecameReady(), lc.Start())
    assert life.state is S.READY
    assert effects == [lc.Spawn()]


def test_a_server_that_was_never_ready_fails_at_once_with_its_exit_code():
    life, effects = run(lc.Start(), lc.Exited(exit_code=1))
    assert (life.state, life.why, life.has_process) == (S.FAILED, "exit code 1", False)
    assert effects == [lc.Spawn()]


def test_a_stolen_port_is_worth_another_try_even_before_it_was_ever_ready():
    life, effects = run(lc.Start(), lc.Exited(exit_code=1, port_taken=True), lc.RestartDue())
    assert life.state is S.STARTING
    assert effects == [lc.Spawn(), lc.ScheduleRestart(lc.BACKOFF_FIRST_S), lc.Spawn()]


def test_a_crash_is_restarted_with_growing_pauses_until_the_limit():
    life, effects = run(
        lc.Exited(exit_code=-9), lc.RestartDue(), lc.Exited(exit_code=-9), lc.RestartDue(), lc.Exited(exit_code=-9),
        life=READY,
    )  # fmt: skip
    assert life.state is S.FAILED
    pauses = [effect.delay_s for effect in effects if isinstance(effect, lc.ScheduleRestart)]
    assert pauses == [0.5, 1.0]


def test_a_server_that_ran_well_for_long_starts_its_count_of_failures_anew():
    life = READY
    for _ in range(10):
        life, _ = run(
            lc.Exited(exit_code=-9, ready_for_s=lc.SETTLED_AFTER_S), lc.RestartDue(), lc.BecameReady(), life=life
        )
    assert (life.state, life.failures, life.restarts) == (S.READY, 1, 10)


def test_a_hung_server_is_killed_and_its_exit_counts_as_that():
    life, effects = run(lc.Unusable("no answer"), lc.Exited(exit_code=-9), life=READY)
    assert (life.state, life.why) == (S.STARTING, "no answer")
    assert effects == [lc.Kill(), lc.ScheduleRestart(0.5)]


def test_a_server_that_misses_its_deadline_fails_for_that_reason():
    life, effects = run(lc.Start(), lc.Unusable("not ready after 5 s"), lc.BecameReady(), lc.Exited(exit_code=-9))
    assert (life.state, life.why) == (S.FAILED, "not ready after 5 s")
    assert effects == [lc.Spawn(), lc.Kill()]


def test_draining_waits_then_terminates():
    life, effects = run(lc.Drain(), lc.Drained(), lc.Exited(exit_code=0), life=READY)
    assert life.state is S.STOPPED
    assert effects == [lc.AwaitIdle(), lc.Terminate()]


def test_a_start_while_stopping_starts_again_afterwards():
    life, effects = run(lc.Stop(), lc.Start(), lc.Exited(exit_code=0), life=READY)
    assert life.state is S.STARTING
    assert effects == [lc.Terminate(), lc.Spawn()]


def test_a_stop_during_the_pause_before_a_restart_ends_it_without_a_process():
    life, effects = run(lc.Exited(exit_code=1), lc.Stop(), lc.RestartDue(), life=READY)
    assert life.state is S.STOPPED
    assert effects == [lc.ScheduleRestart(0.5)]


def test_nothing_starts_after_it_was_stopped_for_good():
    life, effects = run(lc.Stop(for_good=True), lc.Exited(exit_code=0), lc.Start(), life=READY)
    assert life.state is S.STOPPED
    assert effects == [lc.Terminate()]


def test_a_probe_that_answers_after_its_process_has_exited_makes_nothing_ready():
    life, effects = run(lc.Start(), lc.Exited(exit_code=1, port_taken=True), lc.BecameReady())
    assert (life.state, life.has_process) == (S.STARTING, False)
    assert effects[-1] == lc.ScheduleRestart(0.5)


EVENTS = st.one_of(
    st.sampled_from([lc.Start(), lc.BecameReady(), lc.Unusable("hung"), lc.RestartDue(), lc.Drain(), lc.Drained()]),
    st.builds(lc.Stop, st.booleans()),
    st.builds(lc.Exited, exit_code=st.integers(-15, 2), ready_for_s=st.floats(0, 100), port_taken=st.booleans()),
)


@given(st.lists(EVENTS, max_size=60))
def test_there_is_never_a_second_process_and_never_a_signal_to_none(events):
    life, running = Life(), 0
    for event in events:
        if isinstance(event, lc.Exited):
            if not running:
                continue  # only a process can exit
            running = 0
        life, effects = step(life, event, POLICY)
        for effect in effects:
            assert not (isinstance(effect, lc.Spawn) and running), "two processes"
            assert running or not isinstance(effect, lc.Terminate | lc.Kill | lc.AwaitIdle), "a signal to nobody"
            running += isinstance(effect, lc.Spawn)
        assert life.has_process == bool(running)
        assert running or life.state in (S.STOPPED, S.FAILED, S.STARTING)
        assert not running or life.state not in (S.STOPPED, S.FAILED)
