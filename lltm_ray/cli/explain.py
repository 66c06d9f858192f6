"""`lltm-ray explain`: why a request went where it went, and what became of its tokens."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any
from urllib.parse import quote

import requests
import typer
from rich.markup import escape

from lltm_ray.cli._endpoint import NameOption, UrlOption, endpoint_of
from lltm_ray.cli._output import (
    OUT,
    JsonFlag,
    KeyFileOption,
    errors_end_the_command,
    print_json,
    print_table,
    read_key,
)
from lltm_ray.errors import ConfigError, LltmRayError, UpstreamError

PATH = "/lltm/explain"
_TIMEOUT_S = 15.0
_CONTROLS = dict.fromkeys((*range(32), *range(127, 160)))

_Id = Annotated[str | None, typer.Argument(help="x-request-id of the answer. Left out: the last requests.")]
_Limit = Annotated[int, typer.Option(min=1, max=1000, help="Without an id: how many requests.")]
_Tenant = Annotated[str, typer.Option(help="Without an id: only this tenant's.", show_default="all")]


@errors_end_the_command()
def explain(
    request_id: _Id = None,
    *,
    limit: _Limit = 20,
    tenant: _Tenant = "",
    url: UrlOption = "",
    api_key_file: KeyFileOption = None,
    name: NameOption = "default",
    as_json: JsonFlag = False,
) -> None:
    """Why this engine and slot, what reuse was expected and found, waits, attempts, tokens.

    Every answer has its id in the header x-request-id. Without an id the last requests are listed.
    """
    base, key = endpoint_of(url, name), read_key(api_key_file)
    if request_id:
        found = _ask(base, key, f"{PATH}/{quote(request_id, safe='')}")
        if found is None:
            raise LltmRayError(f"no request {request_id!r} in the ledger of {base}: never seen, or forgotten since")
        print_json(found) if as_json else _print_one(found)
        return
    listed = (_ask(base, key, PATH, {"limit": limit, "tenant": tenant}) or {}).get("requests", [])
    print_json(listed) if as_json else _print_list(listed)


def _ask(base: str, key: str, path: str, params: dict[str, Any] | None = None) -> dict[str, Any] | None:
    """A JSON object; None where the gateway knows no request of that id."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        with requests.Session() as session:
            session.trust_env = False  # else a .netrc entry of that host would replace our key
            answer = session.get(base + path, params=params, headers=headers, timeout=_TIMEOUT_S)
    except ValueError as error:  # requests' own errors of a URL are ValueErrors
        raise ConfigError("url", base, "must look like http://127.0.0.1:8000") from error
    except requests.RequestException as error:
        raise LltmRayError(f"cannot reach {base}; is it up? (`lltm-ray up`)") from error
    if answer.status_code == 404 and params is None:
        return None
    try:
        found = answer.json()
    except ValueError:
        found = None
    if answer.status_code != 200 or not isinstance(found, dict):
        raise UpstreamError(answer.status_code, answer.text.translate(_CONTROLS))
    return found


def _print_one(entry: dict[str, Any]) -> None:
    for label, text in _facts(entry):
        if text:
            OUT.print(f"[bold]{label:<10}[/] {escape(_plain(text))}", soft_wrap=True)
    attempts = entry.get("attempts") or []
    if attempts:
        OUT.print()
        print_table(_ATTEMPT_COLUMNS, [_attempt_row(each, at) for at, each in enumerate(attempts, 1)], title="attempts")
    considered = entry.get("considered") or []
    if considered:
        OUT.print()
        columns = list(dict.fromkeys(column for row in considered for column in row))
        rows = [[_cell(row.get(column)) for column in columns] for row in considered]
        print_table([column.replace("_", " ") for column in columns], rows, title="considered")


def _facts(entry: dict[str, Any]) -> list[tuple[str, str]]:
    attempts = entry.get("attempts") or [{}]
    last = attempts[-1]
    slot = last.get("slot", -1)
    where = f"{last.get('engine', 'none')}, " + (f"slot {slot}" if slot >= 0 else "a slot of llama-server's choice")
    return [
        ("request", f"{entry['request_id']}  {_time(entry.get('arrived_unix_nano', 0))}  {entry.get('route', '')}"),
        ("model", entry.get("model", "")),
        ("tenant", entry.get("tenant", "")),
        ("went to", where if entry.get("attempts") else "no engine"),
        ("because", _why(entry)),
        ("affinity", entry.get("affinity", "")),
        ("reuse", _reuse(last)),
        ("waits", _waits(entry)),
        ("tokens", _tokens(entry)),
        ("outcome", _outcome(entry)),
    ]


