from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, closing
from typing import TYPE_CHECKING

import pytest

from lltm_ray.errors import DeadlineError, EngineExitedError, EngineNotReadyError, UpstreamError
from lltm_ray.llamacpp.client import AsyncLlamaClient, LlamaClient
from lltm_ray.llamacpp.options import read_options
from lltm_ray.llamacpp.replies import Health, HealthStatus, TokenPiece
from lltm_ray.records import FinishReason, StreamEvent

if TYPE_CHECKING:
    from conftest import Face, Faces, RunningServer, Spawn

USER = [{"role": "user", "content": "hi"}]
LONG = {"n_predict": 30_000, "ignore_eos": True}


@pytest.fixture
def ask(faces: Faces, server: RunningServer) -> Face:
    return faces(**server.credentials)


async def wait_until_idle(server: RunningServer) -> None:
    """No slot works any more, long before a long answer would end by itself."""
    started = time.perf_counter()
    async with AsyncLlamaClient(**server.credentials) as client:
        while any(slot.is_processing for slot in await client.slots()):
            assert time.perf_counter() - started < 15, "a slot still works"
            await asyncio.sleep(0.01)


async def wait_until_working(server: RunningServer) -> None:
    async with asyncio.timeout(60), AsyncLlamaClient(**server.credentials) as client:
        while not any(slot.is_processing for slot in await client.slots()):
            await asyncio.sleep(0.01)


# --- every route ---


async def test_health_says_ok(ask: Face) -> None:
    assert await ask("health") == Health(status=HealthStatus.OK, http_status=200)


async def test_a_chat_brings_text_logprobs_usage_and_the_times_seen_by_the_client(ask: Face) -> None:
    await ask("chat", USER, max_tokens=1)
    found = await ask("chat", USER, max_tokens=12, logprobs=True, top_logprobs=3, seed=1)
    assert found.text
    assert found.finish_reason == FinishReason.LENGTH
    assert "".join(entry.token for entry in found.logprobs) == found.text
    assert all(len(entry.top) == 3 and entry.logprob <= 0 and entry.bytes for entry in found.logprobs)
    assert found.usage.output_tokens == found.timings.predicted_n == 12
    assert found.usage.input_tokens == found.timings.cache_n + found.timings.prompt_n
    assert found.usage.cached_tokens == found.timings.cache_n > 0
    assert 0 < found.timings.queue_s <= found.timings.ttft_s <= found.timings.total_s < 30
    assert found.id
    assert found.model


async def test_a_chat_stream_is_its_chat_in_pieces(ask: Face) -> None:
    settings = {"max_tokens": 20, "seed": 3, "temperature": 0}
    events: list[StreamEvent] = await ask("chat_stream", USER, **settings)
    assert len(events) > 10
    assert "".join(event.text for event in events) == (await ask("chat", USER, **settings)).text
    assert [event for event in events if event.finish_reason] == events[-1:]
    assert events[-1].usage is not None
    assert events[-1].usage.output_tokens == 20


async def test_what_a_server_says_of_its_defaults_is_no_mistake_as_options(ask: Face) -> None:
    params = (await ask("props"))["default_generation_settings"]["params"]
    assert {"reasoning_in_content", "speculative.types", "temperature", "max_tokens"} <= params.keys()
    assert read_options("/completion", params).keys() == {name for name in params if params[name] is not None}
    given = {name: value for name, value in params.items() if name not in ("max_tokens", "n_predict")}
    assert (await ask("complete", "hello", **given, max_tokens=3)).usage.output_tokens == 3


async def test_a_native_completion_brings_tokens_probabilities_and_its_slot(ask: Face) -> None:
    found = await ask("complete", "hello", max_tokens=6, n_probs=2, return_tokens=True, id_slot=2)
    assert (len(found.tokens), found.usage.output_tokens, found.slot_id) == (6, 6, 2)
    assert tuple(entry.id for entry in found.logprobs) == found.tokens
    assert await ask("detokenize", found.tokens) == found.text


async def test_prompts_may_be_text_ids_or_both(ask: Face) -> None:
    ids = list(await ask("tokenize", "hello", add_special=True))
    for prompt in ("hello", ids, [*ids[:1], "hello"]):
        found = await ask("complete", prompt, max_tokens=4, temperature=0, cache_prompt=False)
        assert found.usage.input_tokens == len(ids)


async def test_a_stop_word_ends_with_stop(ask: Face) -> None:
    found = await ask("complete", "x", grammar='root ::= "abcdef"', stop=["c"], max_tokens=50)
    assert (found.text, found.finish_reason) == ("ab", FinishReason.STOP)


async def test_a_completion_stream_reports_progress_without_inventing_tokens(ask: Face) -> None:
    events = await ask("complete_stream", "y" * 700, max_tokens=3, return_progress=True, cache_prompt=False)
    assert sum(len(event.tokens) for event in events) == 3


async def test_openai_completions_read_like_chats(ask: Face) -> None:
    found = await ask("completions", "hello", max_tokens=5, logprobs=2)
    assert (found.usage.output_tokens, found.finish_reason, len(found.logprobs)) == (5, FinishReason.LENGTH, 5)


