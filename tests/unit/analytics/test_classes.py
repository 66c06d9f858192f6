"""Workload classes: planted ones are found and named by what they are; partitions are compared by modularity."""

from __future__ import annotations

import random

import networkx as nx
import numpy as np
import pyarrow as pa
import pytest

from lltm_ray._prefix import hash_prefixes
from lltm_ray.analytics import classes
from lltm_ray.analytics.frames import choose_engine
from lltm_ray.analytics.ingest import build_trace
from tests.fleet_rows import Plan, fleet_rows, many_spans

ENGINE = choose_engine("pandas")
SALT = b"0123456789abcdef"


def chats(dice):
    """Short prompts, long answers, little cached."""
    return {
        "tenant": "chat",
        "prompt": int(dice.lognormvariate(5.0, 0.3)),
        "generated": int(dice.lognormvariate(5.5, 0.3)),
        "cached_ratio": dice.uniform(0, 0.05),
        "text": b"",
    }


def batches(dice):
    """Long prompts that begin alike, short answers, almost all cached."""
    return {
        "tenant": "batch",
        "prompt": int(dice.lognormvariate(8.7, 0.1)),
        "generated": int(dice.lognormvariate(2.0, 0.3)),
        "cached_ratio": dice.uniform(0.91, 0.95),
        "text": b"Answer with one word. " * 40,
    }


def chance(dice):
    """Nothing tells anything of anything else."""
    return {
        "tenant": f"tenant-{dice.randrange(4)}",
        "prompt": int(dice.lognormvariate(6, 1)),
        "generated": int(dice.lognormvariate(4, 1)),
        "cached_ratio": dice.random(),
        "text": b"",
    }


def planted(*kinds, requests=600, seed=0, **changes):
    """Requests of these kinds in turn."""
    dice = random.Random(seed)
    made = [kinds[i % len(kinds)](dice) | changes for i in range(requests)]
    spans = [f"{i + 1:016x}" for i in range(requests)]
    cached = [int(each["prompt"] * each["cached_ratio"]) for each in made]
    rows = {
        "span_id": spans,
        "arrived_unix_nano": [10**18 + 10**8 * i for i in range(requests)],
        "tenant": [each["tenant"] for each in made],
        "route": ["/v1/chat/completions"] * requests,
        "total_s": [1.0 + 0.01 * each["generated"] for each in made],
        "ttft_s": [0.5] * requests,
        "prefix": [hash_prefixes(each["text"], SALT) for each in made],
    }
    attempts = {
        "request_span_id": spans,
        "engine": [f"engine-{i % 3}" for i in range(requests)],
        "cached_tokens": cached,
        "computed_tokens": [each["prompt"] - held for each, held in zip(made, cached, strict=True)],
        "generated_tokens": [each["generated"] for each in made],
        "outcome": ["ok"] * requests,
    }
    return build_trace({"requests": pa.table(rows), "attempts": pa.table(attempts)}, ENGINE)


def table_of(trace):
    return classes.analyze(trace).tables["classes"]


def labels_of(trace):
    known = classes._known(trace)
    return classes.communities(trace, known)


# --- partitions


@pytest.mark.parametrize("seed", range(3))
def test_two_planted_classes_never_share_a_community(seed):
    labels, modularity = labels_of(planted(chats, batches, seed=seed))
    assert not set(labels[::2]) & set(labels[1::2])
    assert modularity > 0.4
    largest = [np.bincount(half[half >= 0]).max() for half in (labels[::2], labels[1::2])]
    assert sum(largest) > 0.8 * len(labels), "and each is mostly one community"


def test_the_modularity_told_is_that_of_the_graph_and_no_worse_than_the_planted_partition():
    trace = planted(chats, batches, seed=3)
    known = classes._known(trace)
    key, sizes = classes._combine(np, classes._features(trace, known))
    found, place, count = np.unique(key, return_inverse=True, return_counts=True)
    edges = classes._edges(trace, found, count, sizes)
    graph = nx.Graph()
    graph.add_weighted_edges_from(edges[["source", "target", "weight"]].itertuples(index=False))
    is_batch = np.bincount(place, np.arange(len(key)) % 2) > 0
    votes = edges.assign(batch=np.where(is_batch[edges["source"]], edges["weight"], -edges["weight"]))
    sides = {int(source): bool(is_batch[source]) for source in edges["source"]}
    sides |= {int(target): bool(vote > 0) for target, vote in votes.groupby("target")["batch"].sum().items()}
    planted_partition = [{node for node in graph if sides[node] is side} for side in (False, True)]
    _, modularity = classes.communities(trace, known)
    assert modularity >= nx.community.modularity(graph, planted_partition, weight="weight") - 1e-9
    assert modularity <= 1


def test_the_same_rows_give_the_same_classes():
    told = [table_of(planted(chats, batches, seed=5)) for _ in range(2)]
    assert told[0].equals(told[1])
    assert len(told[0]) >= 2


