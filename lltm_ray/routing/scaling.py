"""How many engines each model should have now: demand and engines in, starts and stops out. Pure.

::

    nobody asks            -> one engine less at a time, after `idle_timeout_s`, down to `floor`
    cold, somebody asks    -> Start; while it finds no room: Evict the cheapest idle engine of another model
    queue waits too long   -> Start, up to `ceiling`
    others would do        -> Stop an idle engine, down to `keep`

Engines that are being started or stopped are in the look as such, so a model is changed in one place at a time. The
thresholds are apart (an engine is added when all slots are taken, taken away when the others would be under 60 % busy),
and each must hold for a while: a constant load settles on one number of engines.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from lltm_ray.records import EngineInfo, EngineState, ModelDemand
from lltm_ray.routing.rows import LATE_DETAIL


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRules:
    """What the settings say of one model."""

    name: str
    floor: int = 0
    """Never fewer, unless they fail."""
    keep: int = 1
    """Low load alone does not go below this."""
    ceiling: int = 1
    idle_timeout_s: float | None = None
    pinned: bool = False
    priority: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalingSettings:
    """Thresholds; seconds."""

    scale_up_wait_s: float = 2.0
    scale_up_after_s: float = 2.0
    """How long the predicted wait must have been too long: one burst is not load."""
    scale_down_after_s: float = 60.0
    scale_down_busy_ratio: float = 0.6
    """Of the slots of the engines that would remain."""
    cooldown_s: float = 5.0
    """Between two changes of one model by load."""
    evict_idle_s: float = 1.0
    """So long without work before another model may have the room: else two models would swap at every request."""
    withdraw_after_s: float = 10.0
    """A start that waits for room is given up when nobody has asked for so long."""
    lost_after_s: float = 60.0
    """How long an engine that failed, or went silent, may take to come back."""
    retry_first_s: float = 5.0
    retry_max_s: float = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """All that a decision is made of."""

    rules: Sequence[ModelRules]
    demand: Sequence[ModelDemand]
    """One a model at most: all gateways together."""
    engines: Sequence[EngineInfo]
    """With those being started (STARTING) and stopped (DRAINING)."""
    now_s: float
    """Any monotonic clock."""
    woken: frozenset[str] = frozenset()
    """Models that a request asked for while none of their engines was ready."""
    stuck: frozenset[str] = frozenset()
    """Engines whose start waits for room."""
    fits: Callable[[str, frozenset[str]], bool] = lambda _engine, _victims: False
    """Whether a stuck engine would find room with the shares of those victims given back."""
    may_evict: bool = True
    """False while shares that were given back may not be seen as free yet."""
    load_s: Mapping[str, float] = field(default_factory=dict)
    """How long a model's last start took."""


@dataclass(frozen=True, slots=True)
class Start:
    """One engine more."""

    model: str


@dataclass(frozen=True, slots=True)
class Stop:
    """Drain this engine and give its share back."""

    engine: str
    why: str


@dataclass(frozen=True, slots=True)
class Evict:
    """Drain this idle engine: another model needs its share."""

    engine: str
    for_model: str


Action = Start | Stop | Evict


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """What is remembered of one model between looks."""

    active_at_s: float
    asked_at_s: float
    """When somebody waited last."""
    last_request: int = 0
    rejected: int = 0
    rejected_at_s: float = -math.inf
    over_since_s: float | None = None
    under_since_s: float | None = None
    changed_at_s: float = -math.inf
    failures: int = 0
    retry_at_s: float = -math.inf


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalingState:
    """What is remembered between looks; empty at first."""

    models: Mapping[str, Memory] = field(default_factory=dict)
    broken_since_s: Mapping[str, float] = field(default_factory=dict)


@dataclass(slots=True)
class _View:
    """One model now, sorted out."""

    rules: ModelRules
    demand: ModelDemand
    woken: bool
    memory: Memory
    ready: list[EngineInfo]
    starting: list[EngineInfo]
    stopping: list[EngineInfo]
    late: list[EngineInfo]
    """Silent, but they may come back."""
    failed: list[EngineInfo]

    @property
    def live(self) -> int:
        return len(self.ready) + len(self.starting) + len(self.late)

    @property
    def is_asked_for(self) -> bool:
        return self.woken or self.demand.waiting > 0

    @property
    def is_cold(self) -> bool:
        return not self.ready

    @property
    def busy(self) -> int:
        return max(self.demand.running, sum(engine.slots_busy for engine in self.ready))

    def idle_engine(self) -> EngineInfo | None:
        """The newest idle one: the oldest have the warmest caches."""
        idle = [engine for engine in self.ready if not engine.slots_busy]
        return max(idle, key=lambda engine: (len(engine.name), engine.name), default=None)


