"""Text that prompts share behind beginnings that differ, which no cache of beginnings finds.

Caches, and the hashes in `prefix`, know beginnings only: a date or a name at the head of a system prompt makes all of
it new each time. Here a prompt is a row of blocks, which are the same wherever they stand (`_prefix.hash_blocks`). A
block is lost if an earlier request of its model had computed it before this one's prefill began, while no such request
had had everything before it too, and if it was not cached all the same. What a beginning would have given is not
counted: that is `prefix`'s. Nor is what stands beyond the blocks that are told, the first 64 KiB of a prompt.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lltm_ray._prefix import LEAST_BLOCK
from lltm_ray.analytics import units
from lltm_ray.analytics.answer import Answer, Finding, rows, table
from lltm_ray.analytics.conversations import dearest
from lltm_ray.analytics.frames import Array, Frame
from lltm_ray.analytics.prefix import LEAST_LOST_RATIO, LEAST_REQUESTS, LEAST_WASTED_S, least_of, prefill_times
from lltm_ray.analytics.sections import Sections, find_sections
from lltm_ray.analytics.trace import Trace
from lltm_ray.analytics.turns import SPREAD, columns_of, prefill_token_s

NAME = "shared text"
LEAST_RATIO = 0.25
"""Lost of the text's tokens over all prompts that have it."""
LEAST_PART = 0.9
"""Of a section's bytes, for a prompt to have it."""
MOST_FINDINGS = 3
"""A section each; the others are in the table."""
_TOP = 50
_TEXTS = (
    *("text", "model", "tokens", "requests", "heads", "head_tokens", "lost_requests", "lost_tokens", "lost_s"),
    "evidence",
)


def analyze(trace: Trace) -> Answer:
    """Table `texts`: sections that were computed again, the most seconds first.

    Its columns: text: the begin of a hash of one of its blocks; tokens: its length; requests: that have it; heads:
    different beginnings before it; head_tokens: where it was first seen, the median, so that what differs is shorter;
    lost_requests, lost_tokens, lost_s. Figures: how many prompts there were, how many of them had blocks told and how
    many were compared, shared blocks that were not, and what was lost over all blocks, of sections or not.
    """
    blocks = _blocks(trace)
    found = find_sections(trace, blocks)
    members = _members(trace, blocks, found)
    of = columns_of(trace)
    long = int((of["is_usable"] & (of["prompt_bytes"] >= LEAST_BLOCK)).sum())
    compared = {"prompts": long, "told": found.prompts, "compared": found.compared, "blocks_left_out": found.left_out}
    lost = {name: float(blocks[name].sum()) for name in ("lost_tokens", "lost_s")}
    told = trace.engine.xp.unique(trace.engine.array(blocks["r"]))
    total_s = float(trace.engine.array(trace.requests["total_s"])[told].sum())
    return Answer({"texts": _texts(trace, found, members)}, compared | lost | {"total_s": total_s})


def judge(answer: Answer) -> list[Finding]:
    """Kind `uncacheable text`: text that many prompts have, most of whom computed it again."""
    least_s = max(LEAST_WASTED_S, LEAST_LOST_RATIO * answer.figures["total_s"])
    found = [
        _finding(row, answer.figures)
        for row in rows(answer.tables["texts"])
        if row.lost_requests >= LEAST_REQUESTS
        and row.lost_s >= least_s
        and row.lost_tokens >= LEAST_RATIO * row.tokens * row.requests
    ]
    return found[:MOST_FINDINGS]


def _finding(row: Any, told: Mapping[str, float]) -> Finding:
    text = (
        f"{row.requests:,} prompts of {row.model} hold the same {row.tokens:,.0f} tokens behind {row.heads:,} "
        f"different beginnings of {row.head_tokens:,.0f} tokens or less. A cache finds text only behind an equal "
        f"beginning, so {row.lost_requests:,} of them computed it again: {row.lost_tokens:,.0f} tokens, "
        f"{units.seconds(row.lost_s)} of prefill."
    )
    if told["compared"] < told["prompts"]:
        counted = "all" if told["told"] == told["prompts"] else f"the {told['told']:,.0f} whose text was hashed"
        text += f" Found in {told['compared']:,.0f} of {told['prompts']:,.0f} prompts, counted in {counted}."
    return Finding(
        kind="uncacheable text",
        subject=f"text {row.text}",
        text=text,
        advice=(
            "Put what differs (a date, a name, an id, a question) behind the text that all share: to the end of the "
            f"system prompt, or into the last message. Up to {row.lost_tokens:,.0f} tokens could then be reused."
        ),
        impact_s=float(row.lost_s),
        figures={name: float(getattr(row, name)) for name in _TEXTS[2:-1]},
        evidence=row.evidence,
    )


# --- blocks


def _blocks(trace: Trace) -> Frame:
    """Blocks of usable requests, in their order.

    Returns:
        r; key: equal for equal blocks of one model; chain: equal where all blocks before are, too; start, size: bytes;
        lost_tokens, lost_s.
    """
    engine, xp, of = trace.engine, trace.engine.xp, columns_of(trace)
    given = trace.blocks[["r", "place", "block", "start", "size"]]
    r, place, block, start, size = (engine.array(given[name]) for name in given.columns)
    keep = of["is_usable"][r]
    r, place, block, start, size = r[keep], place[keep], block[keep], start[keep], size[keep]
    key = block ^ (of["model"][r] + 1) * SPREAD
    chain = _chain(xp, key, place)
    began, done = prefill_times(trace, of)
    is_lost = _is_ready(trace, key, r, (began, done)) & ~_is_ready(trace, chain, r, (began, done))
    token_bytes = of["prompt_bytes"][r] / xp.maximum(of["prompt"][r], 1)
    computed = start + size - xp.maximum(start, of["cached"][r] * token_bytes)
    tokens = xp.where(is_lost, xp.floor(xp.maximum(computed, 0) / xp.maximum(token_bytes, 1e-9)), 0)
    lost_s = tokens * prefill_token_s(trace)[of["engine"][r]]
    columns = {"r": r, "key": key, "chain": chain, "start": start, "size": size}
    return engine.frame(columns | {"lost_tokens": tokens, "lost_s": lost_s})


