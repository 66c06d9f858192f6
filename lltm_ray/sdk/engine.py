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
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from types import TracebackType
from typing import Any, Self

from lltm_ray._turns import Messages, check_text
from lltm_ray.actors.calls import ROUTES
from lltm_ray.actors.placement import read_nodes
from lltm_ray.config import FleetConfig, build, read_environment
from lltm_ray.driver import Cluster
from lltm_ray.errors import ConfigError, FleetError, LltmRayError, ModelNotFoundError
from lltm_ray.llamacpp.options import settle
from lltm_ray.records import Embeddings
from lltm_ray.sdk.figures import Figures
from lltm_ray.sdk.presence import check_models
from lltm_ray.sdk.result import InferResult, InferStream, of_completion

log = logging.getLogger(__name__)

Prompt = str | Messages
_OWN = ("model", "max_tokens", "raw", "timeout_s")
"""Options that have arguments of their own here, or are no llama-server's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Wish(FleetConfig):
    """What `load_model` takes by name."""

    gpu_layers: int | None = None
    ctx_size: int | None = None
    n_parallel: int | None = None

    def fleet(self) -> FleetConfig:
        """The same as a fleet's settings."""
        given = {each.name: getattr(self, each.name) for each in fields(FleetConfig)}
        own = {"n_gpu_layers": self.gpu_layers, "n_ctx": self.ctx_size, "n_parallel": self.n_parallel}
        changes: dict[str, Any] = {name: value for name, value in own.items() if value is not None}
        return FleetConfig(**given | {"engine": replace(self.engine, **changes)}).with_absolute_paths()


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

        Wrong settings, names and files are told while that one still serves. A fleet of this name that runs already is
        joined as it is: its own settings stay, and a warning names those that were given here.

        Args:
            model: `tiny`, a catalogue name, a path, or `repo:file[@revision]`.
            gpu_layers: layers on the GPU, `n_layer + 1` for all; None: as many as fit.
            ctx_size: KV tokens of all slots together; None: as many as fit, within reason.
            n_parallel: slots, requests answered at once by each engine.
            settings: other fields of `FleetConfig`: `engines=2, gpu_share=0.5, engine={...}`.

        Returns:
            True; whatever kept it from loading is raised.

        Raises:
            ConfigError: an unknown or wrong setting, or the fleet that runs under this name serves something else.
            LltmRayError: see `Cluster.start`.
        """
        own = {"gpu_layers": gpu_layers, "ctx_size": ctx_size, "n_parallel": n_parallel}
        settings |= {name: value for name, value in own.items() if value is not None}
        config = self._settle(model, settings)
        served = config.served()[0].name
        self._check_change(config, served)
        self.unload_model()
        cluster = self._join(served, settings)
        self._joined = cluster is not None
        self._cluster = cluster or self._start(config)
        self._served = served
        return True

    def _settle(self, model: str, settings: dict[str, Any]) -> FleetConfig:
        if "name" in settings:
            raise ConfigError("name", settings["name"], "is this object's: InferenceEngine(name)")
        wish: _Wish = build(_Wish, {"gateway": {"port": 0}, "name": self.fleet, "model": model} | settings)
        return wish.fleet()

    def _check_change(self, config: FleetConfig, served: str) -> None:
        """Refuse what would leave us with nothing, where something is loaded."""
        if self._cluster is None:
            return
        if self._joined:
            with suppress(FleetError):  # it has ended
                self._check_served(self._cluster, served)
        else:
            is_elsewhere = self._address or read_environment().ray_address or len(read_nodes()) > 1
            check_models(config, is_here=not is_elsewhere)

    def _check_served(self, cluster: Cluster, model: str) -> None:
        names = [each.name for each in cluster.status().models]
        if model not in names:
            why = f"fleet {self.fleet!r} serves {', '.join(names)}; load that, or InferenceEngine(another name)"
            raise ConfigError("model", model, why)

    def _join(self, model: str, settings: dict[str, Any]) -> Cluster | None:
        """The fleet that runs under our name, if one does; with its own settings."""
        try:
            cluster = Cluster.connect(self.fleet, address=self._address)
        except FleetError:
            return None
        except ConfigError:
            if self._address or read_environment().ray_address:  # a start would join the same
                raise
            return None
        try:
            self._check_served(cluster, model)
        except BaseException:
            cluster.close()
            raise
        if ignored := sorted(settings.keys() - {"served_name"}):
            log.warning("fleet %r runs already with its own settings; not used: %s", self.fleet, ", ".join(ignored))
        return cluster

    def _start(self, config: FleetConfig) -> Cluster:
        check_models(config, is_here=False)
        return Cluster.start(config, address=self._address)

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
        """One answer. A wrong call is raised; a request that fails is a false result, whose `text` raises its `error`.

        Args:
            prompt: a text, or a list of chat messages.
            max_tokens: longest answer.
            raw: give the text to the model as it is, without its chat template.
            params: as in /v1/chat/completions, with `raw` in /completion: temperature, top_p, top_k, seed, stop, ...;
                `timeout_s`; and `model`, another one that the fleet serves, or `model:adapter`. A misspelt one is
                refused, and so is a value that means nothing; `extra_body={...}` sends any name.

        Raises:
            ConfigError: `raw` with messages, an empty prompt, or a misspelt or wrong parameter.
            ModelNotFoundError: the fleet serves no such model.
            FleetError: no model is loaded.
        """
        params = self._read(params | {"max_tokens": max_tokens}, raw)
        if raw and not isinstance(prompt, str):
            raise ConfigError("raw", raw, "takes a text; messages need the chat template")
        if isinstance(prompt, str):
            check_text("prompt", prompt)
        cluster, began_s = self.cluster, time.perf_counter()
        try:
            done = cluster.complete(str(prompt), **params) if raw else cluster.chat(prompt, **params)
            result = of_completion(done, time.perf_counter() - began_s)
        except (ConfigError, ModelNotFoundError):
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
            ConfigError: `raw`, which only `infer` can do, an empty prompt, or a misspelt or wrong parameter.
            FleetError: no model is loaded.
        """
        params = self._read(params | {"max_tokens": max_tokens}, raw)
        if raw:
            raise ConfigError("raw", raw, "streams go through the chat template; use infer(raw=True)")
        if isinstance(prompt, str):
            check_text("prompt", prompt)
        events = self.cluster.stream(prompt, **params)
        return InferStream(events, callback, self._figures.add)

    def batch_infer(self, prompts: Sequence[Prompt], **params: Any) -> list[InferResult]:
        """Answers in the order of the prompts, computed at once on all slots of the model's engines; see `infer`.

        A prompt that fails, or is none, is a failed result in its place; the others are answered.

        Raises:
            ConfigError: one text, not a list of them; or a misspelt or wrong parameter.
            ModelNotFoundError: the fleet serves no such model.
        """
        if isinstance(prompts, str | Mapping) or not isinstance(prompts, Iterable):
            raise ConfigError("prompts", prompts, "must be a list of prompts; for one take infer")
        name = str(self._read(params, params.get("raw", False))["model"]).partition(":")[0]
        slots = sum(each.slots_total for each in self.cluster.status().engines if each.model == name)
        with ThreadPoolExecutor(max(1, slots)) as pool:
            return list(pool.map(lambda prompt: self._infer_one(prompt, params), prompts))

    def _read(self, params: Mapping[str, Any], raw: Any) -> dict[str, Any]:
        """The parameters of one call, refused before anything is asked of the fleet; with our model if they name none.

        Raises:
            ConfigError: a misspelt or wrong one.
        """
        if not isinstance(raw, bool):
            raise ConfigError("raw", raw, "must be bool")
        options = settle(ROUTES["complete" if raw else "chat"], params, own=_OWN)
        return options | {"model": options.get("model") or self._served}

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
