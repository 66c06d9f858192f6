"""Plain data into settings dataclasses: built, merged and checked; every refusal names field, value and remedy."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from numbers import Real
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
        kind = "" if isinstance(value, Real) else "a number "
        check(value is None or (not kind and low <= value <= high), name, value, f"must be {kind}from {low} to {high}")


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


def build(cls: type[Any], raw: Mapping[str, Any], where: str = "", root: type[Any] | None = None) -> Any:
    """Make a settings dataclass from plain data.

    Args:
        cls: the dataclass.
        raw: its fields; those that are dataclasses themselves as tables.
        where: what stands before its fields' names, `section.`.
        root: the dataclass in which it is a table; None: it is none.

    Raises:
        ConfigError: a field that is unknown, missing, of a wrong type or refused, by its whole name.
    """
    hints = get_type_hints(cls)
    known = {item.name for item in fields(cls)}
    values = {}
    for name, value in raw.items():
        if name not in known:
            raise ConfigError(where + name, value, _unknown(name, value, hints, root or cls))
        try:
            values[name] = _convert(hints[name], value, where + name, root or cls)
        except ConfigError as error:
            meant = _meant(name, value, hints, root or cls) if error.field == where + name else ""
            raise ConfigError(error.field, error.value, error.why + meant) from error.__cause__
    for item in fields(cls):
        check(not _is_needed(item) or item.name in values, where + item.name, None, "is missing, and has no default")
    try:
        return cls(**values)
    except ConfigError as error:
        raise ConfigError(where + error.field, error.value, error.why) from error.__cause__


def _is_needed(item: Field[Any]) -> bool:
    return item.default is MISSING and item.default_factory is MISSING


def _unknown(name: str, value: Any, known: Mapping[str, Any], root: type[Any]) -> str:
    """What is said of a setting that its table has not; perhaps it only stands below a wrong header."""
    hints = get_type_hints(root)
    tables = [(table, part) for table, hint in hints.items() for part in (hint, *get_args(hint)) if is_dataclass(part)]
    homes = [table for table, part in [("the top level", root), *tables] if name in get_type_hints(part)]
    home = f"{homes[0]} has one of this name; " if homes else ""
    close = difflib.get_close_matches(name, known, n=2)
    near = " or ".join(sorted(close, key=lambda each: not _takes(known[each], value, root)))
    return f"unknown setting; {home}" + (f"did you mean {near}?" if near else f"known are {', '.join(sorted(known))}")


def _meant(name: str, value: Any, known: Mapping[str, Any], root: type[Any]) -> str:
    """The setting of nearly the same name that takes a value which this one does not: `engines` for `engine`."""
    close = [each for each in difflib.get_close_matches(name, known) if _takes(known[each], value, root)]
    return f"; did you mean {close[0]}?" if close else ""


def _takes(hint: Any, value: Any, root: type[Any]) -> bool:
    """Whether a setting of this type can have the value: of two names that were perhaps meant, its is the likelier."""
    try:
        _convert(hint, value, "", root)
    except ConfigError:
        return False
    return True


def _convert(hint: Any, value: Any, name: str, root: type[Any]) -> Any:
    if get_origin(hint) is tuple:
        form = f": a table [[{name}]] for each" if is_dataclass(get_args(hint)[0]) else ""
        check(isinstance(value, list | tuple), name, value, f"must be a list{form}")
        return tuple(_convert(get_args(hint)[0], item, f"{name}[{place}]", root) for place, item in enumerate(value))
    choices = [choice for choice in (get_args(hint) or (hint,)) if choice is not type(None)]
    if value is None and type(None) in get_args(hint):
        return None
    if is_dataclass(choices[0]) and isinstance(value, Mapping):
        return build(choices[0], value, f"{name}.", root)  # type: ignore[arg-type]
    if float in choices and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    right = type(value) in choices
    kinds = (_table(choice, name) if is_dataclass(choice) else choice.__name__ for choice in choices)
    check(right, name, value, f"must be {' or '.join(kinds)}")
    return value


def _table(cls: Any, name: str) -> str:
    """What a table is in TOML, such as `a table [[models]], with its model`."""
    plain, needed = re.sub(r"\[\d+\]", "", name), [item.name for item in fields(cls) if _is_needed(item)]
    form = f"[[{plain}]]" if name.endswith("]") else f"[{plain}]"
    return f"a table {form}" + (f", with its {' and '.join(needed)}" if needed else "") + " (in Python a dict)"
