"""From a model's name to a file on this machine: built in, a path, a catalogue name, or `repo:file[@revision]`."""

from __future__ import annotations

import difflib
import hashlib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from enum import StrEnum
from importlib import import_module
from pathlib import Path
from typing import Any

from lltm_ray.errors import ConfigError, ModelDownloadError, ModelError, ModelNotFoundError
from lltm_ray.models.catalog import CatalogEntry, load_catalog
from lltm_ray.models.embedded import EMBEDDED, embedded_path
from lltm_ray.models.gguf import SHARD, shard_paths
from lltm_ray.models.random_weights import ensure_random

Progress = Callable[[str, int, int], None]
"""Called with (file, bytes done, bytes in all) while a file is downloaded."""
RANDOM = "random"
DEMONSTRATIONS: Mapping[str, str] = {
    "tiny": "a demonstration model of 9 million parameters: it answers what it was taught of serving models, no more",
    "tiny-draft": "a draft model of 1 million parameters, for speculative decoding with tiny",
    RANDOM: "random weights: its words mean nothing, its tokens and times are real",
}
"""The models that need no download, and what a person should know before they talk to one."""
_HUB = re.compile(r"(?P<repo>[^/:@]+/[^/:@]+):(?P<file>[^@]+)(?:@(?P<revision>.+))?\Z")
_ELSEWHERE = "or download it elsewhere and give the path"
_PART = re.compile(r"[A-Za-z0-9_][\w.+=-]*\Z", re.ASCII)


class Origin(StrEnum):
    """Where a model came from."""

    EMBEDDED = "embedded"
    RANDOM = "random"
    PATH = "path"
    CATALOG = "catalog"
    HUB = "hub"


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedModel:
    """A model that is here."""

    name: str
    """What to serve it as: the catalogue name, else the file's stem without a shard number."""
    path: Path
    """The file, or the first shard."""
    origin: Origin
    entry: CatalogEntry | None = None


def resolve(
    model: str,
    *,
    cache_dir: Path,
    offline: bool = False,
    progress: Progress | None = None,
    token: str | None = None,
) -> ResolvedModel:
    """Find a model, or download it.

    Args:
        model: one of `DEMONSTRATIONS`, a path, a catalogue name, or `owner/name:file.gguf[@revision]` on the hub.
        cache_dir: our cache folder, for `random` and the record of verified files. Downloads lie in the hub's own
            cache (`HF_HOME`), so that what other tools fetched is not fetched again.
        offline: use only what is cached.
        progress: called with (file, bytes done, bytes in all) while a file is downloaded.
        token: for gated and private models. None: as the hub's own tools find it (`HF_TOKEN`, `hf auth login`).

    Raises:
        ModelNotFoundError: no such name, file, repo or revision; with the closest names.
        ModelDownloadError: the hub cannot be reached, refuses, or sent a file with the wrong sha256.
        ConfigError: a repo, file or revision that is not a plain name (`..`, an absolute path).
    """
    if model in EMBEDDED:
        return ResolvedModel(name=model, path=embedded_path(model), origin=Origin.EMBEDDED)
    if model == RANDOM:
        return ResolvedModel(name=RANDOM, path=ensure_random(cache_dir), origin=Origin.RANDOM)
    local = Path(model).expanduser() if model.startswith("~") else Path(model)
    hub = _HUB.match(model)
    if _is_file(local) or (_looks_like_path(model) and hub is None):
        return _resolve_path(model, local)
    if hub is not None:
        wanted = _HubFile(model, hub["repo"], hub["file"], hub["revision"] or "", token)
        path = _fetch_all(wanted, offline, progress)
        return ResolvedModel(name=_stem(path), path=path, origin=Origin.HUB)
    return _resolve_catalog(model, cache_dir, offline, progress, token)


def check_exists(model: str) -> None:
    """Refuse what `resolve` would not find whatever the hub has; downloads and makes nothing.

    Raises:
        ModelNotFoundError: no such name or file; with the closest names.
    """
    if model not in DEMONSTRATIONS and is_local(model):
        _resolve_path(model, Path(model).expanduser() if model.startswith("~") else Path(model))
    elif model not in DEMONSTRATIONS and not _HUB.match(model):
        _entry(model)


@contextmanager
def naming_the_draft(model: str) -> Iterator[None]:
    """An error of a draft that is not found names the setting, for there are two models."""
    try:
        yield
    except ModelNotFoundError as error:
        raise ModelNotFoundError(model, f"engine.model_draft: {error.why}") from error


