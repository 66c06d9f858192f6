"""What each engine had to do, how long requests waited for it, and what of that a peer could have spared them."""

from __future__ import annotations

from lltm_ray.analytics.columns import NONE
from lltm_ray.analytics.frames import Array, Frame
from lltm_ray.analytics.occupancy import slots_of
from lltm_ray.analytics.overlaps import Timeline
from lltm_ray.analytics.trace import Trace

FIT_RATIO = 0.2
"""A peer of which more attempts fail is none: its free slots help nobody."""


def loads(trace: Trace) -> Frame:
    """Attempts that an engine had, in seconds.

    Columns: r, engine, model: codes, the engine's; failed: 0 or 1; wait_s: for a slot, before and in the engine;
    taken_s: in its slot; work_s: what its tokens cost the fleet on average; avoidable_s: of the wait, while a peer of
    the same model that answers had a free slot and the engine had none; lost_s: what of that remains when its cached
    tokens had been computed there.
    """
    engine, xp = trace.engine, trace.engine.xp
    wanted = ("r", "engine", "model", "slot", "error", "asked_s", "sent_s", "ended_s", "queue_s", "prefill_s")
    tries = trace.attempts[trace.attempts["engine"] >= 0]
    of = {name: engine.array(tries[name]) for name in (*wanted, "decode_s", "computed", "generated", "cached")}
    of["sent_s"] = xp.where(xp.isnan(of["sent_s"]), of["ended_s"], of["sent_s"])
    of["failed"] = (of["error"] >= 0).astype("int64")
    start = xp.minimum(of["sent_s"] + xp.nan_to_num(of["queue_s"]), of["ended_s"])
    models = _models(trace, of)
    of["model"] = models[of["engine"]]
    has_tokens = ~xp.isnan(of["prefill_s"]) & (of["computed"] + of["generated"] > 0)
    prefill = _rate(trace, of["model"], xp.nan_to_num(of["prefill_s"]), of["computed"])
    decode = _rate(trace, of["model"], xp.nan_to_num(of["decode_s"]), of["generated"])
    taken = of["ended_s"] - start
    avoidable = _avoidable(trace, of, start, models) if len(start) else taken
    told = {name: of[name] for name in ("r", "engine", "model", "failed")}
    work = xp.where(has_tokens, prefill * of["computed"] + decode * of["generated"], taken)
    waits = {"wait_s": xp.maximum(start - of["asked_s"], 0), "taken_s": taken}
    lost = xp.maximum(avoidable - prefill * of["cached"], 0)
    return engine.frame(told | waits | {"work_s": work, "avoidable_s": avoidable, "lost_s": lost})


def _models(trace: Trace, of: dict[str, Array]) -> Array:
    """Engine -> the model it serves, whether or not each of its requests tells it."""
    xp, engines = trace.engine.xp, len(trace.names.engine)
    found = trace.engine.frame({"engine": of["engine"], "model": of["model"]})
    most = trace.engine.host(found.groupby("engine", sort=True).agg({"model": "max"}).reset_index())
    models = [NONE] * engines
    for engine, model in zip(most["engine"].tolist(), most["model"].tolist(), strict=True):
        models[engine] = model
    return xp.asarray(models, dtype="int64")


def _rate(trace: Trace, group: Array, seconds: Array, tokens: Array) -> Array:
    """Of each row, seconds a token in all of its group."""
    xp = trace.engine.xp
    if not len(group):
        return seconds
    sums = xp.bincount(group + 1, weights=seconds), xp.bincount(group + 1, weights=tokens)
    return (sums[0] / xp.maximum(sums[1], 1))[group + 1]


def _avoidable(trace: Trace, of: dict[str, Array], start: Array, served: Array) -> Array:
    """Seconds between asking and starting in which a peer had a free slot, and the engine itself had none.

    An engine counts from its first start to its last end: before and after it may not have been there at all.
    """
    xp = trace.engine.xp
    free = _free(trace, of, start, served)
    models = len(trace.names.model) + 1
    own = (models + free["engine"], free["from_s"], free["until_s"])
    fit = free["is_fit"] > 0
    peers = (free["model"][fit] + 1, free["from_s"][fit], free["until_s"][fit])
    line = Timeline(xp, {"peers": peers, "own": own})
    asked = xp.minimum(xp.where(xp.isnan(of["asked_s"]), start, of["asked_s"]), start)
    some = line.within((line.level("peers") > 0.5) * 1.0, of["model"] + 1, asked, start)
    itself = line.within((line.level("own") > 0.5) * 1.0, models + of["engine"], asked, start)
    return xp.maximum(some - itself, 0)


def _free(trace: Trace, of: dict[str, Array], start: Array, models: Array) -> dict[str, Array]:
    """Intervals in which engines had a free slot: engine, model, is_fit, from_s, until_s."""
    engine, xp = trace.engine, trace.engine.xp
    count = len(trace.names.engine)
    ones = xp.full(len(start), 1)
    changes = engine.frame(
        {
            "engine": xp.concatenate([of["engine"], of["engine"]]),
            "at_s": xp.concatenate([start, of["ended_s"]]),
            "change": xp.concatenate([ones, -ones]),
        }
    )
    changes = changes.sort_values(["engine", "at_s", "change"]).reset_index(drop=True)
    changes["busy"] = changes.groupby("engine")["change"].cumsum()
    at = {name: engine.array(changes[name]) for name in ("engine", "at_s", "busy")}
    slots = xp.asarray(slots_of(trace, changes), dtype="int64")
    fails = xp.bincount(of["engine"], weights=of["failed"], minlength=count)
    tries = xp.bincount(of["engine"], minlength=count)
    is_fit = (fails <= FIT_RATIO * tries).astype("int64")
    is_last = xp.concatenate([at["engine"][1:] != at["engine"][:-1], xp.full(1, True)])
    is_free = (at["busy"] < slots[at["engine"]]) & ~is_last
    was_free = xp.concatenate([xp.full(1, False), is_free[:-1]])
    begin, end = xp.where(is_free & ~was_free)[0], xp.where(was_free & ~is_free)[0]
    which = at["engine"][begin]
    told = {"engine": which, "model": models[which], "is_fit": is_fit[which]}
    return told | {"from_s": at["at_s"][begin], "until_s": at["at_s"][end]}