def plan(look: Look, state: ScalingState, settings: ScalingSettings) -> tuple[ScalingState, tuple[Action, ...]]:
    """Decide what to change now.

    Returns:
        The state for the next look, and what to do: at most one change by load for each model, and evictions for at
        most one of them.
    """
    views = {rules.name: _view(rules, look, state, settings) for rules in look.rules}
    broken_since = {
        engine.name: state.broken_since_s.get(engine.name, look.now_s)
        for engine in look.engines
        if engine.state is EngineState.FAILED
    }
    actions: list[Action] = []
    for view in views.values():
        chosen = [*_replace_broken(view, look, broken_since, settings), *_change(view, look, settings)]
        if chosen:
            view.memory = replace(view.memory, changed_at_s=look.now_s, over_since_s=None, under_since_s=None)
        actions += chosen
    actions += _make_room(views, look, settings, {action.engine for action in actions if isinstance(action, Stop)})
    memories = {name: view.memory for name, view in views.items()}
    return ScalingState(models=memories, broken_since_s=broken_since), tuple(actions)


def after_failure(state: ScalingState, model: str, now_s: float, settings: ScalingSettings) -> ScalingState:
    """A start failed: the next try waits, twice as long each time."""
    old = state.models.get(model, Memory(active_at_s=now_s, asked_at_s=now_s))
    pause_s = min(settings.retry_max_s, settings.retry_first_s * 2.0 ** min(old.failures, 30))
    new = replace(old, failures=old.failures + 1, retry_at_s=now_s + pause_s)
    return replace(state, models={**state.models, model: new})


def after_success(state: ScalingState, model: str) -> ScalingState:
    """A start went well."""
    old = state.models.get(model)
    if old is None:
        return state
    return replace(state, models={**state.models, model: replace(old, failures=0, retry_at_s=-math.inf)})


def _view(rules: ModelRules, look: Look, state: ScalingState, settings: ScalingSettings) -> _View:
    own = [engine for engine in look.engines if engine.model == rules.name]
    demand = next((each for each in look.demand if each.model == rules.name), ModelDemand(model=rules.name))
    failed = [engine for engine in own if engine.state is EngineState.FAILED]
    view = _View(
        rules=rules,
        demand=demand,
        woken=rules.name in look.woken,
        memory=state.models.get(rules.name) or Memory(active_at_s=look.now_s, asked_at_s=look.now_s),
        ready=[engine for engine in own if engine.state is EngineState.READY],
        starting=[engine for engine in own if engine.state is EngineState.STARTING],
        stopping=[engine for engine in own if engine.state in (EngineState.DRAINING, EngineState.STOPPING)],
        late=[engine for engine in failed if engine.detail.startswith(LATE_DETAIL)],
        failed=[engine for engine in failed if not engine.detail.startswith(LATE_DETAIL)],
    )
    view.memory = _remember(view, look.now_s, settings)
    return view


def _remember(view: _View, now_s: float, settings: ScalingSettings) -> Memory:
    old, demand = view.memory, view.demand
    placed = any(engine.node_id for engine in view.starting)
    is_active = view.is_asked_for or view.busy or placed or demand.last_request_unix_nano != old.last_request
    rejected_at_s = now_s if demand.rejected > old.rejected else old.rejected_at_s
    is_over = (demand.waiting > 0 and demand.predicted_wait_s > settings.scale_up_wait_s) or (
        now_s - rejected_at_s <= settings.scale_up_after_s
    )
    may_change = not (view.starting or view.stopping)
    return replace(
        old,
        active_at_s=now_s if is_active else old.active_at_s,
        asked_at_s=now_s if view.is_asked_for else old.asked_at_s,
        last_request=demand.last_request_unix_nano,
        rejected=demand.rejected,
        rejected_at_s=rejected_at_s,
        over_since_s=_since(old.over_since_s, now_s, holds=may_change and is_over),
        under_since_s=_since(old.under_since_s, now_s, holds=may_change and _others_would_do(view, settings)),
    )


def _since(before_s: float | None, now_s: float, *, holds: bool) -> float | None:
    if not holds:
        return None
    return now_s if before_s is None else before_s


def _others_would_do(view: _View, settings: ScalingSettings) -> bool:
    slots = sum(engine.slots_total for engine in view.ready)
    remaining = slots - max((engine.slots_total for engine in view.ready), default=0)
    return not view.is_asked_for and view.busy < settings.scale_down_busy_ratio * remaining


def _replace_broken(
    view: _View, look: Look, broken_since: Mapping[str, float], settings: ScalingSettings
) -> list[Action]:
    """End what did not come back; at once what has failed while somebody waits for it."""
    actions: list[Action] = []
    for engine in (*view.late, *view.failed):
        is_over = look.now_s - broken_since[engine.name] >= settings.lost_after_s
        is_needed = engine in view.failed and view.is_cold and view.is_asked_for
        if is_over or is_needed:
            actions.append(Stop(engine.name, f"it did not come back: {engine.detail}"))
    return actions


