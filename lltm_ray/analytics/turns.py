"""Which request goes on from which: the turns of conversations, told by name or by content.

A request goes on from an earlier one, its previous turn, if that one's prompt is a beginning of its own. Prompts are
compared by their hashes, thus up to the last full block; of several such requests the longest counts, and of equally
long ones that which ended last. It must have ended when this one arrived: nobody goes on from an answer he has not got.

Where the client names its conversations, only requests of one name belong together. Where it does not, content alone
must tell a conversation from single requests that share a system prompt and end in the same block. Such ones overlap,
or are shorter than those before, or one seems to have many successors; so of nameless prompts that end in one block
each must be longer than the one before and come after its end, and no more than `MOST_BRANCHES` may go on from one.
What is in doubt begins a conversation of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lltm_ray.analytics.frames import Array, Frame
from lltm_ray.analytics.overlaps import count_overlaps
from lltm_ray.analytics.trace import Trace

MOST_BRANCHES = 3
"""Answers to one turn that a person may ask for; a system prompt's users are more."""
SLACK_TOKENS = 32
"""What a template may write otherwise once a turn is history; half of the shortest block."""
LEAST_COMPUTED = 64
"""Tokens of the prompts that tell an engine's speed; what is shorter costs what every request does."""
LEAST_STAYED = 20
"""Turns on the engine of the turn before, whose median says what staying keeps; with fewer, all is."""
SPREAD = -7046029254386353131
"""2**64 / golden ratio as an odd int64: takes small codes, times it, apart over 64 bits."""
_COLUMNS = (
    *("model", "tenant", "conversation", "engine", "slot", "cached", "prompt", "prompt_bytes", "generated"),
    *("arrived_s", "ended_s"),
)


def turns(trace: Trace) -> Frame:
    """One row for each request, in the order of `r`.

    Returns:
        r; previous: the previous turn's r, -1 for none; conversation: equal within one; engine, from_engine: codes;
        is_moved: 0 or 1, whether they differ; is_needless: 0 or 1, whether it is moved though the engine it came from
        had no more requests in hand then, and goes on serving; has_other_slot: 0 or 1, on the same engine; expected:
        tokens that staying would have found cached; lost: of them, those that a moved turn did not find; lost_s: the
        time to compute these.
    """
    xp, of = trace.engine.xp, columns_of(trace)
    previous = _previous(trace, of)
    has, before = previous >= 0, xp.maximum(previous, 0)
    home = xp.where(has, of["engine"][before], -1)
    is_moved = has & (of["engine"] != home)
    slot, slot_before = of["slot"], of["slot"][before]
    expected = _expected(trace, of, before, has, is_moved)
    lost = xp.where(is_moved, expected - of["cached"], 0)
    lost = xp.where(lost > SLACK_TOKENS, lost, 0)
    flags = {
        "is_moved": is_moved,
        "is_needless": is_moved & _was_free(trace, home, of["engine"]),
        "has_other_slot": has & ~is_moved & (slot >= 0) & (slot_before >= 0) & (slot != slot_before),
    }
    columns = {
        "r": xp.arange(len(previous)),
        "previous": previous,
        "conversation": _labels(trace, of, previous),
        "engine": of["engine"],
        "from_engine": home,
        **{name: flag.astype("int64") for name, flag in flags.items()},
        "expected": expected,
        "lost": lost,
        "lost_s": lost * prefill_token_s(trace)[of["engine"]],
    }
    return trace.engine.frame(columns)


def prefill_token_s(trace: Trace) -> Array:
    """Seconds to compute a token of a prompt, by the engine's code: its median; the fleet's where it has none.

    One more than there are engines: the last, for requests without an engine, is 0.
    """
    engine = trace.engine
    known = trace.attempts[["engine", "computed", "prefill_s"]]
    known = known[(known["engine"] >= 0) & (known["computed"] >= LEAST_COMPUTED) & (known["prefill_s"] > 0)]
    rates = engine.xp.zeros(len(trace.names.engine) + 1)
    if len(known):
        known = known.assign(token_s=known["prefill_s"] / known["computed"])
        rates[:-1] = float(known["token_s"].median())
        found = engine.quantiles(known, ["engine"], "token_s", [0.5])
        rates[engine.array(found["engine"])] = engine.array(found["q50"])
    return rates


