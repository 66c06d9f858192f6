"""Answers that speak for all engines: models, props, slots, metrics, LoRA adapters.

Each asks the engines side by side and keeps llama-server's own JSON, with the engine's name added.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from lltm_ray.errors import EngineNotReadyError, ModelNotFoundError, UpstreamError
from lltm_ray.gateway.drain_routes import Peers
from lltm_ray.gateway.exposition import merge_metrics
from lltm_ray.gateway.headers import build_request
from lltm_ray.gateway.pool import UpstreamPool
from lltm_ray.gateway.upstream import Headers
from lltm_ray.records import EngineInfo
from lltm_ray.routing.adapters import read_scales
from lltm_ray.routing.router import Router

ASK_TIMEOUT_S = 5.0
"""For one engine's answer; slots and props answer within a decode step, however busy the engine."""
_ANSWER_LIMIT_BYTES = 32 * 2**20
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Answer:
    """One engine's answer; `status` 0 when it gave none, with the reason in `body`."""

    engine: EngineInfo
    status: int
    body: bytes

    @property
    def why(self) -> str:
        """What a failed one says."""
        text = self.body.decode("utf-8", "replace")
        return UpstreamError(self.status, text).message if self.status else text

    def json(self) -> Any:
        """The parsed body of a good answer, else None."""
        if self.status != 200:
            return None
        try:
            return json.loads(self.body)
        except ValueError:
            _log.warning("engine %s: answer is not JSON", self.engine.name)
            return None