async def test_responses_and_messages_read_like_chats(ask: Face) -> None:
    response = await ask("responses", "hi", max_output_tokens=5)
    message = await ask("messages", USER, max_tokens=5)
    assert message.finish_reason == FinishReason.LENGTH
    for found in (response, message):
        assert (len(found.text), found.usage.output_tokens) == (5, 5)
        assert found.usage.input_tokens == response.usage.input_tokens > 5
        assert found.id
        assert found.timings.queue_s <= found.timings.ttft_s <= found.timings.total_s
    assert len(await ask("messages_stream", USER, max_tokens=5)) == 6


async def test_infill_of_a_model_without_its_tokens_is_the_servers_own_error(ask: Face) -> None:
    with pytest.raises(UpstreamError, match="Infill is not supported") as caught:
        await ask("infill", "a", "b", max_tokens=2)
    assert caught.value.http_status == 501


async def test_tokens_and_text_convert_both_ways(ask: Face) -> None:
    text = "grüße {x} \n"
    ids = await ask("tokenize", text)
    pieces = await ask("tokenize", text, with_pieces=True)
    assert tuple(piece.id for piece in pieces) == ids
    assert all(isinstance(piece, TokenPiece) for piece in pieces)
    assert b"".join(piece.piece for piece in pieces).decode().strip() == text.strip()
    assert (await ask("detokenize", ids)).strip() == text.strip()
    assert len(await ask("tokenize", text, add_special=True)) == len(ids) + 1


async def test_the_template_makes_a_prompt(ask: Face) -> None:
    assert "<|user|>hi" in await ask("apply_template", USER)


async def test_props_metrics_and_models_are_read(ask: Face) -> None:
    props = await ask("props")
    assert props["total_slots"] == 4
    assert await ask("set_props", anything=1) is None
    assert "llamacpp:tokens_predicted_total" in await ask("metrics")
    (model,) = await ask("models")
    assert model["meta"]["n_ctx_train"] == 32_768


async def test_a_slot_is_saved_restored_and_erased(ask: Face, server: RunningServer) -> None:
    await ask("complete", "remember me", max_tokens=4, id_slot=3)
    saved = await ask("slot_save", 3, "slot.bin")
    assert saved.size_bytes == (server.slot_dir / "slot.bin").stat().st_size
    erased = await ask("slot_erase", 3)
    restored = await ask("slot_restore", 3, "slot.bin")
    assert (saved.slot_id, saved.tokens, saved.filename) == (3, restored.tokens, "slot.bin")
    assert erased.tokens == saved.tokens > 0
    assert restored.size_bytes == saved.size_bytes
    assert (await ask("complete", "remember me", max_tokens=1, id_slot=3)).usage.cached_tokens > 5
    with pytest.raises(UpstreamError):
        await ask("slot_restore", 3, "absent.bin")


async def test_lora_adapters_may_be_none(ask: Face) -> None:
    assert await ask("lora_adapters") == ()
    assert await ask("set_lora_adapters", {}) is None


@pytest.mark.parametrize("name", ["model_load", "model_unload"])
async def test_a_server_of_one_model_refuses_to_load_another(ask: Face, name: str) -> None:
    with pytest.raises(UpstreamError) as caught:
        await ask(name, "other")
    assert caught.value.http_status == 404


async def test_embeddings_come_alike_in_both_encodings(faces: Faces, embedding_server: RunningServer) -> None:
    ask = faces(**embedding_server.credentials)
    plain = await ask("embed", ["one", "two", "one"])
    coded = await ask("embed", ["one", "two", "one"], encoding_format="base64")
    assert [len(vector) for vector in plain.vectors] == [64] * 3
    assert plain.vectors[0] == pytest.approx(plain.vectors[2], abs=1e-5)
    assert plain.vectors[0] != pytest.approx(plain.vectors[1], abs=1e-2)
    for left, right in zip(plain.vectors, coded.vectors, strict=True):
        assert left == pytest.approx(right, abs=1e-5)
    assert plain.usage.input_tokens > 3
    assert len((await ask("embed", "one")).vectors) == 1


async def test_documents_are_ranked_best_first(faces: Faces, rerank_server: RunningServer) -> None:
    ask = faces(**rerank_server.credentials)
    hits = await ask("rerank", "query", ["a", "bb", "ccc"])
    assert sorted(hit.index for hit in hits) == [0, 1, 2]
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
    best = await ask("rerank", "query", ["a", "bb", "ccc"], top_n=2)
    assert [hit.index for hit in best] == [hit.index for hit in hits[:2]]


# --- many requests ---


async def test_two_hundred_requests_in_a_row_outlive_the_servers_connections(ask: Face) -> None:
    for turn in range(200):
        if turn % 4:
            assert await ask("tokenize", "a")
        else:
            assert (await ask("complete", "a", max_tokens=1)).usage.output_tokens == 1