def columns_of(trace: Trace) -> dict[str, Array]:
    """Of requests; and `who`: what must be equal within a conversation, as one code; `is_usable`: it has a prompt."""
    found = {name: trace.engine.array(trace.requests[name]) for name in _COLUMNS}
    tenants, conversations = len(trace.names.tenant) + 1, len(trace.names.conversation) + 1
    found["who"] = ((found["model"] + 1) * tenants + found["tenant"] + 1) * conversations + found["conversation"] + 1
    found["is_usable"] = (found["engine"] >= 0) & (found["prompt"] > 0)
    found["is_named"] = found["conversation"] >= 0
    return found


def _expected(trace: Trace, of: Mapping[str, Array], before: Array, has: Array, is_moved: Array) -> Array:
    """Tokens cached where the previous turn was: its prompt, and its answer if this prompt has room for it.

    Times the share of them that turns which stayed have found there, by their median: caches forget.
    """
    xp, prompt, generated = trace.engine.xp, of["prompt"], of["generated"][before]
    holds_answer = prompt > of["prompt"][before] + generated
    left = of["prompt"][before] + xp.where(holds_answer, generated, 0)
    expected = xp.where(has, xp.maximum(xp.minimum(left, prompt - 1), 0), 0)
    stayed = has & ~is_moved & (expected > 0)
    kept = xp.minimum(of["cached"][stayed] / expected[stayed], 1)
    share = float(xp.median(kept)) if len(kept) >= LEAST_STAYED else 1.0
    return xp.floor(expected * share)


def _was_free(trace: Trace, home: Array, chosen: Array) -> Array:
    """By request: whether its home had no more requests in hand, when it was sent, than the engine it went to."""
    engine, xp, n = trace.engine, trace.engine.xp, len(home)
    r, served, sent, ended = (engine.array(trace.attempts[name]) for name in ("r", "engine", "sent_s", "ended_s"))
    is_sent = (served >= 0) & ~xp.isnan(sent)
    r, served, sent, ended = r[is_sent], served[is_sent], sent[is_sent], ended[is_sent]
    if not len(r):
        return xp.zeros(n, bool)
    first = xp.searchsorted(r, xp.arange(n))
    at = sent[xp.minimum(first, len(r) - 1)]
    busy = [count_overlaps(xp, (where, at, at), (served, sent, ended)) for where in (home, chosen)]
    latest = engine.frame({"served": served, "sent": sent}).groupby("served", sort=True).agg({"sent": "max"})
    latest = latest.reset_index()
    last = xp.full(len(trace.names.engine) + 1, -xp.inf)
    last[engine.array(latest["served"])] = engine.array(latest["sent"])
    return (busy[0] <= busy[1]) & (last[home] > at)


@dataclass(slots=True)
class _Ends:
    """The requests that others may go on from, sorted by the hash of their last block, then by their end."""

    r: Array
    group: Array
    """Of equal hashes of equal `who`: index of `keys`."""
    place: Array
    """`group` times `size`, plus the rank of its end."""
    keys: Array
    """Sorted."""
    ended_s: Array
    """Sorted."""

    @property
    def size(self) -> int:
        return len(self.r) + 1


