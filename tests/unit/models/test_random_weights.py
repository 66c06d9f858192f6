import threading

import pytest
import xllamacpp

from lltm_ray.errors import ConfigError
from lltm_ray.models.gguf import read_gguf
from lltm_ray.models.random_weights import RandomShape, ensure_random, write_random

PROMPTS = ["hello", "What is the capital of France?", "", "a", "héllo 世界 🎉\n\t", "the quick brown fox " * 20]


def answer(engine, prompt, **options):
    body = {"messages": [{"role": "user", "content": prompt}], "max_tokens": 64, "temperature": 0, **options}
    return engine.post("/v1/chat/completions", body)["choices"][0]


def test_the_same_shape_gives_the_same_bytes(tmp_path, tiny_path):
    write_random(tmp_path / "again.gguf")
    assert (tmp_path / "again.gguf").read_bytes() == tiny_path.read_bytes()
    write_random(tmp_path / "other.gguf", RandomShape(seed=1))
    assert (tmp_path / "other.gguf").read_bytes() != tiny_path.read_bytes()


def test_it_is_about_half_a_megabyte_and_says_what_it_is(tiny_path):
    info = read_gguf(tiny_path)
    assert 300_000 < info.file_bytes < 700_000
    assert (info.architecture, info.n_ctx_train, info.n_vocab) == ("llama", 8192, 354)
    assert "<|assistant|>" in info.chat_template


def test_it_is_made_once(tmp_path):
    path = ensure_random(tmp_path)
    made = path.stat().st_ino, path.stat().st_ctime_ns
    assert ensure_random(tmp_path) == path
    assert (path.stat().st_ino, path.stat().st_ctime_ns) == made
    assert path.stat().st_mode & 0o044 == 0o044


def test_a_damaged_file_is_made_anew(tmp_path):
    path = ensure_random(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[:1000])
    assert ensure_random(tmp_path).read_bytes() == whole


def test_many_makers_at_once_leave_one_whole_file(tmp_path):
    paths = []
    makers = [threading.Thread(target=lambda: paths.append(ensure_random(tmp_path))) for _ in range(4)]
    for maker in makers:
        maker.start()
    for maker in makers:
        maker.join()
    assert len(paths) == 4
    assert list((tmp_path / "models").iterdir()) == [paths[0]]
    assert read_gguf(paths[0]).tensors


@pytest.mark.parametrize(
    ("shape", "field"),
    [
        ({"architecture": "gpt2"}, "architecture"),
        ({"n_embd": 60, "n_head": 4, "n_head_kv": 3}, "n_embd"),
        ({"n_head": 4, "n_head_kv": 3}, "n_head"),
        ({"sliding_window": 128}, "sliding_window"),
        ({"architecture": "cohere2"}, "sliding_window"),
    ],
)
def test_a_shape_that_cannot_be_is_refused(shape, field):
    with pytest.raises(ConfigError) as caught:
        RandomShape(**shape)
    assert caught.value.field == field


def test_greedy_text_is_printable_varied_and_as_long_as_asked(tiny_engine):
    texts = []
    for prompt in PROMPTS:
        choice = answer(tiny_engine, prompt)
        text = choice["message"]["content"]
        assert choice["finish_reason"] == "length"
        assert text.isascii()
        assert text.isprintable()
        assert len(set(text)) >= 8
        texts.append(text)
    assert len(set(texts)) == len(PROMPTS)


def test_sampled_text_is_printable_too(tiny_engine):
    for seed in range(3):
        choice = answer(tiny_engine, "hello", temperature=1.0, seed=seed)
        assert choice["finish_reason"] == "length"
        assert choice["message"]["content"].isprintable()


def test_any_text_survives_tokens_and_back(tiny_engine):
    text = "tabs\tand\nlines, 日本語, emoji 🎉, control \x01\x7f, ¼½¾"
    tokens = tiny_engine.post("/tokenize", {"content": text})["tokens"]
    assert tiny_engine.post("/detokenize", {"tokens": tokens})["content"].strip() == text


def test_it_gives_embeddings_that_tell_texts_apart(start_engine, tiny_path):
    engine = start_engine(tiny_path, embedding=True, pooling_type=xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_MEAN)
    vectors = [
        engine.post("/v1/embeddings", {"input": text})["data"][0]["embedding"]
        for text in ("a cat", "a cat", "something else entirely")
    ]
    assert len(vectors[0]) == 64
    assert vectors[0] == pytest.approx(vectors[1], abs=1e-4)
    assert vectors[0] != pytest.approx(vectors[2], abs=1e-2)


def test_a_sliding_window_shape_serves(start_engine, windowed_path):
    text = answer(start_engine(windowed_path), "hello " * 100)["message"]["content"]
    assert len(text) > 8
