"""`InferenceEngine`: load a model, ask it, look at the figures; a fleet on this machine underneath.

```python
with InferenceEngine() as engine:
    engine.load_model("tiny", n_parallel=4)
    print(engine.infer("hi", max_tokens=16))
    for piece in engine.infer_stream("tell me more"):
        print(piece, end="")
```
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

from lltm_ray._turns import Messages
from lltm_ray.actors.calls import ROUTES
from lltm_ray.config import ModelConfig
from lltm_ray.driver import Cluster
from lltm_ray.errors import ConfigError, FleetError, LltmRayError
from lltm_ray.llamacpp.options import read_options
from lltm_ray.records import Embeddings
from lltm_ray.sdk.figures import Figures
from lltm_ray.sdk.result import InferResult, InferStream, of_completion

log = logging.getLogger(__name__)

Prompt = str | Messages
_OWN = ("model", "max_tokens", "raw", "timeout_s")
"""Options that have arguments of their own here, or are no llama-server's."""


class InferenceEngine:
    """One fleet, by the calls of a single-machine SDK. May be used from several threads.

    Args:
        fleet: the fleet's name; one that runs under it is joined, and left running by `unload_model`.
        address: Ray cluster, as `Cluster.start` takes it.
        keep: results whose times are kept for `get_metrics`; the oldest go first.
    """

    def __init__(self, fleet: str = "default", *, address: str | None = None, keep: int = 10_000) -> None:
        self.fleet = fleet
        self._address = address
        self._cluster: Cluster | None = None
        self._joined = False
        self._served = ""
        self._figures = Figures(keep)

    def load_model(
        self,
        model: str = "tiny",
        *,
        gpu_layers: int | None = None,
        ctx_size: int | None = None,
        n_parallel: int | None = None,
        **settings: Any,
    ) -> bool:
        """Serve a model and return once it can answer; another one that this object loaded is unloaded first.

        A fleet of this name that runs already is joined as it is: its own settings stay, and a warning names those
        that were given here.

        Args:
            model: `tiny`, a catalogue name, a path, or `repo:file[@revision]`.
            gpu_layers: layers on the GPU, `n_layer + 1` for all; None: as many as fit.
            ctx_size: KV tokens of all slots together; None: as many as fit, within reason.
            n_parallel: slots, requests answered at once by each engine.
            settings: other fields of `FleetConfig`: `engines=2, gpu_share=0.5, engine={...}`.

        Returns:
            True; whatever kept it from loading is raised.

        Raises:
            ConfigError: the fleet that runs under this name serves something else.
            LltmRayError: see `Cluster.start`.
        """
        self.unload_model()
        own = {"n_gpu_layers": gpu_layers, "n_ctx": ctx_size, "n_parallel": n_parallel}
        if own := {name: value for name, value in own.items() if value is not None}:
            settings["engine"] = {**settings.get("engine", {}), **own}
        served = ModelConfig(model=model, served_name=settings.get("served_name")).name
        cluster = self._join(served, settings)
        joined = cluster is not None
        if cluster is None:
            settings = {"gateway": {"port": 0}} | settings
            cluster = Cluster.start(address=self._address, name=self.fleet, model=model, **settings)
        self._cluster, self._joined, self._served = cluster, joined, served
        return True

    def _join(self, model: str, settings: dict[str, Any]) -> Cluster | None:
        """The fleet that runs under our name, if one does; with its own settings."""
        try:
            cluster = Cluster.connect(self.fleet, address=self._address)
        except (FleetError, ConfigError):
            return None
        try:
            served = [each.name for each in cluster.status().models]
            if model not in served:
                why = f"fleet {self.fleet!r} serves {', '.join(served)}; load that, or InferenceEngine(another name)"
                raise ConfigError("model", model, why)
        except BaseException:
            cluster.close()
            raise
        if ignored := sorted(settings.keys() - {"served_name"}):
            log.warning("fleet %r runs already with its own settings; not used: %s", self.fleet, ", ".join(ignored))
        return cluster

    def unload_model(self) -> None:
        """Stop the fleet, or let go of it if it ran before; without one nothing happens."""
        cluster, self._cluster = self._cluster, None
        if cluster is not None:
            cluster.close() if self._joined else cluster.stop()
        self._joined = False

    @property
    def is_loaded(self) -> bool:
        """Whether there is a model to ask."""
        return self._cluster is not None

    @property
    def cluster(self) -> Cluster:
        """The fleet itself, for everything that has no call here.

        Raises:
            FleetError: no model is loaded.
        """
        if self._cluster is None:
            raise FleetError("no model is loaded: call load_model first")
        return self._cluster

    # asking -----------------------------------------------------------------------------------------------------

    def infer(self, prompt: Prompt, *, max_tokens: int = 128, raw: bool = False, **params: Any) -> InferResult:
        """One answer. A wrong call is raised; a request that fails is a result, whose `text` raises its `error`.

        Where `text` is not read, `success` tells, and `check` raises.

        Args:
            prompt: a text, or a list of chat messages.
            max_tokens: longest answer.
            raw: give the text to the model as it is, without its chat template.
            params: as in /v1/chat/completions, with `raw` in /completion: temperature, top_p, top_k, seed, stop, ...;
                and `timeout_s`. A misspelt one is refused; `extra_body={...}` sends any name.

        Raises:
            ConfigError: `raw` with messages, no messages, or a misspelt or wrong parameter.
            FleetError: no model is loaded.
        """
        _check_options(params, raw=raw)
        if raw and not isinstance(prompt, str):
            raise ConfigError("raw", raw, "takes a text; messages need the chat template")
        cluster, began_s = self.cluster, time.perf_counter()
        params |= {"model": self._served, "max_tokens": max_tokens}
        try:
            done = cluster.complete(str(prompt), **params) if raw else cluster.chat(prompt, **params)
            result = of_completion(done, time.perf_counter() - began_s)
        except ConfigError:
            raise
        except LltmRayError as error:
            result = InferResult(latency_ms=(time.perf_counter() - began_s) * 1e3, error=error)
        self._figures.add(result)
        return result

    generate = infer

    def chat(self, messages: Prompt, **params: Any) -> InferResult:
        """One answer to a conversation; see `infer`."""
        return self.infer(messages, **params)

    def infer_stream(
        self,
        prompt: Prompt,
        callback: Callable[[str], None] | None = None,
        *,
        max_tokens: int = 128,
        raw: bool = False,
        **params: Any,
    ) -> InferStream:
        """An answer piece by piece as the model makes it; its `result` has the whole, with the time to first token.

        A request that fails raises its error from the iteration, after the pieces that came; `result` keeps both.

        Args:
            prompt: a text, or a list of chat messages.
            callback: called with each piece while the stream is read.
            max_tokens: longest answer.
            raw: must be false.
            params: as in `infer`.

        Raises:
            ConfigError: `raw`, which only `infer` can do, or a misspelt parameter.
            FleetError: no model is loaded.
        """
        _check_options(params)
        if raw:
            raise ConfigError("raw", raw, "streams go through the chat template; use infer(raw=True)")
        events = self.cluster.stream(prompt, model=self._served, max_tokens=max_tokens, **params)
        return InferStream(events, callback, self._figures.add)

    def batch_infer(self, prompts: Sequence[Prompt], **params: Any) -> list[InferResult]:
        """Answers in the order of the prompts, computed at once on all slots of the model's engines; see `infer`.

        A prompt that fails, or is none, is a failed result in its place; the others are answered.

        Raises:
            ConfigError: one text, not a list of them; or a misspelt parameter.
        """
        if isinstance(prompts, str):
            raise ConfigError("prompts", prompts, "must be a list of prompts; for one take infer")
        _check_options(params, raw=params.get("raw", False))
        slots = sum(each.slots_total for each in self.cluster.status().engines if each.model == self._served)
        with ThreadPoolExecutor(max(1, slots)) as pool:
            return list(pool.map(lambda prompt: self._infer_one(prompt, params), prompts))

    def _infer_one(self, prompt: Prompt, params: dict[str, Any]) -> InferResult:
        try:
            return self.infer(prompt, **params)
        except ConfigError as error:
            result = InferResult(latency_ms=0.0, error=error)
            self._figures.add(result)
            return result

    def embed(self, texts: str | list[str], **params: Any) -> Embeddings:
        """One vector for each text; the model must be loaded with `engine={"embeddings": True}`."""
        return self.cluster.embed(texts, **({"model": self._served} | params))

    def count_tokens(self, messages: Prompt) -> int:
        """Tokens of chat messages as the model's template writes them, its marks included."""
        return self.cluster.count_tokens(messages, model=self._served)

    @property
    def served_name(self) -> str:
        """What the model is called in requests, spans and metrics; empty before one is loaded."""
        return self._served

    @property
    def slot_tokens(self) -> int:
        """KV tokens of one slot: the longest request and its answer together."""
        engines = [each for each in self.cluster.status().engines if each.model == self._served and each.slots_total]
        return min((each.n_ctx // each.slots_total for each in engines), default=0)

    # figures ----------------------------------------------------------------------------------------------------

    def get_metrics(self) -> dict[str, dict[str, float]]:
        """Latency, time to first token and throughput of this object's requests; see `Figures.summary`."""
        return self._figures.summary()

    def reset_metrics(self) -> None:
        """Start counting anew."""
        self._figures.reset()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.unload_model()


def _check_options(params: Mapping[str, Any], *, raw: bool = False) -> None:
    """Before anything is asked of the fleet."""
    read_options(ROUTES["complete" if raw else "chat"], params, own=_OWN)
