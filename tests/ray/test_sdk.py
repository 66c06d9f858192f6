"""The familiar calls on a real fleet: one that they start, and one that runs already."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import ray

import lltm_ray
from lltm_ray.errors import ConfigError, FleetError, LltmRayError, ModelNotFoundError, UpstreamError
from lltm_ray.llamacpp.client import LlamaClient
from lltm_ray.sdk.conversation import Conversation
from lltm_ray.sdk.embeddings import EmbeddingEngine, SemanticSearch
from lltm_ray.sdk.engine import InferenceEngine
from lltm_ray.sdk.extraction import KnowledgeExtractor
from tests.ray.conftest import HI


@pytest.fixture(scope="module")
def engine(ray_cluster):
    with InferenceEngine("familiar") as engine:
        assert engine.load_model("random", n_parallel=4, gpu_share=0.0)
        yield engine


def test_an_answer_has_its_figures(engine):
    result = engine.infer("hi", max_tokens=8, temperature=0)
    assert result.success, result.error_message
    assert (result.tokens_generated, result.finish_reason, result.engine) == (8, "length", "engine-0")
    assert result.prompt_tokens > 0
    assert 0 < result.ttft_ms < result.latency_ms
    assert result.tokens_per_sec > 0
    assert engine.chat([{"role": "user", "content": "hi"}], max_tokens=8, temperature=0).text == str(result)
    assert engine.generate("hi", max_tokens=2).tokens_generated == 2


def test_a_raw_prompt_goes_without_the_chat_template(engine):
    raw, chat = (engine.infer("hi", max_tokens=4, raw=raw) for raw in (True, False))
    assert raw.prompt_tokens < chat.prompt_tokens
    with pytest.raises(ConfigError, match="raw"):
        engine.infer([{"role": "user", "content": "hi"}], raw=True)


def test_a_stream_comes_in_pieces_and_can_be_left(engine):
    pieces, heard = [], []
    stream = engine.infer_stream("tell", heard.append, max_tokens=24, temperature=0)
    for piece in stream:
        pieces.append(piece)
        assert heard == pieces
    result = stream.result
    assert len(pieces) > 3
    assert "".join(pieces) == result.text == engine.infer("tell", max_tokens=24, temperature=0).text
    assert result.ttft_ms < result.latency_ms
    left = engine.infer_stream("tell", max_tokens=200)
    next(left)
    left.close()
    assert left.result.finish_reason is None


def test_a_batch_runs_on_all_slots_at_once_and_keeps_its_order(engine):
    prompts = ["word " * (1 + number) for number in range(8)]
    alone = [engine.infer(prompt, max_tokens=1).prompt_tokens for prompt in prompts]
    (server,) = engine.cluster.status().engines
    busy = []
    with ThreadPoolExecutor(1) as pool, LlamaClient(server.url, api_key=server.api_key) as client:
        batch = pool.submit(engine.batch_infer, prompts, max_tokens=250, ignore_eos=True)
        while not batch.done():
            busy.append(sum(slot.is_processing for slot in client.slots()))
    assert [result.prompt_tokens for result in batch.result()] == alone == sorted(set(alone))
    assert max(busy) > 1, "they ran one after another"


def test_a_refused_request_is_a_result_that_says_why(engine):
    before = engine.get_metrics()["throughput"]
    result = engine.infer("hi", response_format={"type": "nonsense"})
    assert not result.success
    assert "nonsense" in result.error_message
    with pytest.raises(UpstreamError, match="nonsense"):
        _ = result.text
    assert "nonsense" in str(result)
    stream = engine.infer_stream("hi", response_format={"type": "nonsense"})
    with pytest.raises(UpstreamError, match="nonsense"):
        list(stream)
    after = engine.get_metrics()["throughput"]
    assert after["failed_requests"] == before["failed_requests"] + 2


def test_a_misspelt_option_never_leaves_the_program(engine):
    before = engine.get_metrics()["throughput"]
    with pytest.raises(ConfigError, match=r"max_token=5.*did you mean max_tokens"):
        engine.cluster.chat("hi", max_token=5)
    with pytest.raises(ConfigError, match=r"temprature=0.*did you mean temperature"):
        engine.infer("hi", temprature=0)
    with pytest.raises(ConfigError, match="max_token=5"):
        ray.get(engine.cluster.engines[0].chat.remote("hi", max_token=5))
    with pytest.raises(ConfigError, match=r"timeout=3.*did you mean timeout_s"):
        ray.get(engine.cluster.engines[0].chat.remote("hi", timeout=3))
    with pytest.raises(ConfigError, match=r"extra_body\['messages'\]=\[\]: is set by the call itself"):
        engine.cluster.chat("hi", extra_body={"messages": []})
    assert engine.get_metrics()["throughput"] == before
    sent = engine.cluster.chat("hi", max_tokens=3, temperature=0, extra_body={"max_token": 50, "ignore_eos": True})
    assert sent.usage.output_tokens == 3


def test_a_value_that_means_nothing_never_leaves_the_program(engine):
    before = engine.get_metrics()["throughput"]
    for ask in (engine.infer, engine.cluster.chat, engine.cluster.complete):
        for name, value in (("max_tokens", "5"), ("top_p", 7), ("temperature", -1), ("n", 0)):
            with pytest.raises(ConfigError, match=f"^{name}={value!r}: must be "):
                ask("hi", **{name: value})
    with pytest.raises(ConfigError, match="top_p=7: must be from 0 to 1"):
        ray.get(engine.cluster.engines[0].chat.remote("hi", top_p=7))
    assert engine.get_metrics()["throughput"] == before


def test_another_model_than_those_that_are_served_is_refused_with_their_names(engine):
    for ask in (lambda: engine.infer("hi", model="nope"), lambda: list(engine.infer_stream("hi", model="nope"))):
        with pytest.raises(ModelNotFoundError, match="model 'nope' not found: this fleet serves random"):
            ask()
    assert engine.infer("hi", model="random", max_tokens=2).success


def test_a_prompt_that_is_too_long_is_told_with_the_slots_context_and_the_remedy(engine):
    told = rf"tokens do not fit a slot's context of {engine.slot_tokens:,}: .*raise n_ctx, or lower n_parallel$"
    text = "word " * engine.slot_tokens
    for raw in (False, True):
        with pytest.raises(UpstreamError, match=told):
            engine.infer(text, raw=raw).check()
    with pytest.raises(UpstreamError, match=told):
        next(engine.infer_stream(text))


def test_a_model_that_cannot_be_loaded_leaves_the_one_that_is(engine):
    before = engine.cluster
    for model, settings, words in (
        ("random", {"n_paralel": 2}, r"did you mean n_parallel\?"),
        ("randm", {}, "did you mean random"),
        ("/none/m.gguf", {}, "no such file"),
    ):
        with pytest.raises(LltmRayError, match=words):
            engine.load_model(model, **settings)
    assert engine.cluster is before
    assert engine.infer("hi", max_tokens=2).success


def test_metrics_count_every_request_until_they_are_reset(engine):
    engine.reset_metrics()
    assert engine.get_metrics()["throughput"]["total_requests"] == 0
    results = engine.batch_infer(["a", "b", "c"], max_tokens=5)
    summary = engine.get_metrics()
    assert summary["throughput"]["total_tokens"] == sum(result.tokens_generated for result in results) == 15
    assert summary["latency"]["sample_count"] == summary["ttft"]["sample_count"] == 3


def test_a_second_object_joins_the_fleet_that_runs_and_leaves_it_running(engine):
    with InferenceEngine("familiar") as other:
        assert not other.is_loaded
        with pytest.raises(FleetError, match="load_model"):
            other.infer("hi")
        with pytest.raises(ConfigError, match="serves random"):
            other.load_model("/models/another.gguf")
        other.load_model("random")
        assert other.infer("hi", max_tokens=2).success
    assert not other.is_loaded
    assert engine.infer("hi", max_tokens=2).success


def test_tokens_are_counted_as_the_server_counts_them(engine):
    for messages in ([{"role": "user", "content": "hi"}], [{"role": "system", "content": "Grüße, 漢字"}, *HI]):
        assert engine.count_tokens(messages) == engine.chat(messages, max_tokens=1).prompt_tokens
    assert engine.slot_tokens == engine.cluster.status().engines[0].n_ctx // 4


def test_noise_under_a_schema_is_readable_and_none_of_it_gets_into_the_graph(engine):
    texts = ["Ada Lovelace wrote notes on the Analytical Engine in London.", "Engine-3 was slow."]
    found = KnowledgeExtractor(engine.cluster).extract(texts, max_tokens=2048)
    assert found.entities == found.relations == ()
    assert found.left_out


def test_a_conversation_stays_within_its_limit_and_reuses_its_slot(engine):
    chat = Conversation(engine, system="You are terse.", limit_tokens=160)
    results = [chat.ask(f"question {number}", max_tokens=16, temperature=0) for number in range(6)]
    assert all(result.success for result in results)
    assert max(result.usage.total_tokens for result in results) <= 160
    assert results[1].usage.cached_tokens > 0
    assert chat.tokens > 160
    assert chat.ask_stream("more", max_tokens=4).result.success


def test_texts_are_embedded_and_found_and_the_fleet_that_it_started_ends_with_it(ray_cluster):
    with InferenceEngine("brief") as brief:
        brief.load_model("random", gpu_share=0.0, engine={"embeddings": True, "pooling": "mean"})
        vectors = EmbeddingEngine(brief)
        block = vectors.embed(["one text", "another", "one text"])
        assert block.shape[0] == 3
        assert (block[0] == block[2]).all()
        assert (block**2).sum(axis=1) == pytest.approx([1, 1, 1], abs=1e-3)
        search = SemanticSearch(vectors)
        search.add_documents(["one text", "another"])
        assert search.search("another", 1)[0].text == "another"
    with pytest.raises(FleetError, match="no fleet 'brief'"):
        lltm_ray.Cluster.connect("brief")