def _chain(xp: Any, key: Array, place: Array) -> Array:
    """By block: a hash of it and of all before it in its prompt, as a sum that depends on their places."""
    mixed = (key ^ (key >> 31) ^ (place + 1) * SPREAD) * SPREAD
    mixed = (mixed ^ (mixed >> 29)) * SPREAD
    upto = xp.cumsum(mixed)
    first = xp.arange(len(key)) - place
    return upto - (upto - mixed)[first]


def _is_ready(trace: Trace, key: Array, r: Array, times: tuple[Array, Array]) -> Array:
    """By block: whether another request had computed what has this key before this one's prefill began."""
    keys, code = trace.engine.xp.unique(key, return_inverse=True)
    began, done = times
    return least_of(trace, code, done[r], len(keys))[code] < began[r]


# --- sections


def _members(trace: Trace, blocks: Frame, found: Sections) -> Frame:
    """A row for each section of each prompt that has it.

    Returns:
        section, r; chain, start: of its first block there; lost_tokens, lost_s; size: of its blocks there; whole: of
        all of its blocks.
    """
    engine, xp = trace.engine, trace.engine.xp
    keys = xp.concatenate([found.key, xp.zeros(1, "int64")])  # a place for what comes after all of them
    at = xp.searchsorted(found.key, engine.array(blocks["key"]))
    is_in = (keys[at] == engine.array(blocks["key"])) & (at < len(found.key))
    part = {name: engine.array(blocks[name])[is_in] for name in blocks.columns}
    rows_in = engine.frame(part | {"section": found.section[at[is_in]]})
    sums = {"lost_tokens": "sum", "lost_s": "sum"}
    lost = rows_in.groupby(["section", "r"], sort=True).agg(sums).reset_index()
    once = rows_in.drop_duplicates(["r", "key"])
    held = once.groupby(["section", "r"], sort=True).agg({"size": "sum"}).reset_index()
    first = rows_in.drop_duplicates(["section", "r"])[["section", "r", "chain", "start"]]
    members = first.merge(lost, on=["section", "r"]).merge(held, on=["section", "r"])
    whole = xp.bincount(found.section, weights=found.size, minlength=len(found.key))
    members = members.assign(whole=whole[engine.array(members["section"])])
    has = members[members["size"] >= LEAST_PART * members["whole"]]
    return has.sort_values(["section", "r"]).reset_index(drop=True)


def _texts(trace: Trace, found: Sections, members: Frame) -> Any:
    engine, xp, of = trace.engine, trace.engine.xp, columns_of(trace)
    r = engine.array(members["r"])
    a_byte = of["prompt"][r] / xp.maximum(of["prompt_bytes"][r], 1)
    sizes = {name: engine.array(members[name]) * a_byte for name in ("whole", "start")}
    members = members.assign(tokens=sizes["whole"], head=sizes["start"], model=of["model"][r], one=1)
    top = _top(trace, members)
    kept = top["section"].tolist()
    members = members[members["section"].isin(kept)]
    heads = _counts(trace, members.drop_duplicates(["section", "chain"]))
    losers = _counts(trace, members[members["lost_tokens"] > 0])
    middle = engine.host(engine.quantiles(members, ["section"], "head", [0.5]))
    head = dict(zip(middle["section"].tolist(), middle["q50"].tolist(), strict=True))
    shown = dearest(trace, members, "section", ["lost_s"])
    blocks = found.key[xp.asarray(kept, "int64")] ^ (xp.asarray(top["model"].to_numpy("int64")) + 1) * SPREAD
    columns = (
        [block_name(block) for block in blocks.tolist()],
        trace.names.decode("model", top["model"]),
        top["tokens"].round().tolist(),
        top["one"].tolist(),
        [heads[each] for each in kept],
        [round(head[each]) for each in kept],
        [losers[each] for each in kept],
        *(top[name].tolist() for name in ("lost_tokens", "lost_s")),
        [shown.get(each, ()) for each in kept],
    )
    return table(dict(zip(_TEXTS, columns, strict=True)))


def _top(trace: Trace, members: Frame) -> Any:
    """Sections of which something was lost, on the host."""
    sums = {"one": "sum", "tokens": "mean", "lost_tokens": "sum", "lost_s": "sum", "model": "max"}
    each = members.groupby("section", sort=True).agg(sums).reset_index()
    order = each[each["lost_tokens"] > 0].sort_values(["lost_s", "one", "section"], ascending=[False, False, True])
    return trace.engine.host(order.head(_TOP)).reset_index(drop=True)


def _counts(trace: Trace, some: Frame) -> dict[int, int]:
    """Rows of each section."""
    found: dict[int, int] = trace.engine.host(some[["section"]])["section"].value_counts().to_dict()
    return found


def block_name(block: int) -> str:
    """The first half of its hash, as a row tells it."""
    return f"{block % 2**64:016x}"[:8]
