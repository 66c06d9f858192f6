"""`lltm-ray top`: the live page in the terminal."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from http import HTTPStatus
from typing import Annotated, Any

import requests
import typer
from rich.console import Group, RenderableType
from rich.live import Live
from rich.text import Text

from lltm_ray.cli._endpoint import NameOption, UrlOption, endpoint_of
from lltm_ray.cli._output import OUT, JsonFlag, KeyFileOption, errors_end_the_command, print_json, read_key
from lltm_ray.cli._top_view import draw, plain
from lltm_ray.errors import AuthenticationError, ConfigError, LltmRayError

PATH = "/dashboard/events"
_TIMEOUT_S = (5.0, 12.0)
"""To connect; without a word: the gateway speaks each second, or after 5 s of trying."""
_PAUSES_S = (1.0, 2.0, 4.0, 8.0)
_STALE_S = 3.0
_FIXED_LINES = 20
"""Of the screen, around engines, GPUs and requests."""

_Once = Annotated[bool, typer.Option("--once", help="Print one look and end, as without a terminal.")]


@errors_end_the_command()
def top(
    *,
    url: UrlOption = "",
    name: NameOption = "default",
    api_key_file: KeyFileOption = None,
    once: _Once = False,
    as_json: JsonFlag = False,
) -> None:
    """Requests, tokens, latencies, engines with their slots, GPUs and recent requests of a running fleet, each second.

    Ctrl-C ends it. With --json each look is a line of JSON; with --once, too, one look is indented.
    """
    base, key = endpoint_of(url, name), read_key(api_key_file)
    if once or not (as_json or sys.stdout.isatty()):
        look = next(read_looks(base, key))
        print_json(look) if as_json else OUT.print(draw(look))
        return
    try:
        _print_lines(base, key) if as_json else _watch(base, key)
    except KeyboardInterrupt:
        return


def read_looks(base: str, key: str) -> Iterator[dict[str, Any]]:
    """Looks as they come.

    Raises:
        ConfigError: the URL is none.
        AuthenticationError: the gateway wants another key.
        LltmRayError: the gateway does not answer, or its telemetry does not, or it has none; also when the stream ends.
    """
    try:
        with requests.Session() as session:
            session.trust_env = False  # else a .netrc entry of that host would replace our key
            headers = {"Authorization": f"Bearer {key}"} if key else {}
            with session.get(base + PATH, headers=headers, stream=True, timeout=_TIMEOUT_S) as answer:
                if answer.status_code != HTTPStatus.OK:
                    raise _refusal(base, answer)
                yield from _read_events(answer)
    except ValueError as error:  # requests' own errors of a URL are ValueErrors
        raise ConfigError("url", base, "must look like http://127.0.0.1:8000") from error
    except requests.RequestException as error:
        raise LltmRayError(f"cannot reach {base}; is it up? (`lltm-ray up`)") from error
    raise LltmRayError(f"{base} ended the stream")


def _read_events(answer: requests.Response) -> Iterator[dict[str, Any]]:
    kind = b""
    for line in answer.iter_lines(chunk_size=None):
        name, _, value = line.partition(b": ")
        if name == b"event":
            kind = value
        elif name == b"data" and kind == b"look":
            yield json.loads(value)
        elif name == b"data" and kind == b"away":
            raise LltmRayError(json.loads(value))


def _refusal(base: str, answer: requests.Response) -> LltmRayError:
    """The gateway's own sentence."""
    try:
        message = answer.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = f"{base} answered {answer.status_code}"
    if answer.status_code == HTTPStatus.UNAUTHORIZED:
        return AuthenticationError(message)
    if answer.status_code == HTTPStatus.NOT_FOUND:
        return LltmRayError(f"{base} has no {PATH}: it is no gateway's, or an older one's")
    return LltmRayError(message)


def _print_lines(base: str, key: str) -> None:
    for look in read_looks(base, key):
        typer.echo(json.dumps(look, separators=(",", ":")))


class Screen:
    """The last look, and how things stand.

    Args:
        base: the gateway.
        clock: seconds that only grow.
    """

    def __init__(self, base: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.look: dict[str, Any] | None = None
        self.trouble = ""
        self._base, self._clock = base, clock
        self._came_at = 0.0

    def take(self, look: dict[str, Any]) -> None:
        """A new look."""
        self.look, self.trouble, self._came_at = look, "", self._clock()

    def __rich__(self) -> RenderableType:
        if self.look is None:
            return self._head()
        rows = len(self.look["engines"]) + max(len(self.look["gpus"]), len(self.look["nodes"]))
        most = max(OUT.height - _FIXED_LINES - rows, 1)
        return Group(self._head(), draw(self.look, most_requests=most))

    def _head(self) -> Text:
        age_s = self._clock() - self._came_at
        head = Text.assemble(("lltm_ray ", "bold"), (f"{self._base}  ", "dim"))
        if self.look is None:
            return head.append(self.trouble or "connecting …", "red" if self.trouble else "")
        if not self.trouble and age_s < _STALE_S:
            return head.append("live", "cyan")
        return head.append(f"{plain(self.trouble) or 'late'}; figures are {age_s:.0f} s old", "red")


def _watch(base: str, key: str) -> None:
    """Until interrupted; what is lost is taken up again, but a key or an address that is wrong stays wrong."""
    screen, failures = Screen(base), 0
    with Live(screen, console=OUT, screen=True, refresh_per_second=2):
        while True:
            try:
                for look in read_looks(base, key):
                    screen.take(look)
                    failures = 0
            except (ConfigError, AuthenticationError):
                raise
            except LltmRayError as error:
                screen.trouble = error.message
            time.sleep(_PAUSES_S[min(failures, len(_PAUSES_S) - 1)])
            failures += 1