def _previous(trace: Trace, of: Mapping[str, Array]) -> Array:
    """Previous turn by `r`, or -1."""
    engine, xp, n = trace.engine, trace.engine.xp, len(trace.requests)
    r, depth, value = (engine.array(trace.prefixes[name]) for name in ("r", "depth", "hash"))
    count = xp.bincount(r, minlength=n) if len(r) else xp.zeros(n, "int64")
    last = xp.concatenate([value, xp.zeros(1, "int64")])[xp.where(count > 0, xp.cumsum(count) - 1, -1)]
    ends = _ends(trace, of, last ^ of["who"] * SPREAD, of["is_usable"] & ((count > 0) | of["is_named"]))
    previous = xp.full(n, -1)
    if len(ends.r):
        # the empty beginning, hash 0, joins named conversations whose prompts were shorter than a block
        named = xp.flatnonzero(of["is_named"])
        r, depth = xp.concatenate([named, r]), xp.concatenate([xp.full(len(named), -1), depth])
        value = xp.concatenate([xp.zeros(len(named), "int64"), value])
        r, depth, found = _match(trace, of, ends, (r, depth, value ^ of["who"][r] * SPREAD))
        deepest = engine.frame({"r": r, "depth": depth, "previous": found}).sort_values(["r", "depth"])
        deepest = deepest.drop_duplicates("r", keep="last")
        previous[engine.array(deepest["r"])] = engine.array(deepest["previous"])
    return _without_crowds(trace, of, previous)


def _ends(trace: Trace, of: Mapping[str, Array], key: Array, is_end: Array) -> _Ends:
    xp = trace.engine.xp
    r = xp.flatnonzero(is_end)
    ended = of["ended_s"][r]
    rank = xp.empty(len(r), "int64")
    rank[xp.lexsort(xp.stack([r, ended]))] = xp.arange(len(r))
    keys, group = xp.unique(key[r], return_inverse=True)
    place = group * (len(r) + 1) + rank
    order = xp.argsort(place)
    return _Ends(r[order], group[order], place[order], keys, xp.sort(ended))


def _match(
    trace: Trace, of: Mapping[str, Array], ends: _Ends, wanted: tuple[Array, Array, Array]
) -> tuple[Array, Array, Array]:
    """Of beginnings (r, depth, key), those that are an ended request's whole prompt: r, depth, and the last such."""
    xp, (r, depth, key) = trace.engine.xp, wanted
    at = xp.minimum(xp.searchsorted(ends.keys, key), len(ends.keys) - 1)
    hit = xp.flatnonzero((ends.keys[at] == key) & of["is_usable"][r])
    r, depth, at = r[hit], depth[hit], at[hit]
    ended_before = xp.searchsorted(ends.ended_s, of["arrived_s"][r], side="right")
    found = xp.searchsorted(ends.place, at * ends.size + ended_before) - 1
    place = xp.maximum(found, 0)
    before = ends.r[place]
    is_sure = of["is_named"][r] | _is_line(xp, of, ends)[place]
    keep = (found >= 0) & (ends.group[place] == at) & (before != r) & is_sure
    return r[keep], depth[keep], before[keep]


def _is_line(xp: Any, of: Mapping[str, Array], ends: _Ends) -> Array:
    """Whether all that end in the same block come one after the other, each longer than the one before."""
    old, new = ends.r[:-1], ends.r[1:]
    follows = (of["arrived_s"][new] >= of["ended_s"][old]) & (of["prompt_bytes"][new] > of["prompt_bytes"][old])
    breaks = (ends.group[1:] == ends.group[:-1]) & ~follows
    return xp.bincount(ends.group[1:][breaks], minlength=len(ends.keys))[ends.group] == 0


def _without_crowds(trace: Trace, of: Mapping[str, Array], previous: Array) -> Array:
    xp = trace.engine.xp
    known = previous[previous >= 0]
    if not len(known):
        return previous
    is_crowd = (xp.bincount(known, minlength=len(previous)) > MOST_BRANCHES) & ~of["is_named"]
    return xp.where((previous >= 0) & is_crowd[previous], -1, previous)


def _labels(trace: Trace, of: Mapping[str, Array], previous: Array) -> Array:
    """A conversation's first request; of named ones, what comes after all of these: their name, tenant and model."""
    xp, n = trace.engine.xp, len(previous)
    later = xp.flatnonzero((previous >= 0) & ~of["is_named"])
    first = trace.engine.components(previous[later], later, n) if len(later) else xp.arange(n)
    return xp.where(of["is_named"], n + of["who"], first)
