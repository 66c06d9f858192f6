import pytest

from lltm_ray.errors import ConfigError, RequestTooLargeError
from lltm_ray.gateway.headers import build_request, downstream_headers, request_id, upstream_headers
from lltm_ray.gateway.request import ClientGoneError, read_body, read_model


def receiver(*messages):
    left = list(messages)

    async def receive():
        assert left, "read past the end"
        return left.pop(0)

    return receive


def chunk(body: bytes, more: bool = True):
    return {"type": "http.request", "body": body, "more_body": more}


async def test_a_body_in_parts_is_joined():
    assert await read_body(receiver(chunk(b"a"), chunk(b"b", False)), [], 10) == b"ab"


async def test_a_declared_length_over_the_limit_is_refused_without_reading():
    with pytest.raises(RequestTooLargeError) as caught:
        await read_body(receiver(), [(b"content-length", b"1000000000")], 10)
    assert caught.value.http_status == 413


async def test_an_undeclared_body_is_refused_as_soon_as_it_passes_the_limit():
    endless = chunk(b"x" * 6)
    receive = receiver(endless, endless)
    with pytest.raises(RequestTooLargeError, match="12 bytes"):
        await read_body(receive, [], 10)


async def test_a_client_that_leaves_in_the_middle_of_its_body_is_noticed():
    with pytest.raises(ClientGoneError):
        await read_body(receiver(chunk(b"a"), {"type": "http.disconnect"}), [], 10)


@pytest.mark.parametrize(
    ("body", "model"),
    [(b'{"model":"m"}', "m"), (b"{}", None), (b'{"model":null}', None), (b'{"model":""}', None), (b"[1]", None)],
)
def test_the_model_is_read_where_there_is_one(body, model):
    assert read_model(body) == model


@pytest.mark.parametrize("body", [b"", b"{bad", b'{"a":"\xff"}', b"[" * 200_000, b"1" * 10_000, b"\x00"])
def test_a_body_that_is_not_json_is_a_400_in_llama_servers_shape(body):
    with pytest.raises(ConfigError) as caught:
        read_model(body)
    error = caught.value.as_dict()["error"]
    assert (error["code"], error["type"]) == (400, "invalid_request_error")
    assert len(error["message"]) < 500


@pytest.mark.parametrize("body", [b'{"model":5}', b'{"model":["a"]}'])
def test_a_model_that_is_no_string_is_refused(body):
    with pytest.raises(ConfigError, match="must be a string"):
        read_model(body)


def test_hop_by_hop_headers_and_the_clients_key_stay_here():
    client = [
        (b"host", b"gateway"),
        (b"authorization", b"Bearer client"),
        (b"x-api-key", b"client"),
        (b"connection", b"keep-alive, X-Hop"),
        (b"x-hop", b"1"),
        (b"transfer-encoding", b"chunked"),
        (b"content-length", b"2"),
        (b"expect", b"100-continue"),
        (b"traceparent", b"00-ab-cd-01"),
        (b"content-type", b"application/json"),
    ]
    assert upstream_headers(client, "engine", "id1") == [
        (b"traceparent", b"00-ab-cd-01"),
        (b"content-type", b"application/json"),
        (b"x-request-id", b"id1"),
        (b"authorization", b"Bearer engine"),
    ]


def test_the_servers_connection_headers_are_not_passed_on():
    server = [
        (b"server", b"llama.cpp"),
        (b"access-control-allow-origin", b""),
        (b"keep-alive", b"timeout=5, max=100"),
        (b"connection", b"close"),
        (b"transfer-encoding", b"chunked"),
        (b"content-type", b"text/event-stream"),
    ]
    assert downstream_headers(server, "e0", "id1") == [
        (b"content-type", b"text/event-stream"),
        (b"x-lltm-engine", b"e0"),
        (b"x-request-id", b"id1"),
    ]


def test_a_sane_request_id_is_kept_and_a_hostile_one_replaced():
    assert request_id([(b"x-request-id", b"abc-1")]) == "abc-1"
    for hostile in (b"a b", b"", b"x" * 200, b"a\r\nset-cookie: b", b"\xff"):
        assert request_id([(b"x-request-id", hostile)]).isascii()
        assert request_id([(b"x-request-id", hostile)]) != hostile.decode("latin-1")
    assert request_id([]) != request_id([])


def test_a_request_is_one_write_with_its_host_and_length_and_a_long_body_is_not_copied():
    assert build_request(b"POST", b"/x?a=1", "http://127.0.0.1:8080", [(b"a", b"b")], b"{}") == [
        b"POST /x?a=1 HTTP/1.1\r\nhost: 127.0.0.1:8080\r\na: b\r\ncontent-length: 2\r\n\r\n{}"
    ]
    body = b"x" * 100_000
    head, same = build_request(b"POST", b"/x", "http://[::1]:80", [], body)
    assert head.endswith(b"content-length: 100000\r\n\r\n")
    assert same is body
    assert build_request(b"GET", b"/x", "http://h:1", [], b"") == [b"GET /x HTTP/1.1\r\nhost: h:1\r\n\r\n"]
