"""Searches and clusters against brute force on random vectors."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lltm_ray.errors import ConfigError
from lltm_ray.knowledge import pairs, search
from lltm_ray.knowledge.clusters import k_means
from lltm_ray.knowledge.pairs import similar_pairs
from lltm_ray.knowledge.scores import NumpyScorer
from lltm_ray.knowledge.search import VectorIndex


def filled(vectors):
    index = VectorIndex("m")
    index.add([str(number) for number in range(len(vectors))], vectors)
    return index


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), n=st.integers(1, 40), k=st.integers(1, 50))
def test_the_nearest_are_those_of_brute_force(seed, n, k):
    random = np.random.default_rng(seed)
    vectors = random.normal(size=(n, 6)) * random.uniform(0.1, 9, size=(n, 1))
    query = random.normal(size=6)
    cosine = [vector @ query / np.linalg.norm(vector) / np.linalg.norm(query) for vector in vectors]
    hits = filled(vectors).search(query, k)
    assert [hit.index for hit in hits] == sorted(range(n), key=lambda each: -cosine[each])[:k]
    assert [hit.score for hit in hits] == pytest.approx(sorted(cosine, reverse=True)[:k], abs=1e-5)
    assert [hit.text for hit in hits] == [str(hit.index) for hit in hits]


def test_equal_texts_come_in_the_order_in_which_they_were_added():
    index = filled(np.ones((5, 3)))
    assert [hit.index for hit in index.search([1, 1, 1], 5)] == [0, 1, 2, 3, 4]


def test_many_queries_in_blocks_answer_as_one_by_one(monkeypatch):
    random = np.random.default_rng(3)
    index, queries = filled(random.normal(size=(30, 8))), random.normal(size=(11, 8))
    one_by_one = [index.search(query, 4) for query in queries]
    monkeypatch.setattr(search, "_BLOCK_SCORES", 90)
    for together, alone in zip(index.search_all(queries, 4), one_by_one, strict=True):
        assert [hit.index for hit in together] == [hit.index for hit in alone]


def test_vectors_that_do_not_fit_are_refused_and_change_nothing():
    index = filled(np.eye(3))
    wrong = [[1, 2]], [[1, 2, 3]] * 2, [[1, np.nan, 3]], "text", [["1", "2", "3"]], [[1, 2, 3], [1]], [None]
    for texts, vectors in ((["x"], vectors) for vectors in wrong):
        with pytest.raises(ConfigError, match="vectors"):
            index.add(texts, vectors)
    with pytest.raises(ConfigError, match="vectors"):
        index.search([1, 2])
    with pytest.raises(ConfigError, match="k="):
        index.search([1, 2, 3], 0)
    assert len(index) == 3
    assert len(index.search([1, 0, 0], 9)) == 3


def test_only_vectors_that_were_added_set_the_length():
    index = VectorIndex()
    index.add([], np.zeros((0, 0)))
    assert index.search([1, 2]) == []
    with pytest.raises(ConfigError, match="vectors"):
        index.add(["x", "y"], [[1, 2, 3, 4]])
    with pytest.raises(ConfigError, match="texts"):
        index.add("x", [[1, 2, 3, 4]])
    index.add(["x"], [[1, 2, 3]])
    assert [hit.text for hit in index.search([1, 2, 3])] == ["x"]


def test_a_vector_of_zeros_is_similar_to_nothing():
    index = filled([[0, 0], [1, 0]])
    assert [hit.score for hit in index.search([1, 0])] == [1.0, 0.0]
    assert VectorIndex().search([1, 0]) == []


def test_an_index_comes_back_from_its_file(tmp_path):
    random = np.random.default_rng(5)
    index = VectorIndex("minilm")
    index.add(["naïve", "two\nlines", ""], random.normal(size=(3, 4)))
    index.add(["nul\0"], random.normal(size=(1, 4)))
    path = tmp_path / "index.npz"
    index.save(path)
    again = VectorIndex.load(path)
    assert (again.model, again.texts) == ("minilm", ["naïve", "two\nlines", "", "nul\0"])
    query = random.normal(size=4)
    assert [hit.index for hit in again.search(query)] == [hit.index for hit in index.search(query)]
    VectorIndex("empty").save(path)
    assert len(VectorIndex.load(path)) == 0
    assert list(tmp_path.iterdir()) == [path]


def test_one_long_text_does_not_make_the_others_long(tmp_path):
    index = VectorIndex()
    index.add(["x" * 100_000, *"abcdefgh"], np.eye(9))
    index.save(tmp_path / "index.npz")
    assert (tmp_path / "index.npz").stat().st_size < 110_000


@pytest.mark.parametrize("texts", [["x"], ["x", 3], "xy", {"x": 1, "y": 2}])
def test_texts_that_do_not_go_with_the_vectors_are_refused(tmp_path, texts):
    stored = np.frombuffer(json.dumps(texts).encode(), np.uint8)
    np.savez(tmp_path / "bad.npz", model=np.array("m"), texts=stored, vectors=np.eye(2))
    np.save(tmp_path / "bare.npy", np.eye(2))
    for name in ("bad.npz", "bare.npy"):
        with pytest.raises(ConfigError, match="no saved index"):
            VectorIndex.load(tmp_path / name)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 not really", b"\x80\x04pickle"])
def test_a_file_that_is_no_index_is_refused(tmp_path, content):
    path = tmp_path / "bad.npz"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="no saved index"):
        VectorIndex.load(path)


def test_clusters_find_directions_that_were_planted():
    random = np.random.default_rng(7)
    centers = np.eye(8)[:4] * 5
    truth = random.integers(0, 4, size=200)
    vectors = (centers[truth] + random.normal(scale=0.4, size=(200, 8))) * random.uniform(0.5, 2, size=(200, 1))
    found = k_means(vectors, 4)
    for cluster in range(4):
        assert len(set(truth[found.members(cluster)])) == 1
    sizes = np.bincount(found.labels)
    assert list(sizes) == sorted(sizes, reverse=True)
    assert (found.predict(vectors) == found.labels).all()
    assert np.linalg.norm(found.centers, axis=1) == pytest.approx(np.ones(4), abs=1e-5)
    assert found.similarity > 0.9


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), n=st.integers(1, 30), data=st.data())
def test_clusters_are_a_local_optimum_and_repeatable(seed, n, data):
    vectors = np.random.default_rng(seed).normal(size=(n, 5))
    k = data.draw(st.integers(1, n))
    found, again = k_means(vectors, k, seed=seed), k_means(vectors, k, seed=seed)
    assert (found.labels == again.labels).all()
    assert set(found.labels) <= set(range(k))
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    best = (unit @ found.centers.T).max(axis=1)
    assert found.similarity == pytest.approx(best.mean(), abs=1e-4)


def test_as_many_clusters_as_vectors_leave_each_alone():
    found = k_means(np.eye(6), 6)
    assert sorted(found.labels) == list(range(6))
    assert found.similarity == pytest.approx(1)


def test_equal_vectors_and_wrong_numbers_of_clusters():
    assert set(k_means(np.ones((5, 3)), 3).labels) == {0}
    for k in (0, 6):
        with pytest.raises(ConfigError, match="k="):
            k_means(np.ones((5, 3)), k)


def test_vectors_in_tiles_answer_as_all_at_once(monkeypatch):
    random = np.random.default_rng(4)
    index, queries = filled(random.normal(size=(30, 8)).round(1)), random.normal(size=(5, 8))
    whole = index.search_all(queries, 7)
    monkeypatch.setattr(search, "_BLOCK_SCORES", 4)
    assert [[hit.index for hit in hits] for hits in index.search_all(queries, 7)] == [
        [hit.index for hit in hits] for hits in whole
    ]


def test_a_product_of_ones_own_does_the_scoring(tmp_path):
    sizes = []

    def product(first, second):
        sizes.append((first.shape, second.shape))
        return np.einsum("ik,jk->ij", first, second)

    random = np.random.default_rng(5)
    vectors, query = random.normal(size=(20, 4)), random.normal(size=4)
    index = VectorIndex("m", scorer=NumpyScorer(product))
    index.add([str(number) for number in range(20)], vectors)
    assert [hit.index for hit in index.search(query, 3)] == [hit.index for hit in filled(vectors).search(query, 3)]
    assert sizes == [((1, 4), (20, 4))]
    index.save(tmp_path / "index")
    VectorIndex.load(tmp_path / "index", scorer=NumpyScorer(product)).search(query)
    assert len(sizes) == 2


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), n=st.integers(0, 40), threshold=st.floats(-1, 1), tile=st.integers(1, 50))
def test_similar_pairs_are_those_of_brute_force(seed, n, threshold, tile):
    vectors = np.random.default_rng(seed).normal(size=(n, 3))
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    cosine = {(i, j): unit[i] @ unit[j] for i in range(n) for j in range(i + 1, n)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pairs, "_TILE", tile)
        found = similar_pairs(vectors, threshold)
    got = list(zip(found.first.tolist(), found.second.tolist(), strict=True))
    assert len(set(got)) == len(got) == len(found)
    assert {pair for pair, score in cosine.items() if score > threshold + 1e-5} <= set(got)
    assert set(got) <= {pair for pair, score in cosine.items() if score > threshold - 1e-5}
    assert found.scores.tolist() == pytest.approx([cosine[pair] for pair in got], abs=1e-5)
    assert (np.diff(found.scores) <= 0).all()


def test_too_many_pairs_or_a_threshold_that_is_none_are_refused():
    with pytest.raises(ConfigError, match="more than 9 pairs; raise it"):
        similar_pairs(np.ones((5, 2)), 0.9, limit=9)
    assert len(similar_pairs(np.ones((5, 2)), 0.9, limit=10)) == 10
    for threshold in (1.1, float("nan")):
        with pytest.raises(ConfigError, match="threshold"):
            similar_pairs(np.ones((5, 2)), threshold)
