"""What every engine of `lltm_ray.analytics.frames` must do, checked against plain loops and known graphs.

A test module subclasses `FrameChecks` and gives it a fixture `engine`. Floats are equal within 1e-5 of themselves:
cuGraph computes the betweenness of a graph without weights in 32 bits.
"""

from __future__ import annotations

import itertools
from collections import deque

import numpy as np
import pytest

RELATIVE = 1e-5
SEEDS = range(6)
NO_EDGES = {"source": np.empty(0, np.int64), "target": np.empty(0, np.int64), "weight": np.empty(0)}


def edges_of(engine, pairs, weights=None):
    """A frame of edges, each of weight 1 unless told."""
    source, target = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
    return engine.frame({"source": source, "target": target, "weight": np.array(weights or [1.0] * len(source))})


def random_pairs(seed, nodes, count):
    """Different directed edges without loops."""
    dice = np.random.default_rng(seed)
    ends = dice.integers(0, nodes, (count, 2))
    return sorted({(int(a) * 3, int(b) * 3) for a, b in ends if a != b})


def on_host(engine, array):
    """An engine's array as numpy's."""
    return engine.host(engine.frame({"x": array}))["x"].to_numpy()


def scores(engine, frame, *keys):
    """Key -> score."""
    host = engine.host(frame)
    found = [tuple(row) for row in host[list(keys)].itertuples(index=False)]
    return dict(zip(found if len(keys) > 1 else [key for (key,) in found], host["score"], strict=True))


def steps_from(start, following):
    """Breadth first: node -> (steps, number of shortest paths)."""
    known, waiting = {start: (0, 1)}, deque([start])
    while waiting:
        node = waiting.popleft()
        for after in following.get(node, ()):
            steps, paths = known.get(after, (known[node][0] + 1, 0))
            if after not in known:
                waiting.append(after)
            if steps == known[node][0] + 1:
                known[after] = (steps, paths + known[node][1])
    return known


def shortest(pairs):
    """Of a graph: (nodes, start -> node -> (steps, paths))."""
    following = {}
    for source, target in pairs:
        following.setdefault(source, []).append(target)
    nodes = sorted({node for pair in pairs for node in pair})
    return nodes, {node: steps_from(node, following) for node in nodes}


def share_through(reach, start, end, first, last):
    """Of the shortest paths from `start` to `end`, the share that has the way `first` -> `last` in it."""
    if first not in reach[start] or end not in reach[last] or end not in reach[start]:
        return 0.0
    between = 0 if first == last else 1
    steps, paths = reach[start][end]
    if reach[start][first][0] + between + reach[last][end][0] != steps:
        return 0.0
    return reach[start][first][1] * reach[last][end][1] / paths