def _change(view: _View, look: Look, settings: ScalingSettings) -> list[Action]:
    rules, memory, now_s = view.rules, view.memory, look.now_s
    if view.starting:
        return _withdraw(view, look, settings)
    may_start = view.live < rules.ceiling and now_s >= memory.retry_at_s
    if may_start and (view.live < rules.floor or (view.is_cold and view.is_asked_for)):
        return [Start(rules.name)]
    if view.stopping or now_s - memory.changed_at_s < settings.cooldown_s:
        return []
    over_since_s = memory.over_since_s
    if may_start and over_since_s is not None and now_s - over_since_s >= settings.scale_up_after_s:
        return [Start(rules.name)]
    why = _too_many(view, now_s, settings)
    engine = view.idle_engine()
    return [Stop(engine.name, why)] if why and engine else []


def _too_many(view: _View, now_s: float, settings: ScalingSettings) -> str:
    """Why one engine should go; empty when none should."""
    rules, memory, ready = view.rules, view.memory, len(view.ready)
    if view.live > rules.ceiling:
        return f"more than max_engines={rules.ceiling}"
    timeout_s = rules.idle_timeout_s
    if timeout_s is not None and ready > rules.floor and now_s - memory.active_at_s >= timeout_s:
        return f"no request for {timeout_s:g} s"
    under_since_s = memory.under_since_s
    if under_since_s is None or ready <= max(rules.keep, rules.floor, 1):
        return ""
    return "the others do" if now_s - under_since_s >= settings.scale_down_after_s else ""


def _withdraw(view: _View, look: Look, settings: ScalingSettings) -> list[Action]:
    stuck = [engine for engine in view.starting if engine.name in look.stuck]
    nobody_asks = look.now_s - view.memory.asked_at_s >= settings.withdraw_after_s
    if stuck and nobody_asks and view.live > view.rules.floor:
        return [Stop(stuck[0].name, "nobody asks for it any more")]
    return []


def _make_room(views: Mapping[str, _View], look: Look, settings: ScalingSettings, stopped: set[str]) -> list[Action]:
    """Victims for the most important start that finds no room; none while others are still on their way out."""
    if not look.may_evict or stopped or any(view.stopping for view in views.values()):
        return []
    needy = sorted(views.values(), key=lambda view: (not view.is_asked_for, -view.rules.priority))
    for view in needy:
        for engine in view.starting:
            victims = _victims(engine.name, view, views, look, settings) if engine.name in look.stuck else []
            if victims:
                return [Evict(victim.name, view.rules.name) for victim in victims]
    return []


def _victims(
    stuck: str, needy: _View, views: Mapping[str, _View], look: Look, settings: ScalingSettings
) -> list[EngineInfo]:
    """The fewest of the cheapest idle engines whose shares are enough; none when all of them are not."""
    candidates = sorted(_candidates(needy, views, look, settings), key=lambda pair: _cost(pair[0], pair[1], look))
    chosen: list[EngineInfo] = []
    for _view_of, engine in candidates:
        chosen.append(engine)
        if look.fits(stuck, frozenset(each.name for each in chosen)):
            break
    else:
        return []
    for engine in chosen[:-1]:  # one that came early may not be needed beside a larger one that came late
        fewer = [each for each in chosen if each is not engine]
        if look.fits(stuck, frozenset(each.name for each in fewer)):
            chosen = fewer
    return chosen


def _candidates(
    needy: _View, views: Mapping[str, _View], look: Look, settings: ScalingSettings
) -> list[tuple[_View, EngineInfo]]:
    found = []
    for view in views.values():
        if view is needy or view.rules.pinned or view.starting or view.is_asked_for:
            continue
        idle = [engine for engine in view.ready if not engine.slots_busy]
        spare = max(0, _spare(needy, view, look.now_s, settings))
        found += [(view, engine) for engine in idle[:spare]]
    return found


def _spare(needy: _View, view: _View, now_s: float, settings: ScalingSettings) -> int:
    """How many engines a model can give: all above its floor when it is idle, one when the others would do."""
    least_s = settings.evict_idle_s if needy.is_cold else settings.scale_down_after_s
    if now_s - view.memory.active_at_s >= least_s:
        return view.live - view.rules.floor
    others_do = needy.is_cold and view.memory.under_since_s is not None
    return int(others_do and view.live > max(view.rules.floor, 1))


def _cost(view: _View, engine: EngineInfo, look: Look) -> tuple[int, float, float, str]:
    """Lowest priority, then least recently used, then quickest to load again."""
    return view.rules.priority, view.memory.active_at_s, look.load_s.get(view.rules.name, 0.0), engine.name
