"""Sessions: a conversation and the KV cache of its slot are kept under a name, beyond the end of the fleet.

    save     the conversation, one token long, as a request like any other: it runs where its cache is, or makes it
             -> slot save, while the slot is still claimed -> carried into the store -> manifest
    request  x-lltm-session: its file is offered -> the shelf restores it into the slot, or says why not -> it is sent
    restore  the same as a save, without the save: the cache is in a slot before the next request comes

So whoever holds the conversation, this gateway's part of the slots, another's, or a server's own memory, is found as
for any request, and what a restored slot was worth stands in a reply. Whatever fails costs time and nothing else.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

from lltm_ray._prefix import SALT_BYTES, hash_prefixes
from lltm_ray._sessions import HEAD_FIELDS, SESSION_HEADER, Offer, SessionInfo, check_name
from lltm_ray.config import GatewayConfig
from lltm_ray.errors import ConfigError, DeadlineError, LltmRayError, SessionNotFoundError, UpstreamError
from lltm_ray.gateway.ask import build_ask
from lltm_ray.gateway.headers import find
from lltm_ray.gateway.pages import is_of_page
from lltm_ray.gateway.relay import Relay
from lltm_ray.gateway.replies import JSON, Message, encode
from lltm_ray.gateway.request import INLINE_BYTES, Keep, Request, understand
from lltm_ray.gateway.session_manifest import Kept, Said
from lltm_ray.gateway.session_store import SessionStore, Unfit
from lltm_ray.gateway.shelf import WORTH_TOKENS, Shelf, hash_whole, other_seal
from lltm_ray.llamacpp.slot_folder import new_name
from lltm_ray.records import EngineInfo, EngineState, Timings, timings_from
from lltm_ray.routing.policy import Ask
from lltm_ray.routing.prompt import prompt_key
from lltm_ray.routing.router import Lease, Router

T = TypeVar("T")
HEAR_S = 1.5
"""From the end of a turn until every gateway has heard of it, and some more."""
_POLL_S = 0.05
_log = logging.getLogger(__name__)
_TOO_LONG = "exceed_context_size_error"
"""llama-server's own type of that error."""
_CHAT = "/v1/chat/completions"
_HEADER = SESSION_HEADER.encode("ascii")
_ENDS_OPEN = ("user", "tool")
"""Who may speak last for a model to answer."""


@dataclass(slots=True, kw_only=True)
class _Copy:
    """What became of a slot's copy."""

    file: str = ""
    seal: str = ""
    build: str = ""
    tokens: int = 0
    size_bytes: int = 0
    why: str = "llama-server answered in another way than expected"