class FrameChecks:
    """Runs on the fixture `engine`."""

    def test_numbers_come_back_as_they_went_in(self, engine):
        columns = {
            "code": np.array([-1, 2**60, 0]),
            "seconds": np.array([0.1, np.nan, -1e300]),
            "is_so": np.array([True, False, True]),
        }
        host = engine.host(engine.frame(columns))
        assert list(host.columns) == list(columns)
        for name, column in columns.items():
            assert host[name].dtype == column.dtype
            np.testing.assert_array_equal(host[name].to_numpy(), column)
        assert list(host.index) == [0, 1, 2]

    def test_frames_without_rows_keep_their_columns(self, engine):
        host = engine.host(engine.frame({"code": np.empty(0, np.int64), "seconds": np.empty(0)}))
        assert len(host) == 0
        assert [str(kind) for kind in host.dtypes] == ["int64", "float64"]

    def test_the_engines_own_arrays_make_frames_and_come_out_of_them(self, engine):
        column = engine.xp.arange(4) / 2
        values = engine.array(engine.frame({"x": column})["x"])
        assert isinstance(values, engine.xp.ndarray)
        np.testing.assert_array_equal(on_host(engine, values), [0, 0.5, 1, 1.5])

    def test_numbers_that_a_merge_did_not_find_are_nan(self, engine):
        left, right = {"k": np.arange(3)}, {"k": np.array([2, 0]), "v": np.array([7, 8])}
        merged = engine.frame(left).merge(engine.frame(right), on="k", how="left").sort_values(["k"])
        np.testing.assert_array_equal(on_host(engine, engine.array(merged["v"])), [8, np.nan, 7])

    @pytest.mark.parametrize("seed", SEEDS)
    @pytest.mark.parametrize("by", [["a"], ["a", "b"]])
    def test_quantiles_are_those_of_each_groups_numbers(self, engine, by, seed):
        dice = np.random.default_rng(seed)
        rows = int(dice.integers(1, 200))
        columns = {"a": dice.integers(-1, 4, rows), "b": dice.integers(0, 3, rows), "x": dice.lognormal(0, 2, rows)}
        columns["x"][dice.random(rows) < 0.2] = np.nan
        found = engine.host(engine.quantiles(engine.frame(columns), by, "x", (0, 0.5, 0.95, 0.999, 1)))
        assert list(found.columns) == [*by, "count", "q0", "q50", "q95", "q99.9", "q100"]
        known = ~np.isnan(columns["x"])
        keys = sorted({tuple(columns[name][row] for name in by) for row in np.flatnonzero(known)})
        assert [tuple(row) for row in found[by].itertuples(index=False)] == keys
        for place, key in enumerate(keys):
            is_of = np.all([columns[name] == part for name, part in zip(by, key, strict=True)], axis=0) & known
            values = columns["x"][is_of]
            assert found["count"][place] == len(values)
            wanted = np.percentile(values, [0, 50, 95, 99.9, 100])
            np.testing.assert_allclose(found.iloc[place, len(by) + 1 :].to_numpy(float), wanted, rtol=1e-9)

    @pytest.mark.parametrize("values", [[], [np.nan, np.nan]])
    def test_quantiles_of_nothing_have_their_columns(self, engine, values):
        frame = engine.frame({"a": np.zeros(len(values), np.int64), "x": np.array(values, float)})
        found = engine.host(engine.quantiles(frame, ["a"], "x", (0.5, 0.95)))
        assert (len(found), list(found.columns)) == (0, ["a", "count", "q50", "q95"])

    @pytest.mark.parametrize("seed", SEEDS)
    def test_components_are_named_for_their_smallest_node(self, engine, seed):
        dice = np.random.default_rng(seed)
        nodes = int(dice.integers(2, 60))
        source, target = dice.integers(0, nodes, (2, int(dice.integers(1, nodes))))
        label = list(range(nodes))
        for _ in range(nodes):
            for a, b in zip(source, target, strict=True):
                label[a] = label[b] = min(label[a], label[b])
        found = engine.components(engine.xp.asarray(source), engine.xp.asarray(target), nodes)
        assert on_host(engine, found).tolist() == label

    def test_nodes_without_edges_are_components_of_their_own(self, engine):
        nothing = engine.xp.asarray(np.empty(0, np.int64))
        assert on_host(engine, engine.components(nothing, nothing, 3)).tolist() == [0, 1, 2]
        assert on_host(engine, engine.components(nothing, nothing, 0)).tolist() == []

    @pytest.mark.parametrize("seed", SEEDS)
    def test_pagerank_is_where_a_bored_surfer_is_found(self, engine, seed):
        pairs = random_pairs(seed, 12, 30)
        weights = np.random.default_rng(seed).lognormal(0, 1, len(pairs)).tolist()
        found = scores(engine, engine.pagerank(edges_of(engine, pairs, weights)), "node")
        nodes = sorted({node for pair in pairs for node in pair})
        move = np.zeros((len(nodes), len(nodes)))
        for (source, target), weight in zip(pairs, weights, strict=True):
            move[nodes.index(source), nodes.index(target)] = weight
        leaves = move.sum(axis=1, keepdims=True)
        move = np.where(leaves > 0, move / np.where(leaves > 0, leaves, 1), 1 / len(nodes))
        rank = np.full(len(nodes), 1 / len(nodes))
        for _ in range(300):
            rank = 0.85 * rank @ move + 0.15 / len(nodes)
        assert list(found) == nodes
        assert sum(found.values()) == pytest.approx(1, abs=1e-8)
        np.testing.assert_allclose(list(found.values()), rank, atol=1e-8)

    @pytest.mark.parametrize("seed", SEEDS)
    def test_betweenness_is_the_share_of_shortest_paths_through_a_node(self, engine, seed):
        pairs = random_pairs(seed, 10, 25)
        nodes, reach = shortest(pairs)
        found = scores(engine, engine.betweenness(edges_of(engine, pairs)), "node")
        assert list(found) == nodes
        for node in nodes:
            others = itertools.permutations([each for each in nodes if each != node], 2)
            through = sum(share_through(reach, start, end, node, node) for start, end in others)
            wanted = through / ((len(nodes) - 1) * (len(nodes) - 2))
            assert found[node] == pytest.approx(wanted, rel=RELATIVE, abs=1e-7)

    @pytest.mark.parametrize("seed", SEEDS)
    def test_edge_betweenness_is_the_share_of_shortest_paths_that_take_an_edge(self, engine, seed):
        pairs = random_pairs(seed, 10, 25)
        nodes, reach = shortest(pairs)
        found = scores(engine, engine.edge_betweenness(edges_of(engine, pairs)), "source", "target")
        assert set(found) == set(pairs)
        for pair in pairs:
            taken = sum(share_through(reach, start, end, *pair) for start, end in itertools.permutations(nodes, 2))
            wanted = taken / (len(nodes) * (len(nodes) - 1))
            assert found[pair] == pytest.approx(wanted, rel=RELATIVE, abs=1e-7)

    def test_the_middle_of_a_chain_lies_between_its_ends(self, engine):
        chain = edges_of(engine, [(5, 7), (7, 9)])
        assert scores(engine, engine.betweenness(chain), "node") == pytest.approx({5: 0, 7: 0.5, 9: 0})
        wanted = {(5, 7): 1 / 3, (7, 9): 1 / 3}
        assert scores(engine, engine.edge_betweenness(chain), "source", "target") == pytest.approx(wanted)

    def test_of_two_nodes_none_lies_between(self, engine):
        pair = edges_of(engine, [(0, 1)])
        assert scores(engine, engine.betweenness(pair), "node") == {0: 0, 1: 0}
        assert scores(engine, engine.edge_betweenness(pair), "source", "target") == {(0, 1): pytest.approx(0.5)}

    def test_louvain_parts_two_cliques_that_one_edge_joins(self, engine):
        first, second = (list(itertools.combinations(range(at, at + 6), 2)) for at in (0, 10))
        found, modularity = engine.louvain(edges_of(engine, [*first, *second, (5, 10)]))
        host = engine.host(found)
        assert host["node"].tolist() == [*range(6), *range(10, 16)]
        groups = host.groupby("community")["node"].agg(list)
        assert sorted(groups) == [list(range(6)), list(range(10, 16))]
        assert modularity == pytest.approx(30 / 31 - 0.5, rel=RELATIVE)

    def test_louvain_goes_by_weights(self, engine):
        ring, weights = [(0, 1), (1, 2), (2, 3), (0, 3)], [10.0, 0.1, 10.0, 0.1]
        found, modularity = engine.louvain(edges_of(engine, ring, weights))
        community = engine.host(found)["community"].tolist()
        assert (community[0], community[2]) == (community[1], community[3])
        assert community[0] != community[2]
        assert modularity == pytest.approx(20 / 20.2 - 0.5, rel=RELATIVE)

    @pytest.mark.parametrize("seed", SEEDS)
    def test_louvain_tells_the_modularity_of_what_it_found_and_twice_the_same(self, engine, seed):
        pairs = sorted({(min(pair), max(pair)) for pair in random_pairs(seed, 30, 60)})
        weights = np.random.default_rng(seed).random(len(pairs)).tolist()
        edges = edges_of(engine, pairs, weights)
        found, modularity = engine.louvain(edges)
        host = engine.host(found)
        group = dict(zip(host["node"].tolist(), host["community"].tolist(), strict=True))
        inside = sum(weight for (a, b), weight in zip(pairs, weights, strict=True) if group[a] == group[b])
        degrees = dict.fromkeys(group.values(), 0.0)
        for (a, b), weight in zip(pairs, weights, strict=True):
            degrees[group[a]] += weight
            degrees[group[b]] += weight
        total = sum(weights)
        wanted = inside / total - sum((degree / (2 * total)) ** 2 for degree in degrees.values())
        assert modularity == pytest.approx(wanted, rel=RELATIVE)
        assert engine.louvain(edges)[1] == pytest.approx(modularity, rel=RELATIVE)

    def test_a_graph_without_edges_has_no_scores(self, engine):
        nothing = engine.frame(NO_EDGES)
        for verb in (engine.pagerank, engine.betweenness):
            found = engine.host(verb(nothing))
            assert (len(found), list(found.columns)) == (0, ["node", "score"])
        found = engine.host(engine.edge_betweenness(nothing))
        assert (len(found), list(found.columns)) == (0, ["source", "target", "score"])
        communities, modularity = engine.louvain(nothing)
        assert (len(communities), list(communities.columns), modularity) == (0, ["node", "community"], 0.0)

    def test_an_error_of_another_kind_is_no_want_of_memory(self, engine):
        assert not engine.is_out_of_memory(ValueError("no such column"))
