"""What analyses say: an `Answer` each, and the `Finding`s that are read from it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lltm_ray._optional import load


@dataclass(frozen=True, slots=True)
class Answer:
    """What one analysis found, small and in the host's memory."""

    tables: Mapping[str, Any]
    """Name -> `pandas.DataFrame` with codes replaced by names; a table grows with engines, phases and families, not
    with requests."""
    figures: Mapping[str, float] = field(default_factory=dict)
    """Name (with its unit) -> value; NaN: cannot be told."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Something an operator should know, in plain words."""

    kind: str
    """Class, of low cardinality: `straggler`, `interference`, ..."""
    subject: str
    """What it is about: an engine, a GPU, a prefix family, ..."""
    text: str
    """One or two sentences with the numbers."""
    advice: str
    """What to do: the setting to change, or the command to run."""
    impact_s: float
    """Seconds that requests of the window lost by it, over all of them; what findings are ranked by."""
    figures: Mapping[str, float] = field(default_factory=dict)
    """The numbers of `text`, and those it was judged by."""
    evidence: tuple[str, ...] = ()
    """Trace ids that show it, the clearest first; at most `MOST_EVIDENCE`."""


MOST_EVIDENCE = 5


def table(columns: Mapping[str, Sequence[Any]]) -> Any:
    """A host table of columns of equal length.

    Raises:
        MissingExtraError: pandas is not installed.
    """
    return load("pandas:DataFrame", extra="analytics", feature="analytics")(dict(columns))


def rows(frame: Any) -> Iterable[Any]:
    """A host table's rows as named tuples, in their order."""
    found: Iterable[Any] = frame.itertuples(index=False, name="Row")
    return found
