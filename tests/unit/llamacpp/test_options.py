"""Names of request options: what is misspelt is refused, what is new or meant is passed on."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from openai.types import completion_create_params, embedding_create_params
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.responses import response_create_params

from lltm_ray import _watch
from lltm_ray.actors.calls import Calls
from lltm_ray.actors.engine import EngineActor
from lltm_ray.actors.fleet import Fleet
from lltm_ray.actors.observe import WatchedCalls
from lltm_ray.config import FleetConfig
from lltm_ray.errors import ConfigError
from lltm_ray.gateway.continuable import LIMITS
from lltm_ray.llamacpp import options, wire
from lltm_ray.llamacpp.client import AsyncLlamaClient, LlamaClient
from lltm_ray.llamacpp.options import (
    FIXED,
    FOREIGN,
    KNOWN,
    NEARNESS,
    TIMEOUT,
    VALUES,
    check_value,
    read_options,
    settle,
)
from lltm_ray.telemetry.parameters import FIELDS

CHAT, TEXT = "/v1/chat/completions", "/completion"
ROUTES = {
    CHAT: lambda **options: wire.chat("hi", **options),
    TEXT: lambda **options: wire.complete("hi", **options),
    "/v1/completions": lambda **options: wire.completions("hi", **options),
    "/infill": lambda **options: wire.infill("a", "b", **options),
    "/v1/responses": lambda **options: wire.responses("hi", **options),
    "/v1/messages": lambda **options: wire.messages("hi", **options),
    "/v1/embeddings": lambda **options: wire.embed("hi", **options),
    "/v1/rerank": lambda **options: wire.rerank("q", ["a"], **options),
    "/apply-template": lambda **options: wire.apply_template("hi", **options),
}

UNION = FOREIGN.union(*KNOWN.values())
OTHERS = {
    "vLLM": """
        add_special_tokens allowed_token_ids bad_words best_of cache_salt chat_template documents guided_choice
        guided_decoding_backend guided_grammar guided_json guided_regex guided_whitespace_pattern ignore_eos
        include_reasoning include_stop_str_in_output kv_transfer_params length_penalty logprob_token_ids media_io_kwargs
        min_tokens mm_processor_kwargs normalize priority prompt_embeds prompt_logprobs repetition_detection
        repetition_penalty request_id return_prompt_text return_token_ids return_token_offsets
        return_tokens_as_token_ids skip_special_tokens spaces_between_special_tokens stop_token_ids stream_interval
        structured_outputs thinking_token_budget truncate_prompt_tokens truncation_side use_activation use_beam_search
        vllm_xargs watermarking""",
    "SGLang": """
        custom_logit_processor custom_params ebnf extra_key input_ids lora_path min_tokens no_stop_trim regex
        repetition_penalty return_hidden_states return_prompt_token_ids return_routed_experts return_token_ids
        separate_reasoning session_params stop_regex stop_token_ids stream_reasoning task""",
    "Mistral": "guardrails min_tokens output_dtype prompt_mode random_seed safe_prompt",
    "OpenRouter": "models plugins preset provider repetition_penalty route top_a transforms usage",
    "Fireworks": """
        context_length_exceeded_behavior mirostat_lr mirostat_target perf_metrics_in_response prompt_cache_isolation_key
        prompt_cache_max_len prompt_truncate_len raw_output speculation""",
    "text-generation-webui": """
        add_bos_token ban_eos_token custom_token_bans do_sample dynamic_temperature dynatemp_high dynatemp_low
        encoder_repetition_penalty epsilon_cutoff eta_cutoff grammar_string guidance_scale mirostat_mode negative_prompt
        no_repeat_ngram_size num_beams smoothing_factor temperature_last tfs top_a truncation_length""",
    "rerank and embeddings": """
        documents embedding_type input_type late_chunking max_chunks_per_doc max_tokens_per_doc normalized rank_fields
        raw_scores return_documents text truncation""",
    "others": """
        enable_thinking images keep_alive logits options speed think thinking thinking_budget""",
}


def mistakes(name: str) -> set[str]:
    """A letter left out, doubled or wrong, and two that changed places; other known names are none."""
    found = {name.upper(), name.replace("_", "-"), name.replace("_", "")}
    for at in (0, len(name) // 2, len(name) - 1):
        found |= {
            name[:at] + name[at + 1 :],
            name[:at] + name[at] * 2 + name[at + 1 :],
            f"{name[:at]}q{name[at + 1 :]}",
        }
        found.add(name[:at] + name[at : at + 2][::-1] + name[at + 2 :])
    return found


@pytest.mark.parametrize("path", [CHAT, TEXT, "/v1/messages", "/v1/embeddings", "/v1/rerank"])
def test_every_slip_in_a_name_of_four_letters_or_more_is_refused(path: str) -> None:
    for name in KNOWN[path]:
        for wrong in mistakes(name) - UNION if len(name) >= 4 else ():
            with pytest.raises(ConfigError, match=f"^{wrong}=5: {path} has no such option; did you mean "):
                read_options(path, {wrong: 5})


@pytest.mark.parametrize("path", ROUTES)
def test_every_route_takes_all_names_it_knows_and_refuses_misspelt_ones(path: str) -> None:
    call = ROUTES[path]
    assert call(model="tiny").path == path
    assert read_options(path, dict.fromkeys(KNOWN[path], 1)).keys() == KNOWN[path]
    with pytest.raises(ConfigError, match=r"^modle='x': .* did you mean model\?.* extra_body=\{'modle': \.\.\.\}"):
        call(modle="x")
    assert call(extra_body={"modle": "x"}).body["modle"] == "x"
    assert "extra_body" not in call(extra_body={"modle": "x"}).body


@pytest.mark.parametrize(
    ("path", "wrong", "meant"),
    [
        (CHAT, "max_token", "max_tokens"),
        (CHAT, "temprature", "temperature"),
        (CHAT, "Temperature", "temperature"),
        (CHAT, "topk", "top_k"),
        (CHAT, "maxTokens", "max_tokens"),
        (CHAT, "max_new_tokens", "max_tokens"),
        (CHAT, "extra_boddy", "extra_body"),
        (TEXT, "n_predcit", "n_predict"),
        ("/v1/embeddings", "dimension", "dimensions"),
        ("/v1/rerank", "topn", "top_n"),
        ("/v1/messages", "stop_sequence", "stop_sequences"),
        ("/v1/responses", "max_output_token", "max_output_tokens"),
    ],
)
def test_the_name_that_was_meant_is_told(path: str, wrong: str, meant: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ROUTES[path](**{wrong: 7})
    assert (caught.value.field, caught.value.value) == (wrong, 7)
    assert f"did you mean {meant}" in caught.value.why


def test_a_client_sends_nothing_of_a_misspelt_request() -> None:
    with LlamaClient("http://127.0.0.1:9") as client, pytest.raises(ConfigError, match="max_token=5"):
        client.chat("hi", max_token=5)


@pytest.mark.parametrize("name", ["a_new_field", "do_it_well", "zz"])
def test_names_that_are_like_no_other_are_passed_on(name: str) -> None:
    for path, call in ROUTES.items():
        assert call(**{name: 3}).body[name] == 3, path


@pytest.mark.parametrize("server", OTHERS)
def test_what_another_server_has_is_no_mistake_on_any_route(server: str) -> None:
    for name in OTHERS[server].split():
        for path in KNOWN:
            assert read_options(path, {name: 3})[name] == 3, (path, name)


def test_foreign_names_are_those_that_would_be_taken_for_slips(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {name for names in OTHERS.values() for name in names.split()} >= FOREIGN
    monkeypatch.setattr("lltm_ray.llamacpp.options._PASSED", frozenset().union(*KNOWN.values()))
    for name in FOREIGN:
        assert any(is_refused(path, name) for path in KNOWN), name


def is_refused(path: str, name: str) -> bool:
    try:
        read_options(path, {name: 3})
    except ConfigError:
        return True
    return False


def test_a_name_of_one_route_is_no_mistake_on_another() -> None:
    assert wire.complete("hi", response_format={"type": "text"}).body["response_format"] == {"type": "text"}
    for path in KNOWN:
        for name in UNION - FIXED[path] - {"n", "n_cmpl"}:
            assert read_options(path, {name: 3}) == {name: 3}, (path, name)


@pytest.mark.parametrize("nearness", [0.7, 0.8])
def test_names_are_near_that_have_two_letters_changed_and_no_further_ones(
    monkeypatch: pytest.MonkeyPatch, nearness: float
) -> None:
    def slip_and_other() -> tuple[bool, bool]:
        options._slip.cache_clear()
        return is_refused(CHAT, "sede"), is_refused(CHAT, "length_penalty")

    assert slip_and_other() == (True, False)
    monkeypatch.setattr(options, "NEARNESS", nearness)
    assert slip_and_other() == (nearness < NEARNESS,) * 2
    options._slip.cache_clear()


@pytest.mark.parametrize(
    "name", ["timeout", "timeout_s", "time_out", "timeouts", "deadline_s", "deadline", "deadline_ms"]
)
@pytest.mark.parametrize("path", ROUTES)
def test_a_requests_time_is_told_to_be_its_clients(path: str, name: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{name}=3: .* of its client: LlamaClient\(url, timeout_s=\.\.\.\)\. "):
        ROUTES[path](**{name: 3})
    assert ROUTES[path](extra_body={name: 3}).body[name] == 3


async def test_no_client_sends_a_request_with_a_time_of_its_own() -> None:
    with LlamaClient("http://127.0.0.1:9") as client, pytest.raises(ConfigError, match="timeout_s=3"):
        client.chat("hi", timeout_s=3)
    async with AsyncLlamaClient("http://127.0.0.1:9") as client:
        with pytest.raises(ConfigError, match="timeout=3"):
            await client.complete("hi", timeout=3)


@pytest.mark.parametrize(
    ("path", "params"),
    [
        (CHAT, chat_create_params.CompletionCreateParamsBase),
        ("/v1/completions", completion_create_params.CompletionCreateParamsBase),
        ("/v1/responses", response_create_params.ResponseCreateParamsBase),
        ("/v1/embeddings", embedding_create_params.EmbeddingCreateParams),
    ],
)
def test_what_openais_client_can_send_is_no_mistake(path: str, params: Any) -> None:
    assert read_options(path, dict.fromkeys(params.__annotations__, 1)).keys() == set(params.__annotations__)


def test_the_table_has_what_others_here_read_of_requests() -> None:
    known = frozenset().union(*KNOWN.values())
    assert known >= FIELDS
    assert known >= set(LIMITS)


def test_extra_options_are_checked_for_what_they_would_overrule() -> None:
    with pytest.raises(ConfigError, match=r"^extra_body=5: must be a mapping"):
        wire.chat("hi", extra_body=5)
    with pytest.raises(ConfigError, match=r"^extra_body\['seed'\]=2: is given beside it"):
        wire.chat("hi", seed=1, extra_body={"seed": 2})
    with pytest.raises(ConfigError, match="n=2: one answer a call"):
        wire.chat("hi", extra_body={"n": 2})
    assert wire.complete("hi", extra_body={"max_tokens": 4}).body["n_predict"] == 4
    assert wire.chat("hi", extra_body=None).body.keys() == {"messages", "stream", "stream_options"}


@pytest.mark.parametrize("path", ROUTES)
def test_what_a_call_sets_itself_cannot_be_given_beside_it(path: str) -> None:
    assert ROUTES[path]().body.keys() == FIXED[path]
    for name in FIXED[path]:
        for read in (ROUTES[path], lambda **given: read_options(path, given), lambda **given: settle(path, given)):
            with pytest.raises(ConfigError, match=rf"^extra_body\['{name}'\]=0: is set by the call itself"):
                read(extra_body={name: 0})
    for name in FIXED[path] - {"stream", "stream_options"}:
        with pytest.raises(ConfigError, match=rf"^{name}=0: is set by the call itself: leave it out"):
            settle(path, {name: 0})
    assert settle(path, {"stream": False}) == {"stream": False}


def test_none_is_not_given() -> None:
    assert wire.rerank("q", ["a"], extra_body={"top_n": 1}).body["top_n"] == 1
    assert wire.complete("hi", n_predict=None, extra_body={"n_predict": 4}).body["n_predict"] == 4
    with pytest.raises(ConfigError, match=r"^extra_body\['top_n'\]=1: is set by the call itself"):
        wire.rerank("q", ["a"], top_n=2, extra_body={"top_n": 1})


def test_settled_options_can_be_read_again() -> None:
    given = {"model": "m", "timeout_s": 3, "extra_body": {"lora": [], "max_token": 5}}
    settled = settle(CHAT, given, ("timeout_s",))
    assert settled == {"model": "m", "timeout_s": 3, "lora": [], "extra_body": {"max_token": 5}}
    again = read_options(CHAT, settled, ("timeout_s",))
    assert again == {"model": "m", "timeout_s": 3, "lora": [], "max_token": 5}


# --- values


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("max_tokens", (-1, 0, 16, 16.0), (-2, "5", 1.5, True, float("nan"), float("inf"), [5])),
        ("top_k", (-1, 0, 40), (-2, "40")),
        ("top_p", (0, 0.5, 1), (7, -0.1, "0.5", True, float("nan"))),
        ("temperature", (0, 0.7, 5), (-1, "hot", float("inf"))),
        ("n", (1, 2), (0, "1")),
        ("seed", (-1, 0, 2**63 - 1), ("x", 2**63, 1.5)),
        ("mirostat", (0, 2), (3, -1)),
        ("presence_penalty", (-2, 2.0), ("a", True)),
        ("logprobs", (True, False, 0, 5), (-1, "yes")),
        ("ignore_eos", (True, False), (1, "yes")),
        ("stop", ("a", ["a", "b"], ()), (5, {"a": 1})),
        ("logit_bias", ({"5": -100}, [[5, False]]), ("5", 5)),
        ("model", ("tiny",), (5, ["tiny"])),
        (TIMEOUT, (0.001, 5, 3600.0), (0, -1, "5", True, None)),
    ],
)
def test_what_means_nothing_as_a_value_is_refused_and_no_more(name: str, good: Any, bad: Any) -> None:
    for value in good:
        check_value(name, value)
        assert settle(CHAT, {name: value}, (TIMEOUT,)) == {name: value}
    for value in bad:
        with pytest.raises(ConfigError, match=f"^{name}=.*: must be "):
            check_value(name, value)


def test_values_are_checked_wherever_they_stand_and_those_of_other_names_pass() -> None:
    with pytest.raises(ConfigError, match=r"^top_p=7: must be from 0 to 1$"):
        settle(CHAT, {"extra_body": {"top_p": 7}})
    assert settle(TEXT, {"a_new_field": object, "top_p": None, "extra_body": {"top_pp": 7}})["extra_body"] == {
        "top_pp": 7
    }
    assert VALUES.keys() - {TIMEOUT} <= KNOWN[CHAT]


@pytest.mark.parametrize("path", ROUTES)
def test_no_route_is_sent_a_value_that_means_nothing(path: str) -> None:
    for given in ({"temperature": -1}, {"extra_body": {"temperature": -1}}):
        with pytest.raises(ConfigError, match=r"^temperature=-1: must be from 0 to "):
            ROUTES[path](**given)
    assert ROUTES[path](temperature=0, top_p=None).body["temperature"] == 0


def test_a_route_that_is_not_known_takes_any_value() -> None:
    assert wire.set_props(temperature=-1).body == {"temperature": -1}


# --- a driver's calls


class Router:
    """Notes what it is asked for, and has no engine."""

    def __init__(self) -> None:
        self.asked: list[Any] = []

    async def acquire(self, ask: Any, exclude: Any) -> Any:
        self.asked.append(ask)
        raise NotTaken


class NotTaken(Exception):
    pass


@pytest.fixture(params=[Calls, WatchedCalls])
def calls(request: pytest.FixtureRequest) -> Calls:
    directory = SimpleNamespace(wake=SimpleNamespace(remote=None))
    made: Calls = request.param(Fleet(config=FleetConfig(name="f"), run_id="r", directory=directory))
    made._router = Router()
    return made


async def first(stream: Any) -> Any:
    return await anext(stream)


METHODS = {
    "chat": CHAT,
    "complete": TEXT,
    "embed": "/v1/embeddings",
    "rerank": "/v1/rerank",
    "stream": CHAT,
    "batch": TEXT,
}


def asker(calls: Calls, method: str) -> Any:
    return {
        "stream": lambda **given: first(calls.stream([], timeout_s=5, **given)),
        "batch": lambda **given: calls.batch(["a", "b"], timeout_s=5, **given),
    }.get(method, lambda **given: calls.call(method, "hi", timeout_s=5, **given))


@pytest.mark.parametrize("method", METHODS)
async def test_a_drivers_call_with_a_misspelt_option_takes_no_engine(calls: Calls, method: str) -> None:
    ask = asker(calls, method)
    with pytest.raises(ConfigError, match=r"^timeout=1: .* did you mean timeout_s\?"):
        await asyncio.wait_for(ask(timeout=1), 5)
    with pytest.raises(ConfigError, match=r"^deadline_s=1: .* did you mean timeout_s\?"):
        await asyncio.wait_for(ask(deadline_s=1), 5)
    assert calls._router.asked == []
    with pytest.raises(NotTaken):
        await asyncio.wait_for(ask(carrier={}, extra_body={"timeout": 1}), 5)
    assert calls._router.asked


@pytest.mark.parametrize("method", ["chat", "complete", "stream", "batch"])
@pytest.mark.parametrize(("name", "value"), [("max_tokens", "5"), ("top_p", 7), ("temperature", -1), ("n", 0)])
async def test_a_drivers_call_with_a_value_that_means_nothing_takes_no_engine(
    calls: Calls, method: str, name: str, value: Any
) -> None:
    with pytest.raises(ConfigError, match=rf"^{name}={value!r}: must be "):
        await asyncio.wait_for(asker(calls, method)(**{name: value}), 5)
    assert calls._router.asked == []


@pytest.mark.parametrize("calls", [WatchedCalls], indirect=True)
@pytest.mark.parametrize("timeout_s", [-1, 0, "5", None])
async def test_a_time_that_is_none_takes_no_engine_and_nobody_is_told(
    calls: Calls, watched: list[_watch.Asked], timeout_s: Any
) -> None:
    given = {"timeout_s": timeout_s}
    for ask in (
        calls.call("chat", [], **given),
        first(calls.stream([], **given)),
        calls.batch(["a"], **given),
        calls.ask_any("count_tokens", [], model="", **given),
    ):
        with pytest.raises(ConfigError, match=rf"^timeout_s={timeout_s!r}: must be "):
            await asyncio.wait_for(ask, 5)
    assert (calls._router.asked, watched) == ([], [])


@pytest.mark.parametrize("method", METHODS)
async def test_what_a_drivers_call_sets_itself_is_refused_before_an_engine_is_taken(calls: Calls, method: str) -> None:
    ask = asker(calls, method)
    for name in FIXED[METHODS[method]] | {"timeout_s", "carrier"}:
        with pytest.raises(ConfigError, match=rf"^extra_body\['{name}'\]=\[\]: is set by the call itself"):
            await asyncio.wait_for(ask(extra_body={name: []}), 5)
    assert calls._router.asked == []


async def test_an_input_given_twice_takes_no_engine(calls: Calls) -> None:
    with pytest.raises(ConfigError, match=r"^input='x': is set by the call itself"):
        await calls.call("embed", "hi", timeout_s=5, input="x")
    assert calls._router.asked == []


async def test_a_mixed_batch_takes_options_of_chats(calls: Calls) -> None:
    for prompt in ("text", [{"role": "user", "content": "hi"}]):
        with pytest.raises(NotTaken):
            await calls.batch([prompt], timeout_s=5, response_format={"type": "text"})
    assert len(calls._router.asked) == 2


@pytest.fixture
def watched() -> Iterator[list[_watch.Asked]]:
    asked: list[_watch.Asked] = []

    def observe(call: _watch.Asked) -> _watch.Watch:
        asked.append(call)
        return _watch.IDLE

    _watch.set_observer(observe)
    yield asked
    _watch.set_observer(None)


@pytest.mark.parametrize("calls", [WatchedCalls], indirect=True)
@pytest.mark.parametrize("method", ["chat", "stream"])
async def test_who_watches_sees_options_wherever_they_stand(
    calls: Calls, watched: list[_watch.Asked], method: str
) -> None:
    with pytest.raises(NotTaken):
        await asker(calls, method)(extra_body={"max_tokens": 9, "model": "m", "max_token": 1})
    with pytest.raises(ConfigError):
        await asker(calls, method)(max_token=1)
    (asked,) = watched
    assert asked.body.items() >= {"max_tokens": 9, "model": "m", "extra_body": {"max_token": 1}}.items()


# --- an engine's calls, by handle


ENGINE_CALLS = {
    "chat": lambda engine, **given: EngineActor.chat(engine, "hi", **given),
    "complete": lambda engine, **given: EngineActor.complete(engine, "hi", **given),
    "stream": lambda engine, **given: anext(EngineActor.stream(engine, "hi", **given)),
    "embed": lambda engine, **given: EngineActor.embed(engine, "hi", **given),
}


@pytest.mark.parametrize("method", ENGINE_CALLS)
async def test_an_engines_call_knows_its_own_arguments_and_takes_no_slot_for_a_slip(method: str) -> None:
    asked: list[Any] = []

    def call(route: str, timeout_s: float, params: Any, carrier: Any, **how: Any) -> Any:
        asked.append((timeout_s, params))
        raise NotTaken

    engine = SimpleNamespace(_trace=SimpleNamespace(call=call))
    for wrong, said in (
        ({"timeout": 3}, r"^timeout=3: .* did you mean timeout_s\?"),
        ({"extra_body": {"timeout_s": 3}}, r"^extra_body\['timeout_s'\]=3: is set by the call itself"),
    ):
        with pytest.raises(ConfigError, match=said):
            await ENGINE_CALLS[method](engine, **wrong)
    assert asked == []
    with pytest.raises(NotTaken):
        await ENGINE_CALLS[method](engine, timeout_s=3, extra_body={"model": "m"})
    ((timeout_s, params),) = asked
    assert (timeout_s, params["model"]) == (3, "m")


async def test_known_options_count_where_an_engine_is_chosen_wherever_they_stand(calls: Calls) -> None:
    with pytest.raises(NotTaken):
        await calls.call("chat", [], timeout_s=5, extra_body={"max_tokens": 9, "model": "m", "max_token": 1})
    (ask,) = calls._router.asked
    assert (ask.max_tokens, ask.model) == (9, "m")
