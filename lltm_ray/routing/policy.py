"""The router's decision, and nothing else: which engine takes the next request. Pure: data in, a `Choice` out.

A policy looks at a dozen engines at most, whatever the size of the fleet: those that hold a part of the prompt, the
least loaded ones, and the one the session was on.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Collection, Sequence, Set
from math import ceil, inf
from typing import ClassVar, TypeVar

from lltm_ray.errors import ConfigError
from lltm_ray.routing import crowding
from lltm_ray.routing.choice import NOBODY, Ask, Choice, Matches, Score, choose_row, estimate
from lltm_ray.routing.rates import Rates
from lltm_ray.routing.ring import MOST_STEPS, Ring
from lltm_ray.routing.table import LONG_PREFILL_TOKENS, EngineView, Table

__all__ = ["POLICIES", "Ask", "Choice", "EngineView", "Matches", "Policy", "Score", "estimate", "make_policy"]

T = TypeVar("T", bound=EngineView)

_Wait = tuple[str | None, float, float]
"""Engine, seconds gained, seconds to wait."""
_NO_WAIT: _Wait = None, 0.0, 0.0
_CONSIDERED = 4
_LEAST_LOADED = 4
_MORE_LOADED = 64
_TEMPLATE_TOKENS = 32
_WAIT_AFTER = 8
"""Replies that must have been seen before a service time is believed."""
_LEAST_GAIN_S = 0.05


class Policy:
    """A rule to choose by; this one takes the engine with the smallest share of busy slots."""

    name: ClassVar[str] = "least-loaded"

    def choose(
        self, ask: Ask, table: Table[T], rates: Rates, matches: Matches = (), exclude: Collection[str] = NOBODY
    ) -> Choice | None:
        """The engine whose slot is to be claimed now. Claims nothing and remembers nothing.

        Args:
            ask: the request.
            table: engines of its model.
            rates: how fast they are.
            matches: what of the prompt they have cached, best first.
            exclude: avoided as long as another engine has a free slot, like `ask.exclude`.

        Returns:
            None when no candidate has a free slot.
        """
        if ask.only is not None:
            row = table.get(ask.only)
            if row is None or row.is_suspect or not row.has_room:
                return None
            return choose_row(ask, row, rates, matches, "pinned")
        if not table.free_slots:
            return None
        avoid = ask.exclude.union(exclude) if exclude else ask.exclude
        found = self.pick(ask, table, rates, matches, avoid)
        if found is None and avoid:
            return self.pick(ask, table, rates, matches, NOBODY)
        return found

    def pick(self, ask: Ask, table: Table[T], rates: Rates, matches: Matches, avoid: frozenset[str]) -> Choice | None:
        """The rule itself, for a request that is not pinned; to avoid is a ban here."""
        rows = table.least_loaded(1, avoid, ask.adapter)
        return choose_row(ask, rows[0], rates, matches, "least loaded") if rows else None

    def placed(self, ask: Ask, engine: str) -> None:
        """A request was given a slot of this engine."""

    def forget(self, engine: str, *, is_gone: bool = False) -> None:
        """The engine is another one under the old name, or left: then its name does not come back."""


class Residency(Policy):
    """Least expected time for all: prefill of what is not cached, decoding, and the harm to the engine's others.

    A session's last engine has a bonus, but only while this request would put it at most one slot above the least
    loaded engine: sessions never stack. What a session has cached speaks for itself, through the matches.

    Content that more than one session has use for, a system prompt, is worth a copy: computing it on one more engine
    counts for little, else all who share it would fill one engine after the other while the rest are idle
    (sgl-project/sglang#34513). What is shared tells `Ask.shared_tokens`: up to where known prompts part.

    A conversation's own content is worth none: an engine that is idle for a moment does not stay so while it computes
    again what another one has, as those come back who are at home there. Without that, busy fleets keep exchanging
    conversations, for each move seems to gain a little, and all of them wait for what is computed twice. For the same
    reason a new one counts those who rest at an engine between two turns, not only those that run there.

    Args:
        sessions: how many sessions' last engines are remembered, the latest ones.
        affinity_ratio: share of a prompt that is hoped to be cached at the session's engine when no match says so.
        wait_ratio: an engine is worth waiting for up to this share of the time it would save.
        copy_ratio: share of the time to compute shared content again that counts; 1 is all of it.
    """

    name = "residency"

    def __init__(
        self,
        *,
        sessions: int = 65_536,
        affinity_ratio: float = 0.25,
        wait_ratio: float = 1.0,
        copy_ratio: float = 0.125,
    ) -> None:
        _check("sessions", sessions, 0, inf)
        _check("affinity_ratio", affinity_ratio, 0, 1)
        _check("wait_ratio", wait_ratio, 0, 1)
        _check("copy_ratio", copy_ratio, 0, 1)
        self._sessions = sessions
        self._affinity_ratio = affinity_ratio
        self._wait_ratio = wait_ratio
        self._copy_ratio = copy_ratio
        self._homes: OrderedDict[tuple[str, str], tuple[str, int]] = OrderedDict()
        self._lives: dict[str, int] = {}

    def pick(self, ask: Ask, table: Table[T], rates: Rates, matches: Matches, avoid: frozenset[str]) -> Choice | None:
        """As in `Policy`; scores the matches, the few least loaded engines and the session's last one."""
        least = _least_loaded(ask, table, avoid)
        if not least:
            return None
        if _is_new(ask, matches) and _is_plain(ask, least, rates):
            outlook = crowding.look_ahead(rates)
            calmest = min(least, key=lambda each: crowding.harm(ask, each, outlook))
            return choose_row(ask, calmest, rates, matches, "")
        holders = table.holders(ask.adapter) if ask.adapter else None
        output = rates.output_tokens(ask.max_tokens)
        free: dict[str, tuple[T, int]] = {}
        full: list[tuple[Score, T]] = []
        for name, cached in matches[:_CONSIDERED]:
            row = table.get(name)
            if row is None or row.is_suspect or name in avoid or not (holders is None or name in holders):
                continue
            if row.has_room:
                free[name] = row, cached
            else:
                full.append((estimate(ask, row, rates, cached, output), row))
        home = self._home(ask, table, least[0])
        if home is not None and not _may_take(home, avoid, holders):
            home = None
        for row in least if home is None else (*least, home):
            free.setdefault(row.name, (row, 0))
        known = crowding.know(ask, table, rates, output, free, full)
        ranked = [self._rank(ask, row, cached, rates, known, home) for row, cached in free.values()]
        ranked.sort()
        full.sort(key=_by_cost)
        *_, cost_s, best, row = ranked[0]
        wait = self._worth_waiting(cost_s, full, rates)
        shown = [each[4] for each in ranked[: _CONSIDERED - bool(full)]] + [score for score, _ in full[:1]]
        rule = "same session" if row is home and not best.cached_tokens else ""
        return _answer(ask, row, shown, wait, rule)

    def _rank(
        self, ask: Ask, row: T, cached: int, rates: Rates, known: crowding.Known, home: T | None
    ) -> tuple[float, int, str, float, Score, T]:
        """What the least of is taken; the cost in it is that of this request alone, and of a move from its home."""
        score = estimate(ask, row, rates, cached, known.output_tokens)
        cost_s = score.cost_s - self._discount_s(known, score, rates)
        if row is home:
            cost_s -= self._bonus_s(ask, rates, score)
        drift_s = crowding.drift_s(known, score, rates)
        if cached <= ask.shared_tokens:
            own = int(row is home)
            later_s = crowding.later_s(ask, row, rates, known.outlook, known.output_tokens, own)
            if known.home_s:
                cost_s += max(later_s - known.home_s, 0.0)
            else:
                drift_s += later_s
        return cost_s + drift_s, row.last_used, row.name, cost_s, score, row

    def placed(self, ask: Ask, engine: str) -> None:
        """The session's next request had better go there, too."""
        if not ask.affinity:
            return
        key = ask.model, ask.affinity
        self._homes[key] = engine, self._lives.get(engine, 0)
        self._homes.move_to_end(key)
        if len(self._homes) > self._sessions:
            self._homes.popitem(last=False)

    def forget(self, engine: str, *, is_gone: bool = False) -> None:
        """Sessions have no reason any more to come back to it."""
        if is_gone:
            self._lives.pop(engine, None)
        else:
            self._lives[engine] = self._lives.get(engine, 0) + 1

    def _home(self, ask: Ask, table: Table[T], least: T) -> T | None:
        if not ask.affinity:
            return None
        name, life = self._homes.get((ask.model, ask.affinity), ("", 0))
        row = table.get(name)
        if row is None or row.is_suspect or life != self._lives.get(name, 0):
            return None
        return row if row.has_room and row.load <= least.load else None

    def _bonus_s(self, ask: Ask, rates: Rates, score: Score) -> float:
        # the overhead alone, which is never 0, decides between equals
        speed = rates.speed(score.engine)
        hoped = 0.0 if score.cached_tokens else self._affinity_ratio * ask.prompt_tokens
        return speed.prefill_overhead_s + hoped * speed.prefill_token_s

    def _discount_s(self, known: crowding.Known, score: Score, rates: Rates) -> float:
        """What does not count of the time to compute shared content once more."""
        tokens = max(0, known.shared_tokens - score.cached_tokens)
        return (1.0 - self._copy_ratio) * tokens * rates.speed(score.engine).prefill_token_s

    def _worth_waiting(self, cost_s: float, full: Sequence[tuple[Score, T]], rates: Rates) -> _Wait:
        found = _NO_WAIT
        if not full or rates.requests < _WAIT_AFTER:
            return found
        for score, row in full:
            saved_s = cost_s - score.cost_s
            wait_s = rates.slot_wait_s(row.slots_total, row.waiting, deviations=0.0)
            gain_s = saved_s - wait_s
            if wait_s <= self._wait_ratio * saved_s and gain_s > max(found[1], _LEAST_GAIN_S):
                found = score.engine, gain_s, wait_s
        return found


class RoundRobin(Policy):
    """One engine after the other, in the order of their names, passing over those without a free slot."""

    name = "round-robin"

    def __init__(self) -> None:
        self._last: dict[str, str] = {}

    def pick(self, ask: Ask, table: Table[T], rates: Rates, matches: Matches, avoid: frozenset[str]) -> Choice | None:
        """As in `Policy`; the least loaded engine if the next 64 have no room."""
        names = table.names
        holders = table.holders(ask.adapter) if ask.adapter else None
        start = bisect_right(names, self._last.get(ask.model, ""))
        for step in range(min(len(names), MOST_STEPS)):
            name = names[(start + step) % len(names)]
            row = table.get(name)
            if row is not None and _may_take(row, avoid, holders):
                return choose_row(ask, row, rates, matches, self.name)
        return super().pick(ask, table, rates, matches, avoid)

    def placed(self, ask: Ask, engine: str) -> None:
        """The next turn is its neighbour's."""
        self._last[ask.model] = engine


class ConsistentHash(Policy):
    """The same session, or else the same beginning of a prompt, on the same engine as long as that is not overloaded.

    Consistent hashing with bounded loads (Mirrokni, Thorup, Zadimoghaddam, arXiv:1608.01350): no engine gets more than
    `bound` times its share of the busy slots; what is too much goes to the next engine on the ring. When an engine
    leaves only its own keys move.

    Args:
        bound: over 1; the paper's 1 + epsilon.
        key_bytes: how much of the prompt's key counts.
    """

    name = "consistent-hash"
    by_session: ClassVar[bool] = True

    def __init__(self, *, bound: float = 1.25, key_bytes: int = 256) -> None:
        _check("bound", bound, 1, inf)
        _check("key_bytes", key_bytes, 1, inf)
        self._bound = bound
        self._key_bytes = key_bytes
        self._rings: dict[str, Ring] = {}

    def pick(self, ask: Ask, table: Table[T], rates: Rates, matches: Matches, avoid: frozenset[str]) -> Choice | None:
        """As in `Policy`; the least loaded engine for a request without a key, or if the next 64 are overloaded."""
        key = ask.affinity.encode() if self.by_session and ask.affinity else ask.key[: self._key_bytes]
        if key:
            ring = self._rings.setdefault(ask.model, Ring())
            ring.follow(table.names)
            holders = table.holders(ask.adapter) if ask.adapter else None
            share = self._bound * (table.busy_total + 1) / max(1, table.slots_total)
            for name in ring.walk(key + b"\0" + ask.adapter.encode()):
                row = table.get(name)
                if row is None or not _may_take(row, avoid, holders):
                    continue
                if row.busy < ceil(share * row.slots_total):
                    return choose_row(ask, row, rates, matches, self.name)
        return super().pick(ask, table, rates, matches, avoid)


class PrefixHash(ConsistentHash):
    """As `ConsistentHash`, but only the beginning of the prompt counts, whichever session it is of."""

    name = "prefix-hash"
    by_session = False

    def __init__(self, *, bound: float = 1.25, key_bytes: int = 1024) -> None:
        super().__init__(bound=bound, key_bytes=key_bytes)


_POLICY_TYPES: dict[str, type[Policy]] = {
    each.name: each for each in (Residency, Policy, RoundRobin, ConsistentHash, PrefixHash)
}
POLICIES: tuple[str, ...] = tuple(_POLICY_TYPES)
"""Names of all policies, the default first."""


def make_policy(name: str = "residency", **options: float) -> Policy:
    """A policy by its name.

    Args:
        name: one of `POLICIES`.
        options: arguments of its class.

    Raises:
        ConfigError: no such policy, or it has no such option, or the option's value is out of its range.
    """
    kind = _POLICY_TYPES.get(name)
    if kind is None:
        raise ConfigError("policy", name, f"no such policy; known are {', '.join(POLICIES)}")
    known = getattr(kind.__init__, "__kwdefaults__", None) or {}
    for option, value in options.items():
        if option not in known:
            raise ConfigError(option, value, f"policy {name} has the options: {', '.join(known) or 'none'}")
    return kind(**options)


def _check(field_name: str, value: float, least: float, most: float) -> None:
    if not least <= value <= most:
        raise ConfigError(field_name, value, f"must be from {least:g} to {most:g}")


def _may_take(row: EngineView, avoid: frozenset[str], holders: Set[str] | None) -> bool:
    if row.busy >= row.slots_total or row.is_suspect or row.name in avoid:
        return False
    return holders is None or row.name in holders


def _least_loaded(ask: Ask, table: Table[T], avoid: frozenset[str]) -> list[T]:
    """A few; where requests with other adapters run on all of them, one more where they do not."""
    least = table.least_loaded(_LEAST_LOADED, avoid, ask.adapter)
    if least and least[0].adapters and all(row.is_taken(ask.lora) for row in least):
        more = table.least_loaded(_MORE_LOADED, avoid, ask.adapter)
        least += [row for row in more if not row.is_taken(ask.lora)][:1]
    return least


def _is_new(ask: Ask, matches: Matches) -> bool:
    """Whether nothing is cached of a prompt but what begins every other one, as a chat template does."""
    return not matches or matches[0][1] <= min(ask.shared_tokens, max(_TEMPLATE_TOKENS, ask.prompt_tokens >> 3))


def _is_plain(ask: Ask, least: Sequence[EngineView], rates: Rates) -> bool:
    """Nothing tells the least loaded engines apart but their load: equal in speed, no prompt of note pending."""
    if ask.affinity or ask.adapter or ask.only or ask.prompt_tokens >= LONG_PREFILL_TOKENS:
        return False
    for row in least:
        if row.prefilling_tokens >= LONG_PREFILL_TOKENS or row.adapters or row.name in rates.odd:
            return False
    return True


def _by_cost(each: tuple[Score, EngineView]) -> tuple[float, str]:
    return each[0].cost_s, each[0].engine


def _answer(ask: Ask, row: EngineView, shown: Sequence[Score], wait: _Wait, rule: str) -> Choice:
    engine, cached, _, expected_s, _ = shown[0]
    load = ask.prompt_tokens, row.busy, row.slots_total
    return Choice(engine, cached, expected_s, tuple(shown), *wait, *load, rule)
