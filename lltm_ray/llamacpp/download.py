"""Fetch a llama.cpp release build: only on the user's explicit command, and never without a SHA-256.

Download with resume -> verify -> `unpack` into a temporary folder -> rename to `<cache>/engines/<tag>-<variant>/`.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import re
import shutil
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests
from urllib3.exceptions import HTTPError

from lltm_ray.errors import ServerBinaryError
from lltm_ray.llamacpp.binary import SERVER_NAME
from lltm_ray.llamacpp.unpack import unpack_server

Progress = Callable[[int, int | None], None]
"""Called with bytes there so far, and bytes in all where the server says so."""

MAX_ARCHIVE_BYTES = 2 * 2**30
ATTEMPTS = 4
RETRY_PAUSE_S = 0.5
_CHUNK = 256 * 1024
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z")
_SHA256 = re.compile(r"[0-9a-f]{64}\Z")
_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)\Z")


def releases() -> dict[str, Any]:
    """The table `releases.toml`: `tag`, `base_url` and `variants`."""
    return tomllib.loads(Path(__file__).with_name("releases.toml").read_text(encoding="utf-8"))


def default_variant() -> str:
    """The CPU build for this machine's processor."""
    return "cpu-arm64" if platform.machine() in ("aarch64", "arm64") else "cpu-x64"


def download_engine(
    tag: str | None,
    *,
    cache_dir: Path,
    variant: str,
    sha256: str | None = None,
    base_url: str | None = None,
    progress: Progress | None = None,
) -> Path:
    """Install a release build and return the path of its llama-server; an installed one is returned as it is.

    Args:
        tag: a release such as "b11433"; None is the one `releases.toml` pins.
        cache_dir: our cache; the build goes to `engines/<tag>-<variant>/` in it.
        variant: a name from `releases.toml`, e.g. "cpu-x64".
        sha256: what the archive must hash to, as 64 hex digits; wins over the table.
        base_url: mirror with `<tag>/<file>` below it, instead of GitHub's releases.
        progress: told about each piece that arrives.

    Raises:
        ServerBinaryError: no hash, an unknown variant, a failed download, a wrong hash, or a hostile archive.
    """
    asset = _asset(tag, variant, sha256, base_url)
    engines = cache_dir / "engines"
    engines.mkdir(parents=True, exist_ok=True)
    folder = engines / asset.folder
    with _locked(engines / f".{asset.folder}.lock"):
        server = folder / SERVER_NAME
        if not os.access(server, os.X_OK):
            part = engines / f".{asset.folder}.part"
            _fetch(asset.url, part, progress or _silent)
            _verify(part, asset)
            _install(part, folder)
            part.unlink()
    return server


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asset:
    file: str
    folder: str
    url: str
    sha256: str


def _asset(tag: str | None, variant: str, sha256: str | None, base_url: str | None) -> _Asset:
    table = releases()
    tag = tag or table["tag"]
    if variant not in table["variants"]:
        raise ServerBinaryError(f"no build {variant!r}; there are {', '.join(table['variants'])}", variant=variant)
    if not _NAME.match(tag):
        raise ServerBinaryError(f"{tag!r} is not a release tag; they look like {table['tag']}", tag=tag)
    entry = table["variants"][variant]
    file = entry["file"].format(tag=tag)
    wanted = (sha256 or entry["sha256"].get(tag, "")).lower().removeprefix("sha256:")
    if not _SHA256.match(wanted):
        raise ServerBinaryError(
            f"a SHA-256 of {file} is needed, 64 hex digits, and {wanted or 'none'!r} is known: pass --sha256. GitHub "
            f"shows it beside each file at https://github.com/ggml-org/llama.cpp/releases/tag/{tag}, or run: "
            f"gh release view {tag} -R ggml-org/llama.cpp --json assets",
            file=file,
        )
    root = (base_url or table["base_url"]).rstrip("/")
    if not root.startswith(("https://", "http://")):
        raise ServerBinaryError(f"base_url {root!r} must start with https:// or http://", base_url=root)
    return _Asset(file=file, folder=f"{tag}-{variant}", url=f"{root}/{tag}/{file}", sha256=wanted)


