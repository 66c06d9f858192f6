"""The life of one server as a pure state machine: `step(life, event) -> (life, effects)`.

::

    stopped ──Start──> starting ──BecameReady──> ready ──Drain──> draining ──Drained──> stopping ──Exited──> stopped
       ^                 │    ^                    │                                       ^
       └──Start── failed <┘   └── back-off ────────┘ Exited                     Stop ──────┘  (from any live state)

No clock, no process, no lock: `process.ServerProcess` is the one writer and carries the effects out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from lltm_ray.records import EngineState

BACKOFF_FIRST_S = 0.5
BACKOFF_MAX_S = 30.0
SETTLED_AFTER_S = 60.0
"""A server that was ready this long before it died starts its count of failures anew."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """How often a server that was once ready is started again, failures in a row."""

    restart_limit: int = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Life:
    """All that the machine remembers."""

    state: EngineState = EngineState.STOPPED
    has_process: bool = False
    was_ready: bool = False
    """Ready at least once since the last Start from rest: only then is a crash retried."""
    failures: int = 0
    restarts: int = 0
    start_wanted: bool = False
    """Start again once stopping is over."""
    doomed: str = ""
    """Why we are ending the server ourselves, so that its exit counts as that failure."""
    closed: bool = False
    """Shut down for good."""
    why: str = ""
    """One line on the last failure."""


# Events -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Start:
    """Someone needs the server."""


@dataclass(frozen=True, slots=True)
class BecameReady:
    """It answers, and is ours."""


@dataclass(frozen=True, slots=True)
class Unusable:
    """It must be ended: not ready before the deadline, hung, or not the server we started."""

    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Exited:
    """The process is gone (or could not be made)."""

    exit_code: int | None
    ready_for_s: float = 0.0
    port_taken: bool = False
    error: str = ""
    """Why there was no process at all."""


@dataclass(frozen=True, slots=True)
class RestartDue:
    """The back-off is over."""


@dataclass(frozen=True, slots=True)
class Drain:
    """Finish what runs, then stop."""


@dataclass(frozen=True, slots=True)
class Drained:
    """Nothing runs any more, or waiting took too long."""


@dataclass(frozen=True, slots=True)
class Stop:
    """Stop now; `for_good` refuses any later Start."""

    for_good: bool = False


Event = Start | BecameReady | Unusable | Exited | RestartDue | Drain | Drained | Stop


# Effects ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Spawn:
    """Make the process and probe it until it is ready or its deadline passes."""


@dataclass(frozen=True, slots=True)
class ScheduleRestart:
    """Post RestartDue after `delay_s`."""

    delay_s: float


@dataclass(frozen=True, slots=True)
class AwaitIdle:
    """Post Drained when no slot is busy or the drain deadline passes."""


@dataclass(frozen=True, slots=True)
class Terminate:
    """SIGTERM, then SIGKILL."""


@dataclass(frozen=True, slots=True)
class Kill:
    """SIGKILL: it is hung, or not ours."""


Effect = Spawn | ScheduleRestart | AwaitIdle | Terminate | Kill


def step(life: Life, event: Event, policy: Policy) -> tuple[Life, tuple[Effect, ...]]:  # noqa: PLR0911 - a table
    """The one transition function; an event that means nothing in a state changes nothing."""
    match event:
        case Start():
            return _start(life)
        case BecameReady() if life.state is EngineState.STARTING and life.has_process and not life.doomed:
            return replace(life, state=EngineState.READY, was_ready=True, why=""), ()
        case Unusable(why) if life.state in (EngineState.STARTING, EngineState.READY) and life.has_process:
            return replace(life, doomed=why), (Kill(),)
        case Exited():
            return _exited(life, event, policy)
        case RestartDue() if life.state is EngineState.STARTING and not life.has_process:
            return replace(life, has_process=True), (Spawn(),)
        case Drain() if life.state is EngineState.READY:
            return replace(life, state=EngineState.DRAINING), (AwaitIdle(),)
        case Drain() if life.state is EngineState.STARTING:
            return _stop(life, for_good=False)
        case Drained() if life.state is EngineState.DRAINING:
            return replace(life, state=EngineState.STOPPING), (Terminate(),)
        case Stop(for_good):
            return _stop(life, for_good=for_good)
    return life, ()


def backoff_s(failures: int) -> float:
    """Doubling from half a second to half a minute."""
    return float(min(BACKOFF_MAX_S, BACKOFF_FIRST_S * 2 ** max(0, failures - 1)))


def _start(life: Life) -> tuple[Life, tuple[Effect, ...]]:
    if life.closed:
        return life, ()
    if life.state in (EngineState.STOPPED, EngineState.FAILED):
        fresh = Life(state=EngineState.STARTING, has_process=True, restarts=life.restarts)
        return fresh, (Spawn(),)
    wanted = life.state in (EngineState.STOPPING, EngineState.DRAINING)
    return replace(life, start_wanted=life.start_wanted or wanted), ()


def _stop(life: Life, *, for_good: bool) -> tuple[Life, tuple[Effect, ...]]:
    life = replace(life, closed=life.closed or for_good, start_wanted=False)
    if life.state in (EngineState.STOPPED, EngineState.FAILED, EngineState.STOPPING):
        return life, ()
    if not life.has_process:
        return replace(life, state=EngineState.STOPPED), ()
    return replace(life, state=EngineState.STOPPING), (Terminate(),)


def _exited(life: Life, event: Exited, policy: Policy) -> tuple[Life, tuple[Effect, ...]]:
    life = replace(life, has_process=False)
    if life.state in (EngineState.STOPPING, EngineState.DRAINING):
        stopped = replace(life, state=EngineState.STOPPED, doomed="", start_wanted=False)
        return _start(stopped) if life.start_wanted else (stopped, ())
    if life.state not in (EngineState.STARTING, EngineState.READY):
        return life, ()
    why = life.doomed or event.error or f"exit code {event.exit_code}"
    failures = 1 if event.ready_for_s >= SETTLED_AFTER_S else life.failures + 1
    life = replace(life, failures=failures, doomed="", why=why)
    retry = life.was_ready or event.port_taken
    if not retry or failures > policy.restart_limit:
        return replace(life, state=EngineState.FAILED), ()
    restarts = life.restarts + (1 if life.state is EngineState.READY else 0)
    return replace(life, state=EngineState.STARTING, restarts=restarts), (ScheduleRestart(backoff_s(failures)),)
