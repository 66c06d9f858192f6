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
    explains: tuple[tuple[str, str], ...] = ()
    """Kind and subject of findings that count the same seconds, as far as they are there: this is their cause."""
    evidence: tuple[str, ...] = ()
    """Trace ids that show it, the clearest first; at most `MOST_EVIDENCE`."""


MOST_EVIDENCE = 5
_MOST_OF = 0.5
"""Part of a finding's impact that its causes must have to explain it; else it has more to it."""


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


def causes_of(findings: Sequence[Finding]) -> dict[int, int]:
    """Place of each finding that another one explains -> the place of that one, which nothing explains.

    A finding is explained where those that name it have at least half of its impact together; the worst one counts.
    """
    found: dict[int, int] = {}
    for place, each in enumerate(findings):
        causes = [i for i, cause in enumerate(findings) if (each.kind, each.subject) in cause.explains and i != place]
        if causes and sum(findings[i].impact_s for i in causes) >= _MOST_OF * each.impact_s:
            found[place] = max(causes, key=lambda i: findings[i].impact_s)
    return {place: cause for place, cause in found.items() if cause not in found}