class Sessions:
    """What one gateway does for named sessions.

    Args:
        store: where they are kept.
        router: knows what a request means.
        relay: carries the request that finds a conversation's slot.
        shelf: copies and restores slots.
        config: how long things may take.
    """

    def __init__(
        self,
        store: SessionStore,
        router: Router,
        relay: Relay,
        shelf: Shelf,
        config: GatewayConfig,
    ) -> None:
        self.store = store
        self._router, self._relay, self._shelf, self._config = router, relay, shelf, config

    async def offer(self, request: Request) -> None:
        """Put what is kept of the session that a request names beside what routing knows of it.

        A web page's request names none: the answer would tell the page which sessions there are.

        Raises:
            ConfigError: no such name is possible.
        """
        name = find(request.headers, _HEADER)
        if name is None or request.ask is None or is_of_page(request.headers):
            return
        text = check_name(name.decode("utf-8", "replace"), SESSION_HEADER)
        request.ask.offer = offer = Offer()
        try:
            kept, why = await asyncio.to_thread(self._look, request.tenant, text)
        except SessionNotFoundError:
            return
        except (OSError, ConfigError) as error:
            offer.refuse(getattr(error, "strerror", None) or str(error))
            return
        if why:
            offer.refuse(why)
            return
        offer.salt, offer.build = bytes.fromhex(kept.salt), kept.build
        offer.file, offer.outcome = self.store.slot_of(kept), "computed; its request wants no cache"

    def _look(self, tenant: str, name: str) -> tuple[Kept, str]:
        kept = self.store.load(tenant, name)
        self.store.touch(kept)
        return kept, self.store.check(kept)

    async def save(
        self, request: Request, name: str, body: dict[str, Any], *, size_bytes: int, keep_text: bool
    ) -> SessionInfo:
        """Keep a conversation under a name, in place of what was kept under it before.

        Args:
            request: who asks; the request that finds the slot is made of it.
            name: checked.
            body: `messages`, and optionally `model` and `HEAD_FIELDS`.
            size_bytes: of the body as JSON.
            keep_text: whether the messages are kept beside the cache; the cache's file holds their tokens anyway.

        Raises:
            LltmRayError: as for a chat of these messages, or as `SessionStore.commit`.
            OSError: the store cannot be written.
        """
        copy = _Copy()
        await asyncio.to_thread(self.store.admit, request.tenant, name)

        async def keep(lease: Lease) -> None:
            copy.why = await self._copy(lease, request.tenant, copy)

        try:
            timings = await self._pass_or_say_why(request, name, body, size_bytes, (keep, copy))
            kept = await off_loop(size_bytes, partial(_kept, request, name, body, copy))
        except BaseException:  # what nobody lists must not stay
            await asyncio.to_thread(self.store.discard, request.tenant, {copy.file})
            raise
        info = await asyncio.to_thread(self._commit, kept, _said(body) if keep_text else None)
        return replace(info, cached_tokens=timings.cache_n, computed_tokens=timings.prompt_n)

    async def _pass_or_say_why(
        self, request: Request, name: str, body: dict[str, Any], size_bytes: int, keeping: tuple[Keep, _Copy]
    ) -> Timings:
        """As `_pass`; what is longer than a slot has no cache to keep, but its messages stay."""
        keep, copy = keeping
        try:
            return await self._pass(request, name, body, size_bytes, keep)
        except UpstreamError as error:
            if _TOO_LONG not in error.body:
                raise
            copy.why = "it is longer than the context of a slot: raise engine.n_ctx, or lower engine.n_parallel"
            return Timings()

    def _commit(self, kept: Kept, said: Said | None) -> SessionInfo:
        return self.store.info(self.store.commit(kept, said))

    async def restore(self, request: Request, name: str) -> SessionInfo:
        """Bring a session's cache into a slot before its next request comes.

        Raises:
            SessionNotFoundError, ConfigError: there is none, or its messages are not kept.
            LltmRayError: as for a chat of its messages.
        """
        kept, said = await asyncio.to_thread(self.store.load_said, request.tenant, name)
        if said is None:
            raise ConfigError("name", name, "its messages are not kept: only a request that has them can restore it")
        body = {"model": kept.model, "messages": said.messages, **said.fields}
        timings = await self._pass(request, name, body, kept.said_bytes)
        offer = request.ask.offer if request.ask is not None else None
        why = offer.outcome.removeprefix("computed; ") if offer and offer.outcome.startswith("computed") else ""
        info = await asyncio.to_thread(self.store.info, kept)
        return replace(info, why=why, cached_tokens=timings.cache_n, computed_tokens=timings.prompt_n)

    def judge(self) -> Unfit:
        """What tells why no engine that is ready now can restore a session's cache; any thread may call it."""
        slot = 0 if self._config.policy == "residency" else -1
        return partial(unfit, [(each, self._shelf.unsavable(each, slot)) for each in self._router.ready()])

    # --- the request that finds the slot

    async def _pass(
        self, request: Request, name: str, body: dict[str, Any], size_bytes: int, keep: Keep | None = None
    ) -> Timings:
        """Have an engine read what it has not cached of a conversation; `request` gets its line in the account."""
        answer = _Answer()
        chat = body | {"messages": open_ended(body["messages"]), "max_tokens": 1}
        headers = [(b"content-type", JSON), (_HEADER, name.encode("ascii"))]
        inner = replace(request, path=_CHAT, query=b"", headers=headers, link=None, send=answer.hear, keep=keep)
        inner.body = await off_loop(size_bytes, partial(encode, chat))
        await understand(inner)
        patience_s = self._config.queue_timeout_s
        ask = partial(build_ask, inner, self._router, tenant=request.tenant, patience_s=patience_s)
        names_adapter = ":" in (inner.model or "")  # which only the loop may look up
        inner.ask = ask() if names_adapter else await off_loop(size_bytes, ask)
        await self.offer(inner)
        request.ask, request.model, request.is_accounted = inner.ask, inner.model, True
        if keep is not None:
            await self._hear(inner.ask)
        limit_s = self._config.request_timeout_s
        try:
            async with asyncio.timeout(limit_s):
                await self._relay.forward(inner)
        except TimeoutError:
            raise DeadlineError("the session", limit_s) from None
        finally:
            request.choice = inner.choice
        if answer.status != 200:
            raise UpstreamError(answer.status, answer.body.decode("utf-8", "replace"))
        return timings_from(request.ends.find(b'"timings":') or {})

    async def _hear(self, ask: Ask) -> None:
        """A turn that has just ended may be known to another gateway only, which tells within moments."""
        model = self._router.resolve(ask.model, ask.only)
        for _ in range(round(HEAR_S / _POLL_S)):
            if self._router.gossip.unheard_tokens(model, ask) <= WORTH_TOKENS:
                return
            await asyncio.sleep(_POLL_S)

    async def _copy(self, lease: Lease, tenant: str, copy: _Copy) -> str:
        """Copy the claimed slot into the tenant's place; why that is not done, or nothing."""
        engine, filename = lease.engine, new_name()
        if why := self._shelf.unsavable(engine, lease.slot):
            return why
        try:
            build = await self._shelf.slots.build(engine)
            done = await self._shelf.copy_out(engine, lease.slot, self._place(tenant), filename)
        except (OSError, LltmRayError) as error:
            why = getattr(error, "strerror", None) or str(error)
            _log.warning("%s: slot %d is not kept: %s", engine.name, lease.slot, why)
            return f"its slot could not be saved: {why}"
        if done.tokens < WORTH_TOKENS:
            return f"its {done.tokens} tokens are computed sooner than restored: a cache is kept from {WORTH_TOKENS} on"
        copy.file, copy.seal, copy.build = filename, engine.slot_seal, build
        copy.tokens, copy.size_bytes = done.tokens, done.size_bytes
        return ""

    def _place(self, tenant: str) -> EngineInfo:
        """As `SlotFiles` takes it: like the folder of an engine."""
        folder, node_id = str(self.store.place(tenant)), self.store.node_id
        return EngineInfo(name="sessions", model="", state=EngineState.STOPPED, node_id=node_id, slot_folder=folder)