def is_local(model: str) -> bool:
    """Whether `resolve` finds a model without the hub: it is built in, or a path."""
    path = Path(model).expanduser() if model.startswith("~") else Path(model)
    is_path = _is_file(path) or (_looks_like_path(model) and not _HUB.match(model))
    return model in DEMONSTRATIONS or is_path


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name too long for a path, or with a NUL: then it is none
        return False


def _looks_like_path(model: str) -> bool:
    return os.sep in model or model.startswith(("~", ".")) or (model.endswith(".gguf") and ":" not in model)


def _resolve_path(model: str, path: Path) -> ResolvedModel:
    if path.is_dir():
        raise ModelNotFoundError(model, f"it is a folder; give a file in it{_suggest(path, '')}")
    if not path.exists():
        raise ModelNotFoundError(model, f"no such file{_suggest(path.parent, path.name)}")
    return ResolvedModel(name=_stem(path), path=path.absolute(), origin=Origin.PATH)  # a link keeps its name


def _suggest(folder: Path, name: str) -> str:
    """The GGUF files in a folder that are closest to a name."""
    if not folder.is_dir():
        return f"; there is no folder {folder} either"
    found = sorted(item.name for item in folder.glob("*.gguf"))
    close = difflib.get_close_matches(name, found, n=3, cutoff=0.5) if name else found[:3]
    return f"; {folder} has {', '.join(close)}" if close else ""


def _stem(path: Path) -> str:
    match = SHARD.match(path.name)
    return match["stem"] if match else path.stem


def _resolve_catalog(
    model: str, cache_dir: Path, offline: bool, progress: Progress | None, token: str | None
) -> ResolvedModel:
    entry = _entry(model)
    path = _fetch_all(_HubFile(model, entry.repo, entry.file, entry.revision, token), offline, progress)
    if entry.sha256:
        _verify(model, path, entry.sha256, cache_dir)
    return ResolvedModel(name=model, path=path, origin=Origin.CATALOG, entry=entry)


def _entry(model: str) -> CatalogEntry:
    catalog = load_catalog()
    if (entry := catalog.get(model)) is not None:
        return entry
    close = difflib.get_close_matches(model.lower(), (*DEMONSTRATIONS, *catalog), n=3, cutoff=0.4)
    hint = f"did you mean {', '.join(close)}? " if close else ""
    why = f"{hint}`lltm-ray models list` shows all names; a path or `owner/name:file.gguf` works too"
    raise ModelNotFoundError(model, why)


def _fetch_all(wanted: _HubFile, offline: bool, progress: Progress | None) -> Path:
    """Fetch a file, and with a first shard all the others; returns the first."""
    _check_plain("repo", wanted.repo, 2)
    _check_plain("file", wanted.file, 8)
    if wanted.revision:
        _check_plain("revision", wanted.revision, 8)
    if not wanted.file.endswith(".gguf"):
        raise ConfigError("model", wanted.model, "the file must end in .gguf")
    names = [path.as_posix() for path in shard_paths(Path(wanted.file))]
    paths = [_fetch(replace(wanted, file=name), offline=offline, progress=progress) for name in names]
    return paths[0]


def _check_plain(what: str, value: str, limit: int) -> None:
    parts = value.split("/")
    if len(parts) > limit or not all(_PART.match(part) and ".." not in part for part in parts):
        raise ConfigError("model", value, f"the {what} must be a plain name: letters, digits, '.', '_', '-' and '/'")


@dataclass(frozen=True, slots=True)
class _HubFile:
    """One file of one repo; `model` is what the user wrote."""

    model: str
    repo: str
    file: str
    revision: str = ""
    token: str | None = field(default=None, repr=False)


def _fetch(wanted: _HubFile, *, offline: bool, progress: Progress | None) -> Path:
    """A file of the hub, from its cache or downloaded (resumed, and locked against parallel downloads).

    Raises:
        ModelNotFoundError: the repo, its revision or the file does not exist.
        ModelDownloadError: anything else that went wrong.
    """
    import huggingface_hub  # takes 0.5 s to import, and most starts do not need it
    from huggingface_hub import errors

    try:
        path = huggingface_hub.hf_hub_download(
            wanted.repo,
            wanted.file,
            revision=wanted.revision or None,
            token=wanted.token,
            local_files_only=offline,
            tqdm_class=_build_bar(wanted.file, progress),
        )
    except (OSError, errors.HFValidationError, errors.HTTPError) as error:  # type: ignore[attr-defined]  # httpx's
        raise _explain(wanted, offline, error) from error
    return Path(path)


