"""`lltm-ray chat`: one question, or a conversation, with an endpoint."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

import requests
import typer

from lltm_ray.cli._endpoint import NameOption, UrlOption, endpoint_of
from lltm_ray.cli._output import ERR, OUT, KeyFileOption, errors_end_the_command, print_error, read_key
from lltm_ray.errors import ConfigError, DeadlineError, EngineExitedError, LltmRayError, ModelNotFoundError
from lltm_ray.llamacpp import wire
from lltm_ray.llamacpp.replies import Reply
from lltm_ray.llamacpp.sse import StreamReader
from lltm_ray.records import StreamEvent, Timings, Usage

HELP = "/reset forgets the conversation, /quit (or Ctrl-D) ends, Ctrl-C stops an answer"
_CONNECT_TIMEOUT_S = 5.0
_CONTROLS = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
"""C0, DEL and C1: U+009B alone starts an escape sequence on many terminals."""

_Prompt = Annotated[
    str | None, typer.Argument(help="The question. Left out: standard input if piped, else a dialogue.")
]
_Model = Annotated[str, typer.Option(help="Served model name.", show_default="the first that /v1/models lists")]
_System = Annotated[str, typer.Option(help="System message.", show_default="none")]
_MaxTokens = Annotated[
    int | None, typer.Option(min=1, help="Most tokens of an answer.", show_default="the server's own limit")
]
_Temperature = Annotated[
    float | None, typer.Option(min=0.0, help="Sampling temperature; 0 is greedy.", show_default="the server's own")
]
_Timeout = Annotated[float, typer.Option(help="Longest silence of the server, in seconds.")]


@errors_end_the_command()
def chat(
    prompt: _Prompt = None,
    *,
    url: UrlOption = "",
    name: NameOption = "default",
    model: _Model = "",
    system: _System = "",
    max_tokens: _MaxTokens = None,
    temperature: _Temperature = None,
    api_key_file: KeyFileOption = None,
    timeout: _Timeout = 600.0,
) -> None:
    """Ask a question and watch the answer come, or talk.

    With PROMPT or piped input one answer is printed. Otherwise a dialogue starts: /reset forgets the conversation,
    /quit ends it, Ctrl-C stops the current answer only.
    """
    params = {"max_tokens": max_tokens, "temperature": temperature}
    given = {name: value for name, value in params.items() if value is not None}
    endpoint = Endpoint(endpoint_of(url, name), read_key(api_key_file), timeout, given)
    if prompt is None and not sys.stdin.isatty():
        prompt = sys.stdin.read().strip()
    if prompt == "":
        raise ConfigError("prompt", prompt, "is empty; write the question after `lltm-ray chat`, or pipe it in")
    endpoint.params["model"] = model or endpoint.first_model()
    talk = Conversation(endpoint, [{"role": "system", "content": system}] if system else [])
    if prompt is None:
        converse(talk)
    elif not talk.ask(prompt):
        raise typer.Exit(130)


@dataclass(slots=True)
class Endpoint:
    """Where questions go, and with which parameters."""

    url: str
    api_key: str = field(repr=False)
    timeout_s: float
    params: dict[str, Any]

    def stream(self, messages: list[dict[str, str]]) -> Iterator[StreamEvent]:
        """The answer's events; the last one carries usage, timings and the engine's name.

        Raises:
            UpstreamError: the endpoint's own error.
            EngineExitedError: the answer broke off.
            LltmRayError: the endpoint cannot be reached, or was silent for too long.
        """
        call = wire.chat(messages, **self.params)
        started = time.perf_counter()
        with self._open("POST", call.path, wire.encode(call.body)) as response:
            reader = StreamReader(call.decode, queue_s=time.perf_counter() - started)
            if not wire.is_stream(response.status_code, response.headers.get("content-type")):
                raise wire.refusal(Reply(response.status_code, response.content))
            engine = response.headers.get("x-lltm-engine", "")
            for piece in response.iter_content(None):
                for event in reader.feed(piece, elapsed_s=time.perf_counter() - started):
                    yield replace(event, engine=engine)
            reader.finish()

    def first_model(self) -> str:
        """The first model that the endpoint lists."""
        with self._open("GET", "/v1/models", None) as response:
            listed = wire.models().read(Reply(response.status_code, response.content))
        if not listed:
            raise ModelNotFoundError("", f"{self.url} lists none; name one with --model")
        return str(listed[0]["id"])

    @contextmanager
    def _open(self, method: str, path: str, body: bytes | None) -> Iterator[requests.Response]:
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        timeout = (_CONNECT_TIMEOUT_S, self.timeout_s)
        try:
            with requests.Session() as session:
                session.trust_env = False  # else a .netrc entry of that host would replace our key
                to = self.url + path
                with session.request(method, to, data=body, headers=headers, stream=True, timeout=timeout) as response:
                    yield response
        except (requests.RequestException, EngineExitedError) as error:
            raise self._translated(error) from error
        except LltmRayError as error:
            error.args = (error.message.translate(_CONTROLS),)  # it may quote what the server said
            raise

    def _translated(self, error: Exception) -> LltmRayError:
        if isinstance(error, ValueError):  # requests' own errors of a URL are ValueErrors
            return ConfigError("url", self.url, "must look like http://127.0.0.1:8000")
        if isinstance(error, requests.ReadTimeout):
            return DeadlineError(f"waiting for {self.url}", self.timeout_s)
        if isinstance(error, requests.exceptions.ChunkedEncodingError | EngineExitedError):
            return LltmRayError("the answer broke off before its end")
        return LltmRayError(f"cannot reach {self.url}; is it up? (`lltm-ray up`)")


@dataclass(slots=True)
class Conversation:
    """Messages so far, system message included, and the endpoint they go to."""

    endpoint: Endpoint
    messages: list[dict[str, str]]

    def ask(self, question: str) -> bool:
        """Send one question, print the answer as it comes, and keep both; returns whether it came to its end.

        After Ctrl-C what came is kept, after an error nothing.
        """
        sent = [*self.messages, {"role": "user", "content": question}]
        parts: list[str] = []
        last = StreamEvent()
        stopped = False
        try:
            for last in self.endpoint.stream(sent):
                _show(last)
                parts.append(last.text)
        except KeyboardInterrupt:
            stopped = True
        finally:
            if parts:
                typer.echo()
        ERR.print(_summary(last, stopped=stopped), style="dim", markup=False)
        if parts:
            self.messages = [*sent, {"role": "assistant", "content": "".join(parts)}]
        return not stopped

    def reset(self) -> None:
        """Forget all but the system message."""
        self.messages = [message for message in self.messages if message["role"] == "system"]


def converse(talk: Conversation) -> None:
    """Read questions until /quit or the end of input; an error ends an answer, not the dialogue."""
    ERR.print(f"{talk.endpoint.params['model']} at {talk.endpoint.url}: {HELP}", style="dim", markup=False)
    while (line := _read_line()) not in (None, "/quit"):
        if line == "/reset":
            talk.reset()
        elif line and line.startswith("/"):
            ERR.print(HELP, style="dim", markup=False)
        elif line:
            try:
                talk.ask(line)
            except LltmRayError as error:
                print_error(error)


def _read_line() -> str | None:
    """The next line without outer blanks; empty after Ctrl-C, None at the end of input."""
    try:
        return OUT.input("[bold]> [/]").strip()
    except KeyboardInterrupt:
        typer.echo()
        return ""
    except EOFError:
        return None


def _show(event: StreamEvent) -> None:
    if event.reasoning:
        ERR.print(event.reasoning.translate(_CONTROLS), style="dim", end="", markup=False, soft_wrap=True)
    if event.text:
        typer.echo(event.text.translate(_CONTROLS), nl=False)  # a model must not be able to steer the terminal
        sys.stdout.flush()


def _summary(last: StreamEvent, *, stopped: bool) -> str:
    """`64 tokens, first after 12 ms, 250 tokens/s, engine e0`."""
    usage, timings = last.usage or Usage(), last.timings or Timings()
    if stopped:
        return "stopped"
    parts = [f"{usage.output_tokens} tokens"]
    if timings.ttft_s is not None and timings.total_s is not None:
        decode_s = timings.predicted_ms / 1e3 or timings.total_s - timings.ttft_s
        parts.append(f"first after {timings.ttft_s * 1e3:.0f} ms")
        parts.append(f"{usage.output_tokens / decode_s:.1f} tokens/s" if decode_s else "")
    parts.append(f"engine {last.engine.translate(_CONTROLS)}" if last.engine else "")
    return ", ".join(part for part in parts if part)
