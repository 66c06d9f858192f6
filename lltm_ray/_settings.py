"""Plain data into settings dataclasses: built, merged and checked; every refusal names field, value and remedy."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, get_args, get_origin, get_type_hints

from lltm_ray.errors import ConfigError


def check(ok: bool, name: str, value: Any, why: str) -> None:
    """Refuse unless `ok`."""
    if not ok:
        raise ConfigError(name, value, why)


def check_choice(name: str, value: str | None, choices: tuple[str, ...]) -> None:
    """Refuse what is not among the choices; None is always allowed."""
    check(value is None or value in choices, name, value, f"must be one of {', '.join(choices)}")


def check_range(settings: Any, **limits: tuple[float, float]) -> None:
    """Refuse fields outside their (lowest, highest); None is always allowed."""
    for name, (low, high) in limits.items():
        value = getattr(settings, name)
        check(value is None or low <= value <= high, name, value, f"must be from {low} to {high}")


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` on top of `base`, tables merged field by field."""
    merged = dict(base)
    for name, value in over.items():
        inner = merged.get(name)
        merged[name] = merge(inner, value) if isinstance(inner, Mapping) and isinstance(value, Mapping) else value
    return merged


def has(settings: Any, field: str) -> bool:
    """Whether a setting is among these; named as errors name it, such as `models[0].engine.n_ctx`."""
    for name in field.split("."):
        if not isinstance(settings, Mapping):
            break
        if (plain := name.partition("[")[0]) not in settings:
            return False
        settings = settings[plain]
    return True


def build(cls: type[Any], raw: Mapping[str, Any], where: str = "") -> Any:
    """Make a settings dataclass from plain data.

    Args:
        cls: the dataclass.
        raw: its fields; those that are dataclasses themselves as tables.
        where: what stands before its fields' names, `section.`.

    Raises:
        ConfigError: a field that is unknown, missing, of a wrong type or refused, by its whole name.
    """
    hints = get_type_hints(cls)
    known = {item.name for item in fields(cls)}
    values = {}
    for name, value in raw.items():
        near = " or ".join(difflib.get_close_matches(name, known, n=2))
        guess = f"did you mean {near}?" if near else f"known are {', '.join(sorted(known))}"
        check(name in known, where + name, value, f"unknown setting; {guess}")
        values[name] = _convert(hints[name], value, where + name)
    for item in fields(cls):
        has_default = item.default is not MISSING or item.default_factory is not MISSING
        check(has_default or item.name in values, where + item.name, None, "is missing, and has no default")
    try:
        return cls(**values)
    except ConfigError as error:
        raise ConfigError(where + error.field, error.value, error.why) from error.__cause__


def _convert(hint: Any, value: Any, name: str) -> Any:
    if get_origin(hint) is tuple:
        form = f": a table [[{name}]] for each" if is_dataclass(get_args(hint)[0]) else ""
        check(isinstance(value, list | tuple), name, value, f"must be a list{form}")
        return tuple(_convert(get_args(hint)[0], item, f"{name}[{place}]") for place, item in enumerate(value))
    choices = [choice for choice in (get_args(hint) or (hint,)) if choice is not type(None)]
    if value is None and type(None) in get_args(hint):
        return None
    if is_dataclass(choices[0]) and isinstance(value, Mapping):
        return build(choices[0], value, f"{name}.")  # type: ignore[arg-type]
    if float in choices and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    right = type(value) in choices
    kinds = (f"a table [{name}]" if is_dataclass(choice) else choice.__name__ for choice in choices)
    check(right, name, value, f"must be {' or '.join(kinds)}")
    return value