class _Answer:
    """Takes what a client would be sent."""

    def __init__(self) -> None:
        self.status, self.body = 0, b""

    async def hear(self, message: Message) -> None:
        """One ASGI message."""
        self.status = message.get("status", self.status)
        self.body += message.get("body", b"")


def open_ended(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages that a model can answer, beginning as those of the next turn will: its user has just begun to speak."""
    is_open = messages[-1].get("role") in _ENDS_OPEN
    return messages if is_open else [*messages, {"role": "user", "content": ""}]


def unfit(engines: list[tuple[EngineInfo, str]], kept: Kept) -> str:
    """Why none of its model's engines can restore a session's cache; empty where one may, or none is there to ask."""
    own = ((each, why) for each, why in engines if each.model == kept.model)
    whys = [why or other_seal(each, kept.seal) or _too_small(each, kept.tokens) for each, why in own]
    return whys[0] if whys and all(whys) else ""


def _too_small(engine: EngineInfo, tokens: int) -> str:
    slot_tokens = engine.n_ctx if engine.kv_unified else engine.n_ctx // max(1, engine.slots_total)
    if tokens <= slot_tokens or not slot_tokens:
        return ""
    why = f"its {tokens:,} tokens are more than the {slot_tokens:,} of a slot"
    return f"{why}: the engines have less memory than they had (gpu_share, memory_limit_bytes)"


async def off_loop(size_bytes: int, work: Callable[[], T]) -> T:
    """Do what takes its time with so many bytes: with many in a thread, for others use the event loop."""
    return await asyncio.to_thread(work) if size_bytes > INLINE_BYTES else work()


def _said(body: dict[str, Any]) -> Said:
    return Said(messages=body["messages"], fields={each: body[each] for each in HEAD_FIELDS if each in body})


def _kept(request: Request, name: str, body: dict[str, Any], copy: _Copy) -> Kept:
    said = _said(body)
    key = prompt_key(_CHAT, {"messages": said.messages, **said.fields})
    salt = secrets.token_bytes(SALT_BYTES)
    return Kept(
        name=name,
        tenant=request.tenant,
        model=body.get("model") or (request.ask.model if request.ask is not None else ""),
        message_count=len(said.messages),
        file=copy.file,
        why=copy.why,
        seal=copy.seal,
        build=copy.build,
        tokens=copy.tokens,
        file_bytes=copy.size_bytes,
        salt=salt.hex(),
        key_bytes=len(key),
        whole=hash_whole(key, salt).hex(),
        hashes=hash_prefixes(key, salt).hex(),
        saved_unix_s=time.time(),
    )
