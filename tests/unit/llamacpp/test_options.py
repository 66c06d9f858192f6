"""Names of request options: what is misspelt is refused, what is new or meant is passed on."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from openai.types import completion_create_params, embedding_create_params
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.responses import response_create_params

from lltm_ray.actors.calls import Calls
from lltm_ray.actors.fleet import Fleet
from lltm_ray.config import FleetConfig
from lltm_ray.errors import ConfigError
from lltm_ray.gateway.continuable import LIMITS
from lltm_ray.llamacpp import wire
from lltm_ray.llamacpp.client import LlamaClient
from lltm_ray.llamacpp.options import KNOWN, read_options, settle
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
        for wrong in mistakes(name) - KNOWN[path] if len(name) >= 4 else ():
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
        (CHAT, "max_output_tokens", "max_tokens"),
        (CHAT, "repetition_penalty", "repeat_penalty"),
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


@pytest.mark.parametrize("name", ["a_new_field", "do_it_well", "guided_json", "zz"])
def test_names_that_are_like_no_other_are_passed_on(name: str) -> None:
    for path, call in ROUTES.items():
        assert call(**{name: 3}).body[name] == 3, path


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
    for name in ("messages", "stream", "stream_options"):
        with pytest.raises(ConfigError, match=rf"^extra_body\['{name}'\]=0: is set by the call itself"):
            wire.chat("hi", extra_body={name: 0})
    with pytest.raises(ConfigError, match="n=2: one answer a call"):
        wire.chat("hi", extra_body={"n": 2})
    assert wire.complete("hi", extra_body={"max_tokens": 4}).body["n_predict"] == 4
    assert wire.chat("hi", extra_body=None).body.keys() == {"messages", "stream", "stream_options"}


def test_settled_options_can_be_read_again() -> None:
    given = {"model": "m", "timeout_s": 3, "extra_body": {"lora": [], "max_token": 5}}
    settled = settle(CHAT, given, ("timeout_s",))
    assert settled == {"model": "m", "timeout_s": 3, "lora": [], "extra_body": {"max_token": 5}}
    again = read_options(CHAT, settled, ("timeout_s",))
    assert again == {"model": "m", "timeout_s": 3, "lora": [], "max_token": 5}


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


@pytest.fixture
def calls() -> Calls:
    directory = SimpleNamespace(wake=SimpleNamespace(remote=None))
    made = Calls(Fleet(config=FleetConfig(name="f"), run_id="r", directory=directory))
    made._router = Router()
    return made


async def first(stream: Any) -> Any:
    return await anext(stream)


@pytest.mark.parametrize("method", ["chat", "complete", "embed", "rerank", "stream", "batch"])
async def test_a_drivers_call_with_a_misspelt_option_takes_no_engine(calls: Calls, method: str) -> None:
    ask = {
        "stream": lambda **options: first(calls.stream([], timeout_s=5, **options)),
        "batch": lambda **options: calls.batch(["a", "b"], timeout_s=5, **options),
    }.get(method, lambda **options: calls.call(method, "hi", timeout_s=5, **options))
    with pytest.raises(ConfigError, match=r"^timeout=1: .* did you mean timeout_s\?"):
        await asyncio.wait_for(ask(timeout=1), 5)
    assert calls._router.asked == []
    with pytest.raises(NotTaken):
        await asyncio.wait_for(ask(carrier={}, extra_body={"timeout": 1}), 5)
    assert calls._router.asked


async def test_known_options_count_where_an_engine_is_chosen_wherever_they_stand(calls: Calls) -> None:
    with pytest.raises(NotTaken):
        await calls.call("chat", [], timeout_s=5, extra_body={"max_tokens": 9, "model": "m", "max_token": 1})
    (ask,) = calls._router.asked
    assert (ask.max_tokens, ask.model) == (9, "m")