def _build_bar(file: str, progress: Progress | None) -> type[Any]:
    """A tqdm class that draws nothing and reports; without `progress`, one that is merely silent."""
    base = import_module("tqdm").tqdm

    def start(bar: Any, *args: Any, **options: Any) -> None:
        bar.done_bytes, bar.whole_bytes = int(options.get("initial") or 0), int(options.get("total") or 0)
        base.__init__(bar, *args, **{**options, "disable": True})

    def update(bar: Any, n: float | None = 1) -> None:
        bar.done_bytes += int(n or 0)
        if progress is not None:
            progress(file, bar.done_bytes, max(bar.whole_bytes, bar.done_bytes))

    return type("ReportingBar", (base,), {"__init__": start, "update": update})


def _explain(wanted: _HubFile, offline: bool, error: Exception) -> ModelError:
    """The hub client's error as one of ours."""
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{wanted.repo}"
    # The client reports any failed answer as "not in the cache", with the answer as its cause.
    source = error.__cause__ if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ else error
    status = getattr(getattr(source, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError) or status in (401, 403):
        why = f"{page} is gated, private or missing: accept its terms there, then log in with `hf auth login`"
        return ModelDownloadError(wanted.model, f"{why} (or set HF_TOKEN)")
    if isinstance(error, errors.RepositoryNotFoundError):
        return ModelNotFoundError(wanted.model, f"there is no {page}")
    if isinstance(error, errors.RevisionNotFoundError):
        return ModelNotFoundError(wanted.model, f"{page} has no revision {wanted.revision!r}")
    if isinstance(error, errors.LocalEntryNotFoundError):
        return _explain_unreachable(wanted, offline or constants.HF_HUB_OFFLINE, status)
    if isinstance(error, errors.EntryNotFoundError):
        return ModelNotFoundError(wanted.model, f"{page} has no file {wanted.file}; {page}/tree/main lists them")
    reason = str(error).strip().replace("\n", " ")[:300] or type(error).__name__
    return ModelDownloadError(wanted.model, f"{reason}; try again, {_ELSEWHERE}")


def _explain_unreachable(wanted: _HubFile, offline: bool, status: int | None) -> ModelDownloadError:
    from huggingface_hub import constants

    if offline:
        why = f"offline, and {wanted.repo}/{wanted.file} is not in the hub's cache ({constants.HF_HUB_CACHE})"
        remedy = f"go online once (`lltm-ray models pull {wanted.model}`), {_ELSEWHERE}"
        return ModelDownloadError(wanted.model, f"{why}; {remedy}")
    if status is not None:
        why = f"the hub at {constants.ENDPOINT} answered {status}, and the file is not in its cache"
        return ModelDownloadError(wanted.model, f"{why}; try again later, {_ELSEWHERE}")
    why = f"cannot reach the hub at {constants.ENDPOINT}, and the file is not in its cache"
    remedy = "check the network and HF_ENDPOINT, set HF_HUB_OFFLINE=1 to use only what is cached"
    return ModelDownloadError(wanted.model, f"{why}; {remedy}, {_ELSEWHERE}")


def _verify(model: str, path: Path, sha256: str, cache_dir: Path) -> None:
    """Hold a file to its sha256; a file once verified is not read again until it changes.

    Args:
        model: its name, for the error.
        path: the file.
        sha256: what it must be, in hexadecimal.
        cache_dir: our cache folder; a mark for each verified file lies in its `verified`.

    Raises:
        ModelDownloadError: it is another file; it is left where it is, and not used.
    """
    status = path.stat()
    mark = cache_dir / "verified" / f"{sha256}-{status.st_size}-{status.st_mtime_ns}"
    if mark.exists():
        return
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        # The hub's cache links to the data; deleting the link alone would bring the same data back.
        why = f"{path.resolve()} has sha256 {found}, the catalogue {sha256}: it is damaged or was changed; delete it"
        raise ModelDownloadError(model, f"{why} and try again, {_ELSEWHERE}")
    mark.parent.mkdir(parents=True, exist_ok=True)
    mark.touch()