class Fleet:
    """Asks engines on behalf of the gateway."""

    def __init__(self, router: Router, pool: UpstreamPool, peers: Peers | None = None) -> None:
        self._router = router
        self._pool = pool
        self._peers = peers
        self._silent: set[tuple[str, bytes]] = set()

    async def models(self, only: str | None = None) -> dict[str, Any]:
        """`/v1/models`: each served name once, as one of its engines tells, then all adapters; with engine counts.

        Args:
            only: one served name, with its adapters; None: all of them.
        """
        names = self._router.models() if only is None else (only,)
        first = [ready[0] for ready in map(self._router.ready, names) if ready]
        told = {answer.engine.model: answer.json() for answer in await self._ask_all(first, b"/v1/models")}
        entries = [self._model_entry(name, told.get(name)) for name in names]
        shown = [new for _, new in entries] + [each for name in names for each in self._adapter_entries(name)]
        return {"models": [old for old, _ in entries], "object": "list", "data": shown}

    async def model(self, name: str) -> dict[str, Any]:
        """`/v1/models/{name}`: one entry of `data`, of a served name or one of its adapters.

        Raises:
            ModelNotFoundError: there is none of that name.
            EngineNotReadyError: the fleet is empty.
        """
        listed = await self.models(self._router.resolve(name))
        for each in listed["data"]:
            if each["id"] == name:
                return dict(each)
        raise ModelNotFoundError(name, "it was unloaded just now")

    def _model_entry(self, name: str, told: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        told = told if isinstance(told, dict) else {}
        old = dict(next(iter(told.get("models") or ()), {})) | {"name": name, "model": name}
        new = {"object": "model", "created": 0, "owned_by": "llamacpp"} | dict(next(iter(told.get("data") or ()), {}))
        counts = {"ready": len(self._router.ready(name)), "total": len(self._router.engines(name))}
        return old | {"engines": counts}, new | {"id": name, "engines": counts}

    def _adapter_entries(self, name: str) -> list[dict[str, Any]]:
        """What a model's adapters are called, as OpenAI's clients list them."""
        ready, every = (
            Counter(adapter.name for engine in engines for adapter in engine.adapters)
            for engines in (self._router.ready(name), self._router.engines(name))
        )
        return [
            {
                "id": f"{name}:{adapter}",
                "object": "model",
                "created": 0,
                "owned_by": "llamacpp",
                "parent": name,
                "engines": {"ready": ready[adapter], "total": every[adapter]},
            }
            for adapter in (each.name for each in self._router.adapters(name))
        ]

    async def props(self, engines: Sequence[EngineInfo]) -> dict[str, Any]:
        """`/props`: the first engine's object, and in `engines` each one's own.

        Raises:
            EngineNotReadyError: no engine answered.
        """
        own = [(answer.engine.name, answer.json()) for answer in await self._ask_all(engines, b"/props")]
        good = [(name, props) for name, props in own if isinstance(props, dict)]
        if not good:
            raise EngineNotReadyError("of this fleet", "not answering /props")
        return good[0][1] | {"engines": [{"name": name} | props for name, props in good]}

    async def slots(self, engines: Sequence[EngineInfo]) -> list[dict[str, Any]]:
        """`/slots`: every engine's slots, each with `engine`; one that does not answer is only in the log."""
        return _tagged(await self._ask_all(engines, b"/slots"))

    async def lora_adapters(self, engines: Sequence[EngineInfo]) -> list[dict[str, Any]]:
        """`GET /lora-adapters`: every engine's adapters, each with `engine`."""
        return _tagged(await self._ask_all(engines, b"/lora-adapters"))

    async def set_lora_adapters(
        self, engines: Sequence[EngineInfo], body: bytes, *, absent: Sequence[EngineInfo] = ()
    ) -> tuple[int, Any]:
        """`POST /lora-adapters` to all of them, exactly once each.

        Args:
            engines: those that can be asked.
            body: llama-server's own JSON.
            absent: engines that should have it too and are not ready; they count as failures.

        Returns:
            Status and JSON, llama-server's own when all agree.

        Raises:
            ConfigError: an id that an engine with known adapters does not have; llama-server would turn all off.
        """
        scales = {each.name: read_scales(json.loads(body), each.adapters) for each in engines if each.adapters}
        answers = await self._ask_all(engines, b"/lora-adapters", body)
        for answer in answers:
            if answer.status == 200 and answer.engine.name in scales:
                await self._rescaled(answer.engine.name, scales[answer.engine.name])
        failed = [answer for answer in answers if answer.status != 200]
        if not failed and not absent:
            return 200, {"success": True}
        told = [f"{each.engine.name}: {each.why}" for each in failed]
        told += [f"{engine.name}: is {engine.state}" for engine in absent]
        status = (failed[0].status if failed else 0) or 503
        kind = "invalid_request_error" if status == 400 else "server_error"
        asked = len(engines) + len(absent)
        message = f"{len(told)} of {asked} engines did not take the adapters: {'; '.join(told)}"
        return status, {"error": {"message": message, "type": kind, "code": status}}

    async def _rescaled(self, engine: str, scales: dict[int, float]) -> None:
        """From now on requests that choose no adapter are sent with these scales, by the other gateways, too."""
        self._router.rescale(engine, scales)
        if self._peers is not None:
            await self._peers.rescale(engine, scales)

    async def metrics(self, engines: Sequence[EngineInfo]) -> bytes:
        """`/metrics`: every engine's samples with a label `engine`, a comment for each engine that gave none.

        Each scrape resets llama.cpp's rate gauges.
        """
        answers = await self._ask_all(engines, b"/metrics")
        texts = [(each.engine.name, each.body.decode("utf-8", "replace")) for each in answers if each.status == 200]
        return merge_metrics(texts, [each.engine.name for each in answers if each.status != 200]).encode("utf-8")

    async def _ask_all(self, engines: Iterable[EngineInfo], target: bytes, body: bytes | None = None) -> list[Answer]:
        return await asyncio.gather(*(self._ask(engine, target, body) for engine in engines))

    async def _ask(self, engine: EngineInfo, target: bytes, body: bytes | None) -> Answer:
        headers: Headers = [(b"authorization", b"Bearer " + engine.api_key.encode("utf-8"))] if engine.api_key else []
        method = b"GET" if body is None else b"POST"
        request = build_request(method, target, engine.url, headers, body or b"")
        fetch = self._pool.fetch(engine.url, request, limit_bytes=_ANSWER_LIMIT_BYTES, fresh=body is not None)
        try:
            async with asyncio.timeout(ASK_TIMEOUT_S):
                status, _, answer = await fetch
        except (OSError, TimeoutError) as error:
            why = str(error) or f"no answer within {ASK_TIMEOUT_S:g} s"
            self._note(engine, target, why)
            return Answer(engine, 0, why.encode("utf-8"))
        self._note(engine, target, "" if status == 200 else f"status {status}")
        return Answer(engine, status, answer)

    def _note(self, engine: EngineInfo, target: bytes, trouble: str) -> None:
        """Log an engine's silence once, however often it is asked, and its end."""
        key, path = (engine.name, target), target.decode("ascii")
        if trouble and key not in self._silent:
            known = {each.name for each in self._router.engines()}
            self._silent = {each for each in self._silent if each[0] in known} | {key}
            _log.warning("engine %s: %s unanswered: %s", engine.name, path, trouble)
        elif not trouble and key in self._silent:
            self._silent.discard(key)
            _log.warning("engine %s: %s is answered again", engine.name, path)


def _tagged(answers: Iterable[Answer]) -> list[dict[str, Any]]:
    tagged: list[dict[str, Any]] = []
    for answer in answers:
        items = answer.json()
        tagged += [item | {"engine": answer.engine.name} for item in items or () if isinstance(item, dict)]
    return tagged
