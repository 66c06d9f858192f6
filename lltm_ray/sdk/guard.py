"""`drain_before`: end a fleet in good order before the machine is taken back.

```python
with quick_start("tiny") as cluster, drain_before(cluster, folder="/kaggle/working", save={"chat.json": chat}):
    ...  # hours of work
```
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Event, Thread
from types import TracebackType
from typing import Any, Protocol, Self

from lltm_ray.driver import Cluster
from lltm_ray.errors import ConfigError
from lltm_ray.integrations.kaggle.deadline import Deadline, read_deadline

log = logging.getLogger(__name__)

_REPORT_PART = 1 / 3
"""Of the seconds that are left, for the report; draining needs the rest."""
_LONGEST_WAIT_S = 60.0
"""The clock may be set while we wait."""


class Saves(Protocol):
    """What can be saved, such as a `Conversation`."""

    def save(self, path: Path, /) -> Any:
        """Write it there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """What the guard did."""

    saved: tuple[Path, ...]
    """Files that were written."""
    failed: tuple[str, ...]
    """In one sentence each, what could not be done."""
    took_s: float
    left_s: float
    """Seconds that were left of the session when it was done; negative: too late."""


class Guard:
    """Waits on a thread of its own; a context manager that stops waiting.

    Args:
        cluster: the fleet.
        deadline: when the session ends; None: never, and the guard does nothing.
        seconds_left: how long before that it acts.
        folder: where files go.
        save: file name -> what is saved there.
        on_end: called last, on the guard's thread.
    """

    def __init__(
        self,
        cluster: Cluster,
        deadline: Deadline | None,
        seconds_left: float,
        *,
        folder: Path,
        save: Mapping[str, Saves],
        on_end: Callable[[Ended], Any] | None,
    ) -> None:
        self._cluster, self._deadline, self._seconds_left = cluster, deadline, seconds_left
        self._folder, self._save, self._on_end = folder, save, on_end
        self._cancelled, self._failed = Event(), list[str]()
        self.ended: Ended | None = None
        """What it did, once it has."""
        self._thread = Thread(target=self._wait, name="lltm-ray-guard", daemon=True)
        if deadline is not None:
            self._thread.start()

    def cancel(self) -> None:
        """Wait no longer; if it is at work already, let it finish."""
        self._cancelled.set()
        self.join()

    def join(self, timeout_s: float | None = None) -> Ended | None:
        """Wait for its end; what it did, if it did."""
        if self._deadline is not None:
            self._thread.join(timeout_s)
        return self.ended

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()

    def _wait(self) -> None:
        assert self._deadline is not None  # noqa: S101 - else there is no thread
        while (rest := self._deadline.left_s - self._seconds_left) > 0:
            if self._cancelled.wait(min(rest, _LONGEST_WAIT_S)):
                return
        if not self._cancelled.is_set():
            self._end(self._deadline)

    def _end(self, deadline: Deadline) -> None:
        """Save first what needs no fleet: draining may take longer than there is time."""
        log.warning("%.0f s are left of the session (%s): draining the fleet", deadline.left_s, deadline.reason)
        began = time.monotonic()
        saved = set(self._save_all())
        report = self._within(max(0.0, deadline.left_s) * _REPORT_PART, "the report", self._write_report)
        self._try("draining the fleet", self._cluster.stop)
        saved |= set(self._save_all())  # answers that came while it drained
        took = time.monotonic() - began
        files = (*sorted(saved), *([report] if report else []))
        ended = self.ended = Ended(saved=files, failed=tuple(self._failed), took_s=took, left_s=deadline.left_s)
        if self._on_end is not None:
            self._try("on_end", partial(self._on_end, ended))

    def _save_all(self) -> list[Path]:
        wrote = []
        for name, each in self._save.items():
            path = self._folder / name
            if self._try(f"saving {name}", partial(self._save_one, each, path)):
                wrote.append(path)
        return wrote

    @staticmethod
    def _save_one(each: Saves, path: Path) -> bool:
        each.save(path)
        return True

    def _write_report(self) -> Path:
        from lltm_ray.analytics.html import to_html

        path = self._folder / "report.html"
        path.write_text(to_html(self._cluster.report()), encoding="utf-8")
        return path

    def _within(self, limit_s: float, what: str, work: Callable[[], Path]) -> Path | None:
        """On a thread that is left behind when it takes too long."""
        done: list[Path | None] = []
        helper = Thread(target=lambda: done.append(self._try(what, work)), daemon=True)
        helper.start()
        helper.join(limit_s)
        if not done:
            self._failed.append(f"{what} was not done within {limit_s:.1f} s")
        return done[0] if done else None

    def _try(self, what: str, work: Callable[[], Any]) -> Any:
        """Nothing that fails may keep the rest from being done."""
        try:
            return work()
        except Exception as error:  # noqa: BLE001
            log.warning("%s failed: %s", what, error)
            why = f"{what}: {type(error).__name__}: {error}"
            if why not in self._failed:
                self._failed.append(why)
            return None


def drain_before(
    cluster: Cluster,
    seconds_left: float = 300.0,
    *,
    deadline: Deadline | None = None,
    folder: str | Path = ".",
    save: Mapping[str, Saves] | None = None,
    on_end: Callable[[Ended], Any] | None = None,
) -> Guard:
    """Watch the clock, and before the session ends save, write the report, drain the fleet and flush telemetry.

    Args:
        cluster: the fleet; it is stopped.
        seconds_left: how long before the end. A third of it is for the report; draining takes up to
            `gateway.drain_timeout_s` and `drain_timeout_s`, a minute by default.
        deadline: None: this session's, as `read_deadline` finds it; where nothing limits it the guard never acts.
        folder: where files go: `report.html` and those of `save`.
        save: file name -> what has `save(path)`, such as conversations; written before and after the drain.
        on_end: called last with what was done, on the guard's thread.

    Raises:
        ConfigError: `seconds_left` is not positive, or there is no such folder.
    """
    if not seconds_left > 0:
        raise ConfigError("seconds_left", seconds_left, "must be a positive number of seconds")
    place = Path(folder)
    if not place.is_dir():
        raise ConfigError("folder", str(folder), "is no folder")
    deadline = deadline or read_deadline()
    return Guard(cluster, deadline, seconds_left, folder=place, save=save or {}, on_end=on_end)