@pytest.mark.parametrize("requests", [1, 2, 10, 60, 300, 3000])
def test_requests_without_structure_are_one_class(requests):
    answer = classes.analyze(planted(chance, requests=requests))
    assert list(answer.tables["classes"]["name"]) == ["all requests"]
    assert answer.figures["modularity"] == 0.0
    assert answer.tables["classes"]["share"][0] == 1.0


def test_rare_combinations_are_left_out_and_counted(monkeypatch):
    trace = planted(chats, batches)
    monkeypatch.setattr(classes, "MOST_COMBINATIONS", 10)
    labels, _ = labels_of(trace)
    answer = classes.analyze(trace)
    assert (labels < 0).any()
    assert answer.tables["classes"]["requests"].sum() + answer.figures["requests_left_out"] == 600
    assert answer.figures["requests_left_out"] >= (labels < 0).sum()


# --- features


@pytest.mark.parametrize("seed", range(2))
def test_a_shared_beginning_is_the_longest_that_enough_requests_share(seed):
    trace = build_trace(fleet_rows(Plan(seed=seed, seconds=30)), ENGINE)
    known = classes._known(trace)
    found = classes._families(trace, known)
    prefixes = trace.prefixes[trace.prefixes["depth"] < classes.MOST_DEPTH]
    counts = prefixes["hash"].value_counts()
    for r, family in zip(known["r"], found, strict=True):
        own = prefixes[prefixes["r"] == r].sort_values("depth")["hash"]
        shared = [each for each in own if counts[each] >= classes.least_count(len(known))]
        assert family == (shared[-1] if shared else -1)


def test_a_feature_that_repeats_another_is_tied_to_it_and_one_of_chance_is_not():
    dice = np.random.default_rng(0)
    one, other = dice.integers(0, 5, 4000), dice.integers(0, 7, 4000)
    ties = classes._ties(np, [one, other, (one * 2) % 5], [5, 7, 5], np.ones(4000))
    assert ties == [pytest.approx(1.0, abs=0.01), 0.0, pytest.approx(1.0, abs=0.01)]


# --- what is told


def test_names_tell_what_a_class_has_and_others_have_not():
    found = table_of(planted(chats, batches, seed=1))
    names = dict(zip(found["tenants"], found["name"], strict=True))
    assert "short prompts" in names["chat"]
    assert "long answers" in names["chat"]
    assert "tenant chat" in names["chat"]
    assert "long prompts (p50 " in names["batch"]
    assert "short answers" in names["batch"]
    assert "% cached" in names["batch"]
    assert "all begin alike (" in names["batch"]


def test_numbers_are_those_of_the_class_members():
    trace = planted(chats, batches, seed=2)
    labels, _ = labels_of(trace)
    requests, found = trace.requests, table_of(trace)
    sizes = sorted(np.bincount(labels[labels >= 0]), reverse=True)
    assert list(found["requests"]) == [size for size in sizes if size >= 6]
    members = requests[labels == np.bincount(labels[labels >= 0]).argmax()]
    top = found.iloc[0]
    assert top["share"] == pytest.approx(len(members) / 600)
    assert top["prompt_p50"] == members["prompt"].median()
    assert top["generated_p50"] == members["generated"].median()
    assert top["cached_share"] == pytest.approx(members["cached"].sum() / members["prompt"].sum())
    assert (top["p50_s"], top["p95_s"]) == pytest.approx(tuple(members["total_s"].quantile([0.5, 0.95])))
    assert set(top["engines"].split(", ")) == {"engine-0", "engine-1", "engine-2"}


def test_names_are_unique_in_a_fleet_of_many_tenants():
    answer = classes.analyze(build_trace(many_spans(30_000), ENGINE))
    found = answer.tables["classes"]
    assert len(found) == len(set(found["name"])) >= 5
    assert len(found) <= classes.MOST_CLASSES
    assert answer.figures["modularity"] > 0.5, "each tenant of it has prompts that begin alike"


def test_an_aggressors_requests_are_a_class_that_names_it():
    rows = fleet_rows(Plan(seed=1, seconds=90, aggressor="crawler", aggressor_rate=2.0, overload=0.5))
    found = table_of(build_trace(rows, ENGINE))
    (name,) = [name for name in found["name"] if "tenant crawler" in name]
    assert "long prompts (p50 6,0" in name
    assert "short answers" in name


def test_requests_that_no_engine_read_are_left_out():
    trace = planted(chats, batches, prompt=0)
    answer = classes.analyze(trace)
    assert len(answer.tables["classes"]) == 0
    assert "tenants" in answer.tables["classes"]


def test_an_empty_window_gives_an_empty_table_and_no_finding():
    answer = classes.analyze(build_trace({}, ENGINE))
    assert len(answer.tables["classes"]) == 0
    assert "prompt_p50" in answer.tables["classes"]
    assert classes.judge(answer) == []
