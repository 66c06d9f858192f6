"""Where the server is and how long it may take: what clients accept, and how they refuse the rest."""

from typing import Any

import pytest

from lltm_ray.errors import ConfigError, EngineNotReadyError
from lltm_ray.llamacpp.client import AsyncLlamaClient, LlamaClient

HERE = "http://127.0.0.1:1"


@pytest.mark.parametrize("name", ["timeout_s", "connect_timeout_s", "max_connections"])
@pytest.mark.parametrize("value", ["5", None, 0, -1, float("nan"), float("inf")])
@pytest.mark.parametrize("face", [LlamaClient, AsyncLlamaClient])
def test_a_limit_that_is_no_number_above_0_is_told_with_its_value_and_what_it_must_be(
    face: Any, name: str, value: Any
) -> None:
    with pytest.raises(ConfigError) as caught:
        face(HERE, **{name: value})
    assert str(caught.value) == f"{name}={value!r}: must be a number above 0, at most 10000000"


@pytest.mark.parametrize("url", [5, None, b"http://127.0.0.1:1", "http://[::1", "http://127.0.0.1:99999"])
@pytest.mark.parametrize("face", [LlamaClient, AsyncLlamaClient])
def test_what_is_no_url_is_told_with_what_one_looks_like(face: Any, url: Any) -> None:
    with pytest.raises(ConfigError, match=r"^url=.*must be the base URL of a llama-server, such as http://127"):
        face(url)


@pytest.mark.parametrize("key", [5, None, "a\r\nb"])
def test_a_key_that_no_header_can_carry_is_told_without_showing_it(key: Any) -> None:
    with pytest.raises(ConfigError, match=r"^api_key='\.\.\.': must be printable ASCII"):
        AsyncLlamaClient(HERE, api_key=key)


@pytest.mark.parametrize("end", ["", "/", "/v1", "/v1/"])
def test_openais_base_url_is_a_base_url(end: str) -> None:
    with LlamaClient(f"{HERE}/prefix{end}") as client:
        assert client.url == AsyncLlamaClient(f"{HERE}/prefix{end}").url == f"{HERE}/prefix"
    assert AsyncLlamaClient("http://v1").url == "http://v1"


def test_nothing_is_sent_by_a_client_that_is_closed_nor_by_its_twins() -> None:
    client = LlamaClient(HERE)
    begun, twin = client.chat_stream("hi"), client.sending({"x-a": "b"})
    with pytest.raises(EngineNotReadyError, match="not listening"):
        client.health()
    client.close()
    for ask in (client.health, lambda: client.chat("hi"), twin.health, lambda: next(begun)):
        with pytest.raises(EngineNotReadyError, match=r"^llama-server is out of reach: this client is closed; make"):
            ask()


async def test_nothing_is_sent_by_an_asynchronous_client_that_is_closed_nor_by_its_twins() -> None:
    client = AsyncLlamaClient(HERE)
    begun, twin = client.chat_stream("hi"), client.sending({"x-a": "b"})
    with pytest.raises(EngineNotReadyError, match="not listening"):
        await client.health()
    await client.aclose()
    for ask in (client.health, lambda: client.chat("hi"), twin.health, lambda: anext(begun)):
        with pytest.raises(EngineNotReadyError, match="this client is closed"):
            await ask()


def test_one_openai_end_is_left_out_and_no_more() -> None:
    with LlamaClient(f"{HERE}/v1/v1/") as client:  # a llama-server with --api-prefix /v1
        assert client.url == f"{HERE}/v1"
