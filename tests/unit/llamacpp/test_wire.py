from __future__ import annotations

import base64
import inspect
import json
import math
import pickle
import struct
from typing import Any

import pytest

from lltm_ray.errors import ConfigError, EngineExitedError, EngineNotReadyError, UpstreamError
from lltm_ray.llamacpp import wire
from lltm_ray.llamacpp.client import AsyncLlamaClient, LlamaClient
from lltm_ray.llamacpp.replies import HealthStatus, Reply, TokenPiece
from lltm_ray.records import SlotState

USER = {"role": "user", "content": "hi"}


def answer(call: wire.Call[Any], body: Any, status: int = 200) -> Any:
    return call.read(Reply(status, json.dumps(body).encode()))


# --- bodies ---


def test_a_chat_asks_for_a_stream_with_usage_and_keeps_unknown_parameters() -> None:
    call = wire.chat([USER], stream=False, top_k=5, seed=None, stream_options={"x": 1})
    options = {"x": 1, "include_usage": True}
    assert call.body == {"messages": [USER], "stream": True, "stream_options": options, "top_k": 5}


def test_max_tokens_is_sent_as_n_predict() -> None:
    assert wire.complete("hi", max_tokens=7).body == {"prompt": "hi", "n_predict": 7, "stream": True}
    assert wire.complete("hi", max_tokens=None, n_predict=3).body["n_predict"] == 3
    with pytest.raises(ConfigError, match="max_tokens=7"):
        wire.complete("hi", max_tokens=7, n_predict=3)


@pytest.mark.parametrize("prompt", ["", "hi", [1, 2], [1, "hi", 2], ["hi"], {"prompt_string": "hi"}])
def test_one_prompt_of_any_kind_is_sent_as_it_is(prompt: Any) -> None:
    assert wire.complete(prompt).body["prompt"] == prompt


@pytest.mark.parametrize("prompt", [None, [], ["a", "b"], [[1], [2]], [1, None], [True], b"hi", 5, USER, {}])
def test_what_is_not_one_prompt_is_refused(prompt: Any) -> None:
    with pytest.raises(ConfigError, match="prompt"):
        wire.complete(prompt)


@pytest.mark.parametrize(
    ("messages", "field"),
    [
        ([], "messages"),
        (b"hi", "messages"),
        (7, "messages"),
        (USER, "messages"),
        ([USER, "hi"], "messages[1]"),
        ([USER, {"content": "hi"}], "messages[1].role"),
        ([{"role": ""}], "messages[0].role"),
    ],
)
@pytest.mark.parametrize("route", [wire.chat, wire.messages, wire.apply_template])
def test_wrong_messages_are_refused_with_their_index(route: Any, messages: Any, field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        route(messages)
    assert caught.value.field == field


@pytest.mark.parametrize("route", [wire.chat, wire.messages, wire.apply_template])
def test_a_text_is_one_message_of_the_user(route: Any) -> None:
    assert route("hi").body["messages"] == [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize("route", [wire.chat, wire.messages, wire.apply_template])
@pytest.mark.parametrize("blank", ["", " \n"])
def test_a_blank_text_is_no_message(route: Any, blank: str) -> None:
    with pytest.raises(ConfigError, match=r"^messages='.*': is blank: give a text"):
        route(blank)


def test_what_are_no_messages_is_refused_with_its_type_and_the_remedy() -> None:
    with pytest.raises(ConfigError, match="messages=7: is of type int: give a text, or a list of at least one message"):
        wire.chat(7)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["n", "n_cmpl"])
def test_more_than_one_answer_a_call_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="one answer"):
        wire.chat([USER], **{name: 2})
    assert wire.chat([USER], **{name: 1}).body[name] == 1


@pytest.mark.parametrize("value", [object(), math.nan, {1, 2}])
def test_what_json_cannot_say_is_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match="JSON"):
        wire.encode(wire.chat([USER], metadata=value).body)


# --- answers ---