def _install(archive: Path, folder: Path) -> None:
    """Unpack beside `folder`, then rename: a build is there whole or not at all."""
    fresh = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        unpack_server(archive, fresh)
        fresh.chmod(0o755)
        shutil.rmtree(folder, ignore_errors=True)  # only there when it holds no server that runs
        fresh.rename(folder)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise


def _silent(_done: int, _total: int | None) -> None:
    """Progress that nobody watches."""


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One install of a build at a time on this machine; the next one waits, then finds it installed."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class _RetryableError(Exception):
    """Worth another attempt: the connection broke, or the server is in trouble."""


def _fetch(url: str, part: Path, progress: Progress) -> None:
    for attempt in range(1, ATTEMPTS + 1):
        try:
            _fetch_once(url, part, progress)
            return
        except (_RetryableError, requests.RequestException, HTTPError) as error:
            if attempt == ATTEMPTS:
                there = part.stat().st_size if part.exists() else 0
                raise ServerBinaryError(
                    f"cannot download {url} in {ATTEMPTS} attempts: {error}; {there} bytes are kept, run it again",
                    url=url,
                ) from error
            time.sleep(RETRY_PAUSE_S * attempt)


def _fetch_once(url: str, part: Path, progress: Progress) -> None:
    have = part.stat().st_size if part.exists() else 0
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    with requests.get(url, headers=headers, stream=True, timeout=(10, 60)) as reply:
        if reply.status_code == 416:
            _end_of_range(reply, part, have)
            return
        _check_status(reply, url)
        start, total = _where(reply, part, have)
        if total is not None and total > MAX_ARCHIVE_BYTES:
            raise ServerBinaryError(f"{url} has {total} bytes, more than the limit of {MAX_ARCHIVE_BYTES}", url=url)
        got = _write(reply, part, start, total, progress)
    if total is not None and got != total:
        raise _RetryableError(f"it ended after {got} of {total} bytes")


def _check_status(reply: requests.Response, url: str) -> None:
    if reply.status_code >= 500 or reply.status_code == 429:
        raise _RetryableError(f"HTTP {reply.status_code}")
    if reply.status_code not in (200, 206):
        why = "no such release or file" if reply.status_code == 404 else "refused"
        raise ServerBinaryError(f"{url}: HTTP {reply.status_code}, {why}; check tag, variant and mirror", url=url)


def _end_of_range(reply: requests.Response, part: Path, have: int) -> None:
    """Nothing after our last byte: we have it all, or our part is not of this file."""
    if reply.headers.get("Content-Range") != f"bytes */{have}":
        part.unlink(missing_ok=True)
        raise _RetryableError("the kept part is not of this file, starting over")


def _where(reply: requests.Response, part: Path, have: int) -> tuple[int, int | None]:
    """First byte of this reply within the file, and the file's size; a server may ignore the range we asked for."""
    if reply.status_code == 200:
        length = reply.headers.get("Content-Length", "")
        return 0, int(length) if length.isdigit() else None
    told = reply.headers.get("Content-Range", "")
    given = _RANGE.match(told)
    if given is None or int(given[1]) != have or int(given[2]) + 1 != int(given[3]):
        part.unlink(missing_ok=True)
        raise _RetryableError(f"asked for bytes from {have}, got Content-Range {told!r}; starting over")
    return have, int(given[3])


def _write(reply: requests.Response, part: Path, start: int, total: int | None, progress: Progress) -> int:
    with part.open("r+b" if start else "wb") as file:
        file.seek(start)
        while piece := reply.raw.read1(_CHUNK):  # iter_content would lose what came before a break
            file.write(piece)
            if file.tell() > (MAX_ARCHIVE_BYTES if total is None else total):
                raise ServerBinaryError(f"{reply.url} sends more than it announced", url=reply.url)
            progress(file.tell(), total)
        return file.tell()


def _verify(part: Path, asset: _Asset) -> None:
    with part.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != asset.sha256:
        part.unlink()
        raise ServerBinaryError(
            f"{asset.url} has SHA-256 {found}, expected {asset.sha256}: it was damaged, replaced, or another file is "
            "meant; the download was thrown away",
            url=asset.url,
            found=found,
            expected=asset.sha256,
        )
