"""`lltm-ray drain`: move an engine's conversations to others, before it is restarted or given up."""

from __future__ import annotations

from typing import Annotated, Any

import requests
import typer

from lltm_ray.cli._endpoint import NameOption, UrlOption, endpoint_of
from lltm_ray.cli._output import (
    ERR,
    OUT,
    JsonFlag,
    KeyFileOption,
    errors_end_the_command,
    human_bytes,
    print_json,
    print_table,
    read_key,
)
from lltm_ray.errors import AuthenticationError, ConfigError, DeadlineError, LltmRayError
from lltm_ray.llamacpp.replies import Reply

_CONNECT_TIMEOUT_S = 5.0
_ANSWER_TIMEOUT_S = 30.0
"""What the gateway may take beyond the drain's own time."""

_Engine = Annotated[str, typer.Argument(help="The engine's name, as `lltm-ray status` shows it.")]
_Timeout = Annotated[float, typer.Option(min=0.0, help="How long running requests may go on, in seconds.")]
_Undrain = Annotated[bool, typer.Option("--undrain", help="Let a drained engine take requests again.")]


@errors_end_the_command()
def drain(
    engine: _Engine,
    *,
    url: UrlOption = "",
    name: NameOption = "default",
    api_key_file: KeyFileOption = None,
    timeout: _Timeout = 30.0,
    undrain: _Undrain = False,
    as_json: JsonFlag = False,
) -> None:
    """Close an engine to new requests and move its conversations, with their KV caches, to other engines.

    The engine stays closed until --undrain or until its server is restarted; if no other engine serves its model,
    requests are refused meanwhile. Exit code 1: something stayed on it.
    """
    key, base = read_key(api_key_file), endpoint_of(url, name)
    if undrain:
        _post(f"{base}/lltm/undrain", key, _ANSWER_TIMEOUT_S, engine=engine)
        OUT.print(f"{engine} takes requests again", markup=False)
        return
    with ERR.status("draining …"):
        report = _post(f"{base}/lltm/drain", key, timeout + _ANSWER_TIMEOUT_S, engine=engine, timeout_s=timeout)
    if as_json:
        print_json(report)
    else:
        _print(report)
    if report["left"] or report["running"]:
        raise typer.Exit(1)


def _print(report: dict[str, Any]) -> None:
    columns = ("engine", "moved", "tokens", "size", "seconds", "failed", "left", "running")
    size = human_bytes(report["size_bytes"])
    row = [report[name] for name in ("engine", "moved", "tokens")]
    row += [size, report["took_s"], len(report["failed"]), report["left"], report["running"]]
    print_table(columns, [row])
    for failure in report["failed"]:
        ERR.print(f"slot {failure['slot']}, {failure['tokens']:,} tokens: {failure['why']}", markup=False)
    if report.get("warning"):  # a gateway of an earlier version has none
        ERR.print(f"warning: {report['warning']}", markup=False, soft_wrap=True)


def _post(url: str, key: str, limit_s: float, *, engine: str, **query: Any) -> dict[str, Any]:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        with requests.Session() as session:
            session.trust_env = False  # else a .netrc entry of that host would replace our key
            answer = session.post(
                url, params={"engine": engine, **query}, headers=headers, timeout=(_CONNECT_TIMEOUT_S, limit_s)
            )
    except ValueError as error:  # requests' own errors of a URL
        raise ConfigError("url", url, "must look like http://127.0.0.1:8000") from error
    except requests.ReadTimeout as error:
        raise DeadlineError(f"waiting for {url}", limit_s) from error
    except requests.RequestException as error:
        raise LltmRayError(f"cannot reach {url}; is it up? (`lltm-ray up`)") from error
    reply = Reply(answer.status_code, answer.content)
    try:
        told: dict[str, Any] = reply.json()
        if reply.status == 200:
            return told
        raise _refusal(engine, reply.status, told["error"]["message"])
    except (ValueError, KeyError, TypeError):
        raise LltmRayError(f"{url} is no gateway's: it answered {reply.status} {reply.text[:200]!r}") from None


def _refusal(engine: str, status: int, message: str) -> LltmRayError:
    """The gateway's own sentence; where it is about the input, so is the exit code."""
    shown = f"engine={engine!r}: "
    if status == 400 and message.startswith(shown):
        return ConfigError("engine", engine, message.removeprefix(shown))
    return AuthenticationError(message) if status == AuthenticationError.http_status else LltmRayError(message)
