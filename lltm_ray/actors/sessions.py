"""Named sessions for programs: `Cluster.sessions`, or `Sessions(url)` without Ray.

```python
with cluster.sessions.open("alice", system="You are terse.") as alice:  # as it was left, else a new one
    print(alice.ask("What is a slot?", max_tokens=64).text)
# saved here; tomorrow, after any restart, open("alice") goes on without computing the prompt again
```

They talk to the gateway's `/lltm/sessions` and `/v1/chat/completions`, so each belongs to the tenant of the key that
saved it, and any OpenAI client can go on from one with the header `x-lltm-session: alice`.
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Mapping
from dataclasses import fields
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import requests

from lltm_ray._sessions import HEAD_FIELDS, RESTORED, SESSION_HEADER, SessionInfo, check_name
from lltm_ray._turns import Messages, as_messages, check_text
from lltm_ray.errors import (
    AuthenticationError,
    ConfigError,
    DiskFullError,
    FleetError,
    LltmRayError,
    SessionNotFoundError,
)
from lltm_ray.llamacpp import wire
from lltm_ray.llamacpp.client import LlamaClient
from lltm_ray.llamacpp.replies import Reply
from lltm_ray.llamacpp.sse import Collector
from lltm_ray.records import Completion, StreamEvent

__all__ = ["Session", "SessionInfo", "Sessions", "sessions_of"]

log = logging.getLogger(__name__)

_PATH = "/lltm/sessions"
TIMEOUT_S = 3600.0


class Sessions:
    """The sessions that one key may see.

    Args:
        url: of the gateway.
        api_key: one of the gateway's; whose tenant the sessions are.
        timeout_s: longest life of one request.
    """

    def __init__(self, url: str, *, api_key: str = "", timeout_s: float = TIMEOUT_S) -> None:
        self._client = _Client(url, api_key=api_key, timeout_s=timeout_s)

    def open(self, name: str, *, system: str = "", messages: str | Messages | None = None, model: str = "") -> Session:
        """A session to go on with, as it was saved; a new one where nothing is kept under the name.

        Args:
            name: letters, digits and `._@+-`.
            system: the system prompt of a new one.
            messages: what was said so far, where that is not kept, or another conversation is to take the name.
            model: of a new one, on a fleet that serves several.

        Raises:
            ConfigError: a saved one has another system prompt or model, or its messages were not kept.
        """
        try:
            info = self.get(name)
        except SessionNotFoundError:
            info = SessionInfo(name=name, model=model)
        start = [{"role": "system", "content": system}] if system else []
        if not info.message_count or messages is not None:
            return Session(self, self._client, info, [*start, *(as_messages(messages) if messages else ())])
        if not info.has_text:
            raise ConfigError("messages", None, f"session {name!r} was saved without its messages: give them")
        kept = list(info.messages)
        if system and kept[:1] != start:
            raise ConfigError("system", system, f"session {name!r} began with another: leave it out, or delete it")
        if model and model != info.model:
            raise ConfigError("model", model, f"session {name!r} is of {info.model!r}: leave it out, or delete it")
        return Session(self, self._client, info, kept)

    def save(
        self, name: str, messages: str | Messages, *, model: str = "", keep_text: bool = True, **fields: Any
    ) -> SessionInfo:
        """Keep a conversation and its KV cache, wherever in the fleet it is; computed now, where it is nowhere.

        Args:
            name: what is kept under it already is replaced, whole.
            messages: all that was said, the last answer included.
            model: served name; empty: the fleet's first.
            keep_text: whether the messages are kept, too. False: the messages are not kept; the cache file still holds
                the tokens, so whoever can read it and has the model can read what was said.
            fields: `tools`, `chat_template_kwargs`, `reasoning_effort`, as in the conversation's requests.

        Returns:
            Its `tokens` are 0 where no cache could be kept, and `why` says why.

        Raises:
            ConfigError: a name, message or field that cannot be kept, or the fleet keeps no sessions, or too many.
            DiskFullError: other conversations fill `gateway.sessions_mib`; nothing was changed.
            LltmRayError: the gateway does not answer.
        """
        body = {"messages": as_messages(messages), **({"model": model} if model else {}), **fields}
        query = {"name": name} | ({} if keep_text else {"text": "0"})
        return _info(self._ask("POST", query, body))

    def restore(self, name: str) -> SessionInfo:
        """Bring a session's cache into a slot now, so that its next request need not wait for that.

        Returns:
            With what was found cached or restored (`cached_tokens`) and what had to be computed (`computed_tokens`).
        """
        return _info(self._ask("POST", {"name": name}, path=f"{_PATH}/restore"))

    def get(self, name: str) -> SessionInfo:
        """One session with its messages; SessionNotFoundError where there is none."""
        return _info(self._ask("GET", {"name": name}))

    def list(self) -> tuple[SessionInfo, ...]:
        """All of them, without messages, the one used last first."""
        return tuple(_info(each) for each in self._ask("GET", {}))

    def delete(self, name: str) -> None:
        """Remove a session from disk."""
        self._ask("DELETE", {"name": name})

    def rename(self, name: str, to: str) -> SessionInfo:
        """Give it another name; ConfigError where that is taken."""
        return _info(self._ask("POST", {"name": name, "to": check_name(to, "to")}, path=f"{_PATH}/rename"))

    def close(self) -> None:
        """Close idle connections."""
        self._client.close()

    def _ask(self, method: str, query: Mapping[str, str], body: Any = None, *, path: str = _PATH) -> Any:
        if "name" in query:
            check_name(query["name"])
        errors = frozenset(range(400, 600))
        call = wire.Call(method=method, path=path, query=query, body=body, parse=lambda reply: reply, accept=errors)
        reply = self._client.send(call)
        if reply.status == 200:
            return reply.json()
        raise _refusal(reply, query.get("name", ""))


class Session:
    """A conversation under a name. A request that fails leaves no trace in it.

    As a context manager it is saved at the end of the block, unless that raises.
    """

    def __init__(self, sessions: Sessions, client: _Client, info: SessionInfo, messages: Messages) -> None:
        self._sessions, self._client = sessions, client
        self.name = check_name(info.name)
        self.model = info.model
        self.messages = messages
        """All that was said, the system prompt first."""
        self.restored_tokens = 0
        """Prompt tokens that the last request found restored, as its reply counted them."""
        self.why = ""
        """Why the last request restored nothing of what is kept, where that is so."""
        self._fields = dict(info.fields)

    def ask(self, text: str, **params: Any) -> Completion:
        """The answer to one more message; `params` as in /v1/chat/completions.

        Raises:
            ConfigError: an empty message, or a misspelt or wrong parameter; nothing was sent.
            UpstreamError: the request was refused; one of them, that the conversation is longer than a slot.
            LltmRayError: see `LlamaClient`.
        """
        collector = Collector()
        for event in self.stream(text, **params):
            collector.add(event)
        return collector.result()

    def stream(self, text: str, **params: Any) -> Generator[StreamEvent]:
        """The same, event by event; of an answer that is left early what came is kept."""
        check_text("text", text)
        asked = {"role": "user", "content": text}
        params = self._fields | params
        client, collector = self._client.sending({SESSION_HEADER: self.name}), Collector()
        own = {"model": self.model} if self.model else {}
        events = client.chat_stream([*self.messages, asked], **(own | params))
        answered = False
        try:
            for event in events:
                answered = True
                collector.add(event)
                yield event
        except Exception:
            answered = False
            raise
        finally:
            events.close()
            if answered:
                self._fields = {each: params[each] for each in HEAD_FIELDS if each in params}
                self._note(client.outcome, asked, collector.result())

    def save(self, *, keep_text: bool = True) -> SessionInfo:
        """Keep it as it is now; see `Sessions.save`."""
        model, fields = self.model, self._fields
        info = self._sessions.save(self.name, self.messages, model=model, keep_text=keep_text, **fields)
        self.model = info.model
        return info

    def _note(self, outcome: str, asked: dict[str, Any], done: Completion) -> None:
        answer: dict[str, Any] = {"role": "assistant", "content": done.text}
        if done.tool_calls:
            answer["tool_calls"] = [_tool_call(call) for call in done.tool_calls]
        self.messages += [asked, answer]
        self.restored_tokens = done.timings.cache_n if outcome.startswith(RESTORED) else 0
        self.why = outcome.partition("; ")[2] if outcome.startswith("computed") else ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.messages:
            return
        try:
            self.save()  # also after an error: what was said until then was said
        except LltmRayError as failure:
            if error is None:
                raise
            log.warning("session %s is not saved: %s", self.name, failure)


class _Client(LlamaClient):
    """Hears what became of the session that a request names."""

    outcome = ""

    def _ask(self, session: requests.Session, call: Any, headers: Mapping[str, str]) -> requests.Response:
        response = super()._ask(session, call, headers)
        self.outcome = response.headers.get(SESSION_HEADER, "")
        return response


def sessions_of(endpoint: str | None, api_key_file: str | None) -> Sessions:
    """Those of a fleet, as its first key sees them.

    Raises:
        FleetError: it has no gateway, which keeps them.
        ConfigError: its key file cannot be read on this machine.
    """
    if endpoint is None:
        raise FleetError("sessions are kept by the gateway, and this fleet has none: start it with gateway={}")
    return Sessions(endpoint, api_key=_first_key(api_key_file) if api_key_file else "")


def _first_key(path: str) -> str:
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = f"cannot be read here: {error}; use lltm_ray.actors.sessions.Sessions(url, api_key=...)"
        raise ConfigError("api_key_file", path, why) from error
    return next((line.split()[0] for line in lines if line.strip() and not line.strip().startswith("#")), "")


def _info(raw: Any) -> SessionInfo:
    """Without what another version's gateway says besides."""
    known = {each.name: raw[each.name] for each in fields(SessionInfo) if each.name in raw}
    return SessionInfo(**{**known, "messages": tuple(known.get("messages", ()))})


def _tool_call(call: Any) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _refusal(reply: Reply, name: str) -> LltmRayError:
    """The gateway's own sentence, as the error that it was there."""
    try:
        message = str(reply.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return LltmRayError(f"that is no gateway's answer: {reply.status} {reply.text[:200]!r}")
    field, mark, rest = message.partition("=")
    if reply.status == SessionNotFoundError.http_status and field == "name":
        return SessionNotFoundError(name)
    if reply.status == ConfigError.http_status and mark and field.replace(".", "").isidentifier():
        value, _, why = rest.partition(": ")
        return ConfigError(field, value.strip("'"), why)
    known = (each for each in (AuthenticationError, DiskFullError) if each.http_status == reply.status)
    return next(known, LltmRayError)(message)
