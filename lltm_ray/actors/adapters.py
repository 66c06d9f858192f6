"""A driver's view of its fleet's LoRA adapters: what there is, at which scales; other scales, and other adapters.

What a model's engines shall have is written into the directory first, so that an engine that starts meanwhile has it
too; then the running ones are told. llama-server loads adapters when it starts only: an engine that shall have others
is restarted, one after the other, and routers send its requests elsewhere from the moment before.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray

from lltm_ray.actors.crew import cause_of
from lltm_ray.actors.engine_adapters import check_files
from lltm_ray.actors.fleet import Fleet, get_engine
from lltm_ray.actors.watch import PROPAGATE_S
from lltm_ray.config import LoraAdapter, read_environment
from lltm_ray.errors import ConfigError, FleetError, LltmRayError, ModelDownloadError, ModelNotFoundError
from lltm_ray.models.resolve import resolve
from lltm_ray.records import Adapter, EngineInfo, EngineState, ModelInfo

log = logging.getLogger(__name__)

_ANSWER_S = 30.0
_TRIES, _PAUSE_S = 3, 0.5
_ROUNDS = 5
"""An engine that began to start just before a change was written is found in the next round."""
_SPARE_S = 60.0
_HERE = (EngineState.READY, EngineState.STARTING)
"""Others leave, or look the adapters up when they come back."""
_TROUBLE = (LltmRayError, ray.exceptions.RayError, ValueError)
"""An engine's own error, Ray's, and that of a name that is gone."""
Adapters = tuple[Adapter, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterInfo:
    """One adapter of one served model."""

    model: str
    name: str
    path: str
    scale: float
    """Of the start: what requests get that choose it by name; 0 is 1 for them."""
    scales: dict[str, float | None]
    """By engine: what requests that choose no adapter get of it there now; None: the engine has not loaded it."""


class FleetAdapters:
    """What `Cluster` does with adapters.

    Args:
        fleet: whose.
    """

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    def listing(self) -> list[AdapterInfo]:
        """See `Cluster.adapters`."""
        status = self._fleet.status()
        return [
            AdapterInfo(
                model=model.name,
                name=each.name,
                path=each.path,
                scale=each.scale,
                scales={
                    engine.name: next((own.own for own in engine.adapters if own.name == each.name), None)
                    for engine in status.engines
                    if engine.model == model.name
                },
            )
            for model in status.models
            for each in model.adapters
        ]

    def set_scale(self, name: str, scale: float) -> None:
        """See `Cluster.set_adapter_scale`."""
        _check_scale(scale)
        model, chosen = self._find(name)
        label, now, before = chosen.name, float(scale), dict[str, float]()
        self._amend(model.name, lambda known: _scaled(known, label, now))
        failed = self._rescale(model.name, label, now, before)
        if failed:
            try:
                self._amend(model.name, lambda known: _scaled(known, label, chosen.now, where=now))
            finally:
                stuck = self._set_back(label, before, failed)
            undone = sorted(before.keys() - failed.keys() - stuck.keys())
            raise FleetError(_half_done(f"{name}={scale:g}", failed, undone, sorted(stuck)))

    def load(self, path: str | Path, name: str | None, scale: float, model: str | None) -> None:
        """See `Cluster.load_adapter`."""
        _check_scale(scale)
        lora = LoraAdapter(path=str(Path(path).absolute()), scale=float(scale), name=name)
        served = self._model(model)
        wanted = Adapter(name=lora.label, scale=lora.scale, path=lora.path)
        same = [each for each in served.adapters if each.name == wanted.name]
        if same and (same[0].path, same[0].scale) != (wanted.path, wanted.scale):
            raise ConfigError("name", wanted.name, f"{served.name!r} has another one of this name: unload that first")
        self._change(served, served.adapters if same else (*served.adapters, wanted))

    def unload(self, name: str) -> None:
        """See `Cluster.unload_adapter`."""
        model, chosen = self._find(name)
        self._change(model, tuple(each for each in model.adapters if each.name != chosen.name))

    # --- which

    def _model(self, name: str | None) -> ModelInfo:
        models = self._fleet.status().models
        chosen = [each for each in models if name in (None, each.name)]
        if not chosen:
            raise ModelNotFoundError(str(name), f"this fleet serves {', '.join(each.name for each in models)}")
        if len(chosen) > 1:
            raise ConfigError("model", name, f"name one of {', '.join(each.name for each in models)}")
        return chosen[0]

    def _find(self, name: str) -> tuple[ModelInfo, Adapter]:
        models = self._fleet.status().models
        known = {f"{model.name}:{each.name}": (model, each) for model in models for each in model.adapters}
        found = [pair for full, pair in known.items() if name in (full, pair[1].name)]
        if not found:
            raise ModelNotFoundError(
                name, f"adapters are {', '.join(known)}" if known else "this fleet has no adapters"
            )
        if len(found) > 1:
            raise ConfigError("name", name, f"several models have it: say {' or '.join(known)}")
        return found[0]

    def _engines(self, model: str) -> list[EngineInfo]:
        return [each for each in self._fleet.status().engines if each.model == model and each.state in _HERE]

    # --- telling

    def _note(self, model: str, before: Adapters, after: Adapters) -> None:
        if before != after and not self._write(model, before, after):
            raise FleetError(f"somebody else changes the adapters of {model!r} at this moment; look, and try again")

    def _amend(self, model: str, change: Callable[[Adapters], Adapters]) -> None:
        """Change what is written there now, whoever else writes."""
        for _ in range(_ROUNDS):
            before = self._model(model).adapters
            after = change(before)
            if before == after or self._write(model, before, after):
                return
        raise FleetError(f"somebody else changes the adapters of {model!r} all the time; look, and try again")

    def _write(self, model: str, before: Adapters, after: Adapters) -> bool:
        done: bool = ray.get(self._fleet.directory.note_adapters.remote(model, before, after), timeout=_ANSWER_S)
        return done

    def _rescale(self, model: str, label: str, now: float, before: dict[str, float]) -> dict[str, str]:
        """Tell all engines, until all show it; returns why some did not take it, `before` gets what each had."""
        for _ in range(_ROUNDS):  # one that read the old scale while we wrote shows itself a moment later
            shown = {each.name: has.own for each in self._engines(model) for has in each.adapters if has.name == label}
            wrong = {engine: own for engine, own in shown.items() if own != now}
            before |= {engine: own for engine, own in wrong.items() if engine not in before}
            failed = self._tell(wrong, lambda _, engine: engine.set_scales.remote({label: now}))
            if failed:
                return failed
            time.sleep(PROPAGATE_S)
            if not wrong:
                return {}
        return dict.fromkeys(wrong, "somebody else gives it another scale at this moment")

    def _set_back(self, label: str, before: dict[str, float], failed: Iterable[str]) -> dict[str, str]:
        """Those that took it; one that did not answer may have taken it, and hears of this when it answers again."""
        for name in failed:
            self._call(name, lambda name, engine: engine.set_scales.remote({label: before[name]}), {})
        took = before.keys() - set(failed)
        return self._tell(took, lambda name, engine: engine.set_scales.remote({label: before[name]}))

    def _tell(self, engines: Iterable[str], call: Callable[[str, Any], Any]) -> dict[str, str]:
        """One call for each engine, all at once, and again those that fail; returns why some did not."""
        failed: dict[str, str] = {}
        todo = list(engines)
        for attempt in range(_TRIES):
            time.sleep(_PAUSE_S if attempt else 0.0)
            failed = {}
            calls = {name: self._call(name, call, failed) for name in todo}
            for name in calls.keys() - failed.keys():
                try:
                    ray.get(calls[name], timeout=_ANSWER_S)
                except _TROUBLE as error:
                    ray.cancel(calls[name])
                    failed[name] = str(cause_of(error))
            todo = list(failed)
            if not todo:
                break
        return failed

    def _call(self, name: str, call: Callable[[str, Any], Any], failed: dict[str, str]) -> Any:
        try:
            return call(name, get_engine(self._fleet.config.name, name))
        except ValueError as error:
            failed[name] = str(error)
            return None

    # --- other adapters

    def _change(self, model: ModelInfo, after: Adapters) -> None:
        self._check(model, after)
        touched: list[str] = []
        self._note(model.name, model.adapters, after)
        try:
            self._roll(model.name, touched)
        except _TROUBLE as error:
            why, others = str(cause_of(error)), list[str]()
            try:
                self._amend(model.name, lambda known: _undone(known, model.adapters, after))
                others = [each.name for each in self._odd(model.name) if each.state is EngineState.READY]
            finally:
                stuck = self._roll_back([*touched, *others])
            failed = touched[-1] if touched else "an engine that was starting"
            undone = [each for each in dict.fromkeys(touched) if each not in stuck]
            raise FleetError(_half_done("the change", {failed: why}, undone, stuck)) from error
        time.sleep(PROPAGATE_S)

    def _check(self, model: ModelInfo, after: Adapters) -> None:
        """Before anybody is disturbed: the settings, and the files as each engine's node has them."""
        config = self._fleet.config
        own = next((each.engine for each in config.served() if each.name == model.name), None) or config.engine
        replace(own, lora=tuple(LoraAdapter(path=each.path, scale=each.scale, name=each.name) for each in after))
        ready = [each for each in self._engines(model.name) if each.state is EngineState.READY]
        for engine in ready:
            self._ask(engine.name, "check_adapters", after, limit_s=_ANSWER_S)
        if not ready and (new := [each for each in after if each not in model.adapters]):
            self._check_here(model.name, new)

    def _check_here(self, model: str, adapters: Sequence[Adapter]) -> None:
        """Instead of an engine; one that starts later would fail for a wrong file, and again and again."""
        file = next((each.model for each in self._fleet.config.served() if each.name == model), model)
        environment = read_environment()
        try:
            path = resolve(file, cache_dir=environment.cache_dir, offline=True).path
        except (ModelNotFoundError, ModelDownloadError) as error:
            why = f"no engine of {model!r} is ready to check it, and the model is not on this node ({error})"
            raise FleetError(f"{why}; start an engine, then load it again") from None
        check_files(path, adapters)

    def _odd(self, model: str) -> list[EngineInfo]:
        """Engines with other adapters than are wanted now: others may have changed that since."""
        wanted = _files(self._model(model).adapters)
        return [each for each in self._engines(model) if _files(each.adapters) != wanted]

    def _roll(self, model: str, touched: list[str]) -> None:
        """Engine after engine, until all have what is wanted."""
        for _ in range(_ROUNDS):
            todo = self._odd(model)
            if not todo:
                return
            for engine in todo:
                if engine.state is EngineState.STARTING:  # with these already, or it is one of the next round
                    self._ask(engine.name, "ensure_ready", limit_s=self._start_s)
                else:
                    touched.append(engine.name)
                    self._restart(engine.name)
        raise FleetError(f"engines of {model!r} start faster than they can be given adapters; try again")

    def _roll_back(self, touched: Iterable[str]) -> list[str]:
        stuck = []
        for name in dict.fromkeys(touched):
            try:
                self._restart(name)
            except _TROUBLE as error:
                log.warning("%s cannot be given its adapters back: %s", name, cause_of(error))
                stuck.append(name)
        return stuck

    @property
    def _start_s(self) -> float:
        return self._fleet.config.start_timeout_s + _SPARE_S

    def _restart(self, name: str) -> None:
        drain_s = self._fleet.config.drain_timeout_s
        self._ask(name, "restart", drain_s, limit_s=2 * (drain_s + self._start_s))  # behind another driver's

    def _ask(self, name: str, method: str, *args: Any, limit_s: float) -> None:
        try:
            ray.get(getattr(get_engine(self._fleet.config.name, name), method).remote(*args), timeout=limit_s)
        except ray.exceptions.RayTaskError as error:
            raise cause_of(error) from None