async def test_sixteen_streams_at_once_all_arrive_whole(server: RunningServer) -> None:
    async def count(client: AsyncLlamaClient, turn: int) -> int:
        events = [event async for event in client.complete_stream(f"n {turn}", max_tokens=40, return_tokens=True)]
        assert events[-1].finish_reason == FinishReason.LENGTH
        return sum(len(event.tokens) for event in events)

    async with AsyncLlamaClient(**server.credentials) as client:
        assert await asyncio.gather(*(count(client, turn) for turn in range(16))) == [40] * 16


async def test_more_requests_than_connections_wait_for_one(server: RunningServer) -> None:
    async with AsyncLlamaClient(**server.credentials, max_connections=2) as client:
        found = await asyncio.gather(*(client.complete("a", max_tokens=3) for _ in range(8)))
    assert [completion.usage.output_tokens for completion in found] == [3] * 8


def test_threads_may_share_one_client(server: RunningServer) -> None:
    with LlamaClient(**server.credentials) as client, ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda turn: client.complete(f"t {turn}", max_tokens=5), range(40)))
    assert [completion.usage.output_tokens for completion in found] == [5] * 40


# --- going away ---


async def test_leaving_an_async_stream_frees_its_slot(server: RunningServer) -> None:
    async with AsyncLlamaClient(**server.credentials) as client:
        async for _ in client.complete_stream("a", **LONG):
            await wait_until_working(server)
            break
        await wait_until_idle(server)
        async with aclosing(client.chat_stream(USER, **LONG)) as events:
            await anext(events)
            await wait_until_working(server)
        await wait_until_idle(server)


async def test_leaving_a_blocking_stream_frees_its_slot(server: RunningServer) -> None:
    with LlamaClient(**server.credentials) as client:
        for _ in client.complete_stream("a", **LONG):
            await wait_until_working(server)
            break
        await wait_until_idle(server)
        with closing(client.chat_stream(USER, **LONG)) as events:
            next(events)
            await wait_until_working(server)
        await wait_until_idle(server)


@pytest.mark.parametrize("name", ["complete", "responses", "messages"])
async def test_cancelling_a_task_frees_its_slot(server: RunningServer, name: str) -> None:
    prompt = USER if name == "messages" else "a"
    limit = {"max_output_tokens" if name == "responses" else "max_tokens": 30_000}
    async with AsyncLlamaClient(**server.credentials) as client:
        task = asyncio.create_task(getattr(client, name)(prompt, ignore_eos=True, **limit))
        await wait_until_working(server)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await wait_until_idle(server)


async def test_out_of_time_is_a_deadline_error_and_frees_the_slot(faces: Faces, server: RunningServer) -> None:
    ask = faces(**server.credentials, timeout_s=0.3)
    with pytest.raises(DeadlineError, match="/completion"):
        await ask("complete", "a", **LONG)
    await wait_until_idle(server)


async def test_no_idle_slot_is_an_error_only_where_asked(ask: Face, server: RunningServer) -> None:
    async with AsyncLlamaClient(**server.credentials) as client:
        streams = [client.complete_stream("a", **LONG) for _ in range(4)]
        for stream in streams:
            await anext(stream)
        slots = await ask("slots")
        assert all(slot.is_processing and slot.task_id is not None for slot in slots)
        assert any(slot.decoded_tokens for slot in slots)
        with pytest.raises(UpstreamError) as caught:
            await ask("slots", fail_on_no_slot=True)
        assert caught.value.http_status == 503
        for stream in streams:
            await stream.aclose()
    await wait_until_idle(server)
    assert len(await ask("slots", fail_on_no_slot=True)) == 4


# --- faults of a real server ---


async def test_the_servers_refusals_are_passed_on_unchanged(faces: Faces, server: RunningServer) -> None:
    for name, args in (("props", ()), ("chat", (USER,)), ("tokenize", ("a",))):
        with pytest.raises(UpstreamError) as caught:
            await faces(url=server.url, api_key="wrong")(name, *args)
        assert caught.value.http_status == 401
        assert caught.value.body == ('{"error":{"message":"Invalid API Key","type":"authentication_error","code":401}}')
    with pytest.raises(UpstreamError, match="exceed_context_size_error") as caught:
        await faces(**server.credentials)("complete", "a" * 40_000)
    assert caught.value.http_status == 400


async def test_a_server_killed_in_mid_stream_has_exited_and_then_is_not_ready(
    faces: Faces, spawn_server: Spawn
) -> None:
    victim = spawn_server(n_ctx=32_768, n_parallel=1)
    ask = faces(**victim.credentials)
    running = asyncio.create_task(ask("complete", "a", **LONG))
    await wait_until_working(victim)
    victim.process.kill()
    with pytest.raises(EngineExitedError):
        await running
    victim.process.wait()
    for name, args in (("health", ()), ("complete", ("a",))):
        with pytest.raises(EngineNotReadyError, match="not listening at http://127"):
            await ask(name, *args)


async def test_proxies_of_the_environment_are_not_used(ask: Face, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    assert (await ask("health")).http_status == 200