def test_base64_and_plain_embeddings_read_the_same_in_input_order() -> None:
    vectors = [(0.5, -2.0), (1.0, 0.25)]
    coded = [base64.b64encode(struct.pack("<2f", *vector)).decode() for vector in vectors]
    for sent in (vectors, coded):
        data = [{"index": index, "embedding": item} for index, item in enumerate(sent)]
        found = answer(wire.embed(["a", "b"]), {"data": data[::-1], "model": "tiny", "usage": {"prompt_tokens": 7}})
        assert found.vectors == tuple(vectors)
        assert (found.model, found.usage.input_tokens) == ("tiny", 7)


def test_rerank_hits_come_best_first() -> None:
    results = [{"index": 0, "relevance_score": -1}, {"index": 2, "relevance_score": 3.5}]
    hits = answer(wire.rerank("q", ["a", "b", "c"], 2), {"results": results})
    assert [(hit.index, hit.score) for hit in hits] == [(2, 3.5), (0, -1.0)]


def test_a_loading_server_is_a_health_and_not_an_error() -> None:
    health = answer(wire.health(), {"error": {"message": "Loading model"}}, 503)
    assert (health.status, health.http_status) == (HealthStatus.LOADING, 503)
    assert answer(wire.health(), {"status": "ok"}).status == HealthStatus.OK
    with pytest.raises(UpstreamError):
        answer(wire.health(), {}, 401)


def test_an_error_status_keeps_its_body() -> None:
    body = '{"error": {"code": 400, "message": "ü"}}\n'
    with pytest.raises(UpstreamError) as caught:
        wire.props().read(Reply(400, body.encode()))
    assert (caught.value.http_status, caught.value.body) == (400, body)


def test_a_prompt_that_is_too_long_is_told_with_its_tokens_the_slots_and_the_remedy() -> None:
    numbers = {"n_prompt_tokens": 20024, "n_ctx": 2048}
    told = {"code": 400, "message": "request (20024 tokens) ...", "type": "exceed_context_size_error"}
    reply = Reply(400, json.dumps({"error": told | numbers}).encode())
    for error in (wire.refusal(reply), pickle.loads(pickle.dumps(wire.refusal(reply)))):
        assert str(error) == (
            "llama-server answered 400 (exceed_context_size_error): the prompt's 20,024 tokens do not fit a slot's "
            "context of 2,048: shorten it, raise n_ctx, or lower n_parallel"
        )
        assert (error.http_status, error.body) == (400, reply.text)
    with pytest.raises(UpstreamError, match="a slot's context of 2,048"):
        wire.props().read(reply)


@pytest.mark.parametrize("error", [{"type": "exceed_context_size_error", "n_ctx": 5}, ["exceed_context_size_error"]])
def test_an_error_that_tells_no_numbers_is_told_as_it_came(error: Any) -> None:
    reply = Reply(400, json.dumps({"error": error}).encode())
    assert str(wire.refusal(reply)) == f"llama-server answered 400: {reply.text}"


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ('{"error": {"code": 400, "message": "no \\"x\\"", "type": "t"}}', 'no "x"'),
        ('{"code": 400, "message": "in mid-stream"}', "in mid-stream"),
        ('{"error": "a word"}', "a word"),
        (r'{"error": {"message": "a\u001b[2Jb\u009bc\n"}}', "a[2Jbc\n"),
        ('{"error": {"message": ""}}', '{"error": {"message": ""}}'),
        ('{"error": {"message": 5}}', '{"error": {"message": 5}}'),
        ("<html>", "<html>"),
        ("<html>\x1b[2Ja\tb\n", "<html>[2Ja\tb\n"),
        ('{"error": {"message": 5}}\x9b', '{"error": {"message": 5}}'),
        ('{"error": {"message": 5, "x": "\x7f"}}', '{"error": {"message": 5, "x": ""}}'),
        ("", ""),
        ("[" * 100_000, "[" * 2000),
    ],
)
def test_an_error_tells_the_servers_message_and_of_other_bodies_all(body: str, told: str) -> None:
    error = wire.refusal(Reply(400, body.encode()))
    assert (str(error), error.body) == (f"llama-server answered 400: {told}", body)


def test_errors_of_a_server_without_a_name_are_sentences() -> None:
    assert str(EngineNotReadyError("", "not listening at x")) == "llama-server is not listening at x"
    assert str(EngineExitedError("")) == "llama-server ended, or the connection to it broke"
    assert str(EngineExitedError("engine-0", -9)) == "engine engine-0 ended (exit code -9)"