def _check_scale(scale: float) -> None:
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale):
        raise ConfigError("scale", scale, "must be a number")


def _scaled(adapters: Adapters, label: str, now: float | None, where: float | None = None) -> Adapters:
    """One of them with another scale of now, if `where` is None or what it has."""
    return tuple(
        replace(each, now=now) if each.name == label and where in (None, each.now) else each for each in adapters
    )


def _undone(known: Adapters, before: Adapters, after: Adapters) -> Adapters:
    """`known` without what came, and with what went, from `before` to `after`; what others changed stays."""
    old, new = {each.name for each in before}, {each.name for each in after}
    found = [each for each in known if each.name in old or each.name not in new]
    for place, each in enumerate(before):
        if each.name not in new and each.name not in {one.name for one in found}:
            found.insert(place, each)
    return tuple(found)


def _files(adapters: Adapters) -> list[tuple[str, str]]:
    return [(each.name, each.path) for each in adapters]


def _half_done(what: str, failed: dict[str, str], undone: list[str], stuck: list[str]) -> str:
    text = f"{what} was not taken by {'; '.join(f'{name}: {why}' for name, why in failed.items())}"
    if undone:
        text += f" (set back on {', '.join(undone)})"
    return text + (f" (still changed on {', '.join(stuck)}: try again)" if stuck else "")