def _why(entry: dict[str, Any]) -> str:
    """Empty where nothing was chosen: what was refused before that has an error."""
    why, policy = entry.get("why", ""), entry.get("policy", "")
    return f"{why} ({policy})" if why and policy else why


def _reuse(attempt: dict[str, Any]) -> str:
    cached, computed = attempt.get("cached_tokens", 0), attempt.get("computed_tokens", 0)
    if not cached + computed:
        return ""
    predicted = attempt.get("predicted_cached_tokens", 0)
    return f"{predicted:,} of {cached + computed:,} prompt tokens expected in the cache, {cached:,} found"


def _waits(entry: dict[str, Any]) -> str:
    parts = [("for a slot", entry.get("wait_s")), ("first text", entry.get("ttft_s")), ("total", entry.get("total_s"))]
    return ", ".join(f"{label} {seconds * 1e3:,.1f} ms" for label, seconds in parts if seconds is not None)


def _tokens(entry: dict[str, Any]) -> str:
    at_least = "at least " if any(each.get("is_estimate") for each in entry.get("attempts", ())) else ""
    words = (
        f"{entry.get('delivered_tokens', 0):,} delivered, {at_least}{entry.get('generated_tokens', 0):,} generated, "
    )
    words += f"{at_least}{entry.get('wasted_tokens', 0):,} wasted"
    return words if entry.get("is_balanced", True) else f"{words}; the attempts do not add up to what was delivered"


def _outcome(entry: dict[str, Any]) -> str:
    parts = [entry["attempts"][-1].get("outcome", "")] if entry.get("attempts") else []
    parts.append(f"status {entry['status']}" if entry.get("status") else "nothing was sent")
    exact = entry.get("is_exact")
    if exact is not None:
        parts.append("continued exactly" if exact else "continued, perhaps in other words")
    return ", ".join([*parts, entry.get("error", "")]).rstrip(", ")


_ATTEMPT_COLUMNS = (
    "#", "engine", "slot", "queue ms", "expected", "cached", "computed", "generated", "delivered", "wasted", "outcome",
)  # fmt: skip


def _attempt_row(attempt: dict[str, Any], number: int) -> list[Any]:
    names = ("predicted_cached_tokens", "cached_tokens", "computed_tokens", "generated_tokens")
    counts = [attempt.get(name) for name in (*names, "delivered_tokens", "wasted_tokens")]
    slot = attempt.get("slot", -1)
    return [
        number,
        _plain(attempt.get("engine", "")),
        slot if slot >= 0 else None,
        attempt.get("queue_s", 0.0) * 1e3,
        *counts,
        attempt.get("outcome", "") + (" (estimate)" if attempt.get("is_estimate") else ""),
    ]


def _print_list(entries: list[dict[str, Any]]) -> None:
    columns = (
        "request", "arrived", "tenant", "model", "engine", "tries", "cached", "delivered", "wasted", "ttft ms",
        "total ms", "outcome",
    )  # fmt: skip
    print_table(columns, [_list_row(entry) for entry in entries])


def _list_row(entry: dict[str, Any]) -> list[Any]:
    attempts = entry.get("attempts") or []
    last: dict[str, Any] = attempts[-1] if attempts else {}
    ttft_s = entry.get("ttft_s")
    names = [_plain(entry.get(name, "")) or None for name in ("tenant", "model")]
    return [
        _plain(entry["request_id"]),
        _time(entry.get("arrived_unix_nano", 0)),
        *names,
        _plain(last.get("engine", "")) or None,
        len(attempts),
        last.get("cached_tokens"),
        entry.get("delivered_tokens", 0),
        entry.get("wasted_tokens", 0),
        None if ttft_s is None else ttft_s * 1e3,
        entry.get("total_s", 0.0) * 1e3,
        last.get("outcome") or (f"status {entry['status']}" if entry.get("status") else "nothing was sent"),
    ]


def _time(unix_nano: int) -> str:
    return datetime.fromtimestamp(unix_nano / 1e9, UTC).strftime("%Y-%m-%dT%H:%M:%SZ") if unix_nano else ""


def _cell(value: Any) -> Any:
    return value if value is None or isinstance(value, int | float) else _plain(str(value))


def _plain(text: str) -> str:
    return text.translate(_CONTROLS)  # a client chose some of it; it must not be able to steer the terminal
