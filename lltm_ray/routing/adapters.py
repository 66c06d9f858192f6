"""LoRA adapters: which ones a request chooses, and how an engine is told.

What llama.cpp makes of it (server-context.cpp), and what follows from that:

- A request whose `lora` differs from that of its slot's last one clears the slot. One without `lora` runs with the
  server's own scales and clears nothing: it would go on from another adapter's keys and values. So every request to an
  engine with adapters says what it wants (`lora_field`), also where that is the engine's own setting.
- Requests with different adapters share no batch, and those of the first busy slot go first: the others wait until all
  of them have ended (`EngineView.is_taken`), and those that come later may join them. So while some wait there, none
  with other adapters are sent (`Row.is_promised`), and all have their turn.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lltm_ray.errors import ConfigError, ModelNotFoundError
from lltm_ray.records import Adapter, EngineInfo

__all__ = ["Lora", "by_ids", "check_name", "choose", "lora_field", "read_scales", "split_model"]

Lora = tuple[tuple[str, float | None], ...]
"""Chosen adapters and their scales, sorted by name; None instead of a scale: the adapter's own. Empty: no adapter."""


def split_model(model: str, served: Sequence[str]) -> tuple[str, str]:
    """`served:adapter` in two; without an adapter, or where nobody serves it, all of it and an empty text."""
    if model in served:
        return model, ""
    for name in sorted(served, key=len, reverse=True):
        if model.startswith(f"{name}:"):
            return name, model[len(name) + 1 :]
    return model, ""


def check_name(served: str, adapter: str, known: Sequence[Adapter]) -> None:
    """Raises ModelNotFoundError, which lists those that a served model has, unless this is one of them."""
    names = [each.name for each in known]
    if adapter not in names:
        there = ", ".join(f"{served}:{name}" for name in names)
        why = f"adapters of {served!r} are {there}" if there else f"{served!r} has no adapters"
        raise ModelNotFoundError(f"{served}:{adapter}", why)


def choose(model: str, raw: Any, served: str, engines: Iterable[EngineInfo]) -> Lora | None:
    """The adapters that a request chooses; None: the engine's own setting.

    Args:
        model: the request's own word, with an adapter that is there if it names one.
        raw: its field `lora`, as llama-server takes it.
        served: the model it means.
        engines: those that may take it.

    Raises:
        ConfigError: both choose, or `raw` is not what these engines would take.
    """
    adapter = split_model(model, (served,))[1]
    if adapter and raw:
        raise ConfigError("lora", raw, f"model {model!r} has chosen already; leave one of the two away")
    if adapter:
        return ((adapter, None),)
    numberings = sorted((engine.adapters for engine in engines if engine.adapters), key=len)
    if not (raw and numberings):
        return None
    all_have = numberings[0]  # one more may be under way
    if any(_numbers(each)[: len(all_have)] != _numbers(all_have) for each in numberings):
        raise ConfigError("lora", raw, "engines number their adapters differently: choose one as model:adapter")
    return by_ids(raw, all_have)


def _numbers(adapters: Sequence[Adapter]) -> list[tuple[str, float]]:
    return [(each.name, each.scale) for each in adapters]


def by_ids(raw: Any, known: Sequence[Adapter]) -> Lora | None:
    """The choice that llama-server's own field `lora` makes, None if it makes none; ids that are not named get 0.

    Args:
        raw: `[{"id": 0, "scale": 1.0}, ...]`; an empty list is the engine's own setting, as llama-server has it.
        known: the engine's adapters.

    Raises:
        ConfigError: not of that form, or an id that is not there.
    """
    scales = read_scales(raw, known)
    if not scales:
        return None
    own = {each.name: each.scale for each in known}
    named = ((known[id_].name, scale) for id_, scale in scales.items() if scale)
    return tuple(sorted((name, None if scale == (own[name] or 1.0) else scale) for name, scale in named))


def read_scales(raw: Any, known: Sequence[Adapter]) -> dict[int, float]:
    """Scale by id of a list as llama-server takes it; errors as `by_ids`."""
    ids = ", ".join(f"{id_} ({each.name})" for id_, each in enumerate(known))
    form = f'must be a list of {{"id": ..., "scale": ...}}; ids are {ids}'
    if not isinstance(raw, list):
        raise ConfigError("lora", raw, form)
    scales: dict[int, float] = {}
    for item in raw:
        id_, scale = (item.get("id"), item.get("scale", 0.0)) if isinstance(item, dict) else (None, None)
        if type(id_) is not int or not 0 <= id_ < len(known) or isinstance(scale, bool):
            raise ConfigError("lora", item, form)
        if not isinstance(scale, int | float) or not math.isfinite(scale):
            raise ConfigError("lora", item, form)
        scales[id_] = float(scale)
    return scales


def lora_field(lora: Lora | None, known: Sequence[Adapter], own: Mapping[int, float] | None = None) -> bytes:
    """`"lora":[...]` for an engine's request body; empty for an engine without adapters.

    Args:
        lora: the choice; None: the engine's own setting.
        known: the engine's adapters.
        own: scales by id that replaced those it was started with; ids that are not named have 0.
    """
    if not known:
        return b""
    chosen = None if lora is None else dict(lora)
    entries = []
    for id_, adapter in enumerate(known):
        if chosen is None:
            scale = adapter.own if own is None else own.get(id_, 0.0)
        else:
            asked = chosen.get(adapter.name, 0.0)
            scale = (adapter.scale or 1.0) if asked is None else asked
        entries.append({"id": id_, "scale": scale})
    return b'"lora":' + json.dumps(entries, separators=(",", ":")).encode("ascii")