@pytest.mark.parametrize("body", [b"", b"null", b"[]", b'{"x": 1}', b'{"data": 5}', b"<html>"])
@pytest.mark.parametrize(
    "call", [wire.embed("a"), wire.rerank("q", ["a"]), wire.detokenize([1]), wire.slot_erase(0), wire.model_load("m")]
)
def test_an_answer_of_the_wrong_shape_is_an_upstream_error(call: wire.Call[Any], body: bytes) -> None:
    with pytest.raises(UpstreamError):
        call.read(Reply(200, body))


def test_a_half_float_in_base64_is_an_upstream_error() -> None:
    with pytest.raises(UpstreamError):
        answer(wire.embed("a"), {"data": [{"index": 0, "embedding": "AAAAAAA="}]})


def test_slots_read_in_the_new_form_the_old_one_and_untouched() -> None:
    busy = {"id": 1, "is_processing": True, "n_ctx": 64, "id_task": 9, "n_prompt_tokens": 5}
    idle = {"id": 0, "is_processing": False, "n_ctx": 64}
    expected = SlotState(id=1, is_processing=True, n_ctx=64, task_id=9, prompt_tokens=5, decoded_tokens=3)
    for following in ([{"n_decoded": 3}], {"n_decoded": 3}):
        found = answer(wire.slots(), [busy | {"next_token": following}, idle])
        assert found == (expected, SlotState(id=0, is_processing=False, n_ctx=64))


def test_pieces_that_are_not_text_keep_their_bytes() -> None:
    found = answer(
        wire.tokenize("é", with_pieces=True), {"tokens": [{"id": 1, "piece": "h"}, {"id": 2, "piece": [195]}]}
    )
    assert found == (TokenPiece(id=1, piece=b"h"), TokenPiece(id=2, piece=b"\xc3"))


def test_lora_adapters_are_read_and_written_by_id() -> None:
    assert wire.set_lora_adapters({0: 0.5, 2: 1}).body == [{"id": 0, "scale": 0.5}, {"id": 2, "scale": 1}]
    (adapter,) = answer(wire.lora_adapters(), [{"id": 0, "path": "a.gguf", "scale": 1}])
    assert (adapter.id, adapter.path, adapter.scale) == (0, "a.gguf", 1.0)


def test_models_are_loaded_and_unloaded_by_name() -> None:
    assert (wire.model_load("m").path, wire.model_unload("m").path) == ("/models/load", "/models/unload")
    assert answer(wire.model_load("m"), {"success": True}) is None
    with pytest.raises(UpstreamError):
        answer(wire.model_unload("m"), {"success": False})


# --- the faces' table ---


def test_both_faces_have_every_route_with_its_arguments() -> None:
    sync, later = LlamaClient("http://127.0.0.1:1"), AsyncLlamaClient("http://127.0.0.1:1")
    routes = {name: route for name, route in vars(wire).items() if inspect.isfunction(route)}
    built = {name for name, route in routes.items() if "Call[" in str(route.__annotations__.get("return"))}
    streamed = {"chat", "complete", "completions", "infill", "responses", "messages"}
    for name in (name for name in built | streamed if not name.startswith("_")):
        for face in (sync, later):
            for method in [name, f"{name}_stream"] if name in streamed else [name]:
                assert inspect.signature(getattr(face, method)) == inspect.signature(routes[name])
    assert len(built) >= 18
    sync.close()


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"url": "127.0.0.1:80"}, "url"),
        ({"url": "ftp://x"}, "url"),
        ({"url": "http://"}, "url"),
        ({"timeout_s": 0}, "timeout_s"),
        ({"connect_timeout_s": -1}, "connect_timeout_s"),
        ({"max_connections": 0}, "max_connections"),
        ({"api_key": "a\r\nb"}, "api_key"),
    ],
)
@pytest.mark.parametrize("face", [LlamaClient, AsyncLlamaClient])
def test_a_wrong_setting_is_refused_by_name(face: Any, settings: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        face(**{"url": "http://127.0.0.1:1"} | settings)
    assert caught.value.field == field


def test_the_key_is_not_shown() -> None:
    assert "s3cret" not in repr(AsyncLlamaClient("http://127.0.0.1:1", api_key="s3cret"))
