"""Faults that a real server does not show on demand: a scripted one does."""

from __future__ import annotations

import asyncio
import socket
import threading
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest

from lltm_ray.errors import DeadlineError, EngineExitedError, UpstreamError
from lltm_ray.llamacpp.client import AsyncLlamaClient

if TYPE_CHECKING:
    from conftest import Faces

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
TOKENS = b'{"tokens":[1]}'
WHOLE = HEAD + b"Content-Length: 14\r\n\r\n" + TOKENS
EVENTS = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
EVENT = b'data: {"content":"a","tokens":[1],"stop":false}\n\n'
CHUNK = b"%x\r\n%s\r\n" % (len(EVENT), EVENT)


class Script:
    """A server that answers the requests of each connection as listed, then closes it; None waits for the client."""

    def __init__(self, *connections: list[bytes | None]) -> None:
        self.connections = connections
        self.accepted = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._serve)

    async def __aenter__(self) -> Script:
        self._thread.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        await asyncio.to_thread(self._thread.join, 60)
        assert not self._thread.is_alive(), "the client has not hung up"

    def _serve(self) -> None:
        for answers in self.connections:
            try:
                connection, _ = self._listener.accept()
            except OSError:  # the test is over
                return
            self.accepted += 1
            with connection, suppress(ConnectionError):  # the client has had enough
                self._converse(connection, answers)

    def _converse(self, connection: socket.socket, answers: list[bytes | None]) -> None:
        for answer in answers:
            if answer is None:
                connection.recv(1)
            else:
                self._read_request(connection)
                connection.sendall(answer)

    @staticmethod
    def _read_request(connection: socket.socket) -> None:
        def more() -> bytes:
            if not (data := connection.recv(65_536)):
                raise ConnectionResetError
            return data

        head = b""
        while b"\r\n\r\n" not in head:
            head += more()
        head, _, body = head.partition(b"\r\n\r\n")
        (length,) = (int(line[15:]) for line in head.splitlines() if line.lower().startswith(b"content-length:"))
        while len(body) < length:
            body += more()


async def test_a_reused_connection_that_dies_silently_is_tried_once_more_on_a_fresh_one(
    faces: Faces,
) -> None:
    async with Script([WHOLE, b""], [WHOLE]) as running:
        ask = faces(url=running.url)
        assert await ask("tokenize", "a") == (1,)
        assert await ask("tokenize", "a") == (1,)
        assert running.accepted == 2


async def test_the_second_try_is_the_last(faces: Faces) -> None:
    async with Script([WHOLE, b""], [b""], [WHOLE]) as running:
        ask = faces(url=running.url)
        await ask("tokenize", "a")
        with pytest.raises(EngineExitedError):
            await ask("tokenize", "a")
        assert running.accepted == 2


async def test_a_fresh_connection_that_dies_silently_is_not_tried_again(faces: Faces) -> None:
    async with Script([b""], [WHOLE]) as running:
        with pytest.raises(EngineExitedError):
            await faces(url=running.url)("tokenize", "a")
        assert running.accepted == 1


async def test_an_answer_that_breaks_off_is_not_tried_again(faces: Faces) -> None:
    async with Script([WHOLE, HEAD + b"Content-Length: 99\r\n\r\n{"], [WHOLE]) as running:
        ask = faces(url=running.url)
        await ask("tokenize", "a")
        with pytest.raises(EngineExitedError) as caught:
            await ask("tokenize", "a")
        assert running.accepted == 1
        assert caught.value.__notes__ == [f"the connection to {running.url} broke during POST /tokenize"]


@pytest.mark.parametrize("ending", [b"", b"0\r\n\r\n", b"40\r\ndata: {"])
async def test_a_stream_that_ends_early_is_never_a_short_text(faces: Faces, ending: bytes) -> None:
    async with Script([EVENTS + CHUNK + ending]) as running:
        with pytest.raises(EngineExitedError):
            await faces(url=running.url)("complete", "a")


async def test_a_stream_that_is_none_is_an_upstream_error(faces: Faces) -> None:
    async with Script([WHOLE]) as running:
        with pytest.raises(UpstreamError) as caught:
            await faces(url=running.url)("complete", "a")
    assert (caught.value.http_status, caught.value.body) == (200, TOKENS.decode())


@pytest.mark.parametrize("begin", [b"", EVENTS, EVENTS + CHUNK])
async def test_a_silent_server_is_a_deadline_error(faces: Faces, begin: bytes) -> None:
    async with Script([begin, None]) as running:
        with pytest.raises(DeadlineError, match=r"0\.2 s"):
            await faces(url=running.url, timeout_s=0.2)("complete", "a")


async def test_a_redirect_is_not_followed(faces: Faces) -> None:
    async with Script([b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n"]) as running:
        with pytest.raises(UpstreamError) as caught:
            await faces(url=running.url)("tokenize", "a")
        assert caught.value.http_status == 302


async def test_closing_the_client_ends_what_it_reads() -> None:
    async with Script([EVENTS + CHUNK, None]) as script:
        client = AsyncLlamaClient(script.url)
        stream = client.complete_stream("x")
        assert (await anext(stream)).text == "a"
        rest = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0.05)  # it waits for the next event
        await client.aclose()
        with pytest.raises(EngineExitedError):
            async with asyncio.timeout(30):
                await rest
