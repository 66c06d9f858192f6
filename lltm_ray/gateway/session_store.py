"""Sessions on disk, each private to its owner.

    <folder>/<digest of the tenant>/<digest of the name>.json    the manifest: what its files hold; replaced whole
    <folder>/<digest of the tenant>/lltm-<random>.said           what was said
    <folder>/<digest of the tenant>/lltm-<random>.bin            the KV cache, as llama-server's slot save wrote it

A manifest is replaced under a lock that all gateways of the node share, so two saves of one name leave one whole
session: the later one's. Caches make room for later ones; manifests and messages go only when their owner says so.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from lltm_ray._sessions import SessionInfo, check_name
from lltm_ray._shelf import SavedSlot
from lltm_ray.errors import ConfigError, DiskFullError, SessionNotFoundError
from lltm_ray.gateway.session_manifest import Kept, Said, files_of, manifest_of, place_of, write_new
from lltm_ray.gateway.slot_files import SHOWN
from lltm_ray.llamacpp.slot_folder import STALE_S, SlotFolder

MOST_SESSIONS = 10_000
"""Of one tenant."""
Unfit = Callable[[Kept], str]
"""Why no engine can take a session's cache now; empty where one may."""
_AGAIN = "save it again"
_TRIES = 3
_MOST_VERIFIED = 1024
_log = logging.getLogger(__name__)


def _fits(_kept: Kept) -> str:
    return ""


class SessionStore:
    """All methods block. OSError as the system raises it.

    Args:
        folder: of the fleet; made when something is saved.
        limit_bytes: of all that lies in it.
        node_id: where this folder is.
    """

    def __init__(self, folder: Path, limit_bytes: int, node_id: str = "") -> None:
        self.folder, self.limit_bytes, self.node_id = folder, limit_bytes, node_id
        self._verified: dict[str, tuple[int, int]] = {}
        self._swept_unix_s = 0.0

    # --- reading

    def load(self, tenant: str, name: str) -> Kept:
        """A tenant's session.

        Raises:
            SessionNotFoundError: there is none.
            ConfigError: no such name is possible, or its manifest is damaged.
        """
        kept = Kept.read(self._manifest(tenant, check_name(name)), name)
        if kept is None:
            raise SessionNotFoundError(name)
        return kept

    def load_said(self, tenant: str, name: str) -> tuple[Kept, Said | None]:
        """The same with its messages; None: they are not kept. Errors as `load`."""
        for _ in range(_TRIES):  # who saves it anew removes what was said before
            kept = self.load(tenant, name)
            try:
                return kept, Said.read(self.place(tenant) / kept.said) if kept.said else None
            except FileNotFoundError:
                _log.debug("the messages of a session went while it was read")
        raise ConfigError("session", name, "its messages are gone: save it again or delete it")

    def all_of(self, tenant: str, unfit: Unfit = _fits) -> list[SessionInfo]:
        """A tenant's sessions, the one used last first; damaged ones are left out, and logged."""
        found = (self._readable(path) for path in self.place(tenant).glob("*.json"))
        infos = [self.info(kept, unfit=unfit) for kept in found if kept is not None]
        return sorted(infos, key=lambda info: -info.used_unix_s)

    def info(self, kept: Kept, said: Said | None = None, unfit: Unfit = _fits) -> SessionInfo:
        """For who asks; with its messages where they are given, and why its cache is not restored, as far as is known.

        Args:
            kept: the session.
            said: its messages.
            unfit: asked where its file is whole.
        """
        stat = _stat(self._manifest(kept.tenant, kept.name))
        return SessionInfo(
            name=kept.name,
            model=kept.model,
            tokens=kept.tokens,
            size_bytes=kept.file_bytes + kept.said_bytes + (stat.st_size if stat else 0),
            message_count=kept.message_count,
            has_text=bool(kept.said),
            saved_unix_s=kept.saved_unix_s,
            used_unix_s=stat.st_mtime if stat else kept.saved_unix_s,
            why=kept.why or self._lost(kept) or unfit(kept),
            messages=tuple(said.messages) if said else (),
            fields=said.fields if said else {},
        )

    def slot_of(self, kept: Kept) -> SavedSlot:
        """Its file, as the shelf takes it."""
        return SavedSlot(
            name=kept.file,
            folder=str(self.place(kept.tenant)),
            node_id=self.node_id,
            model=kept.model,
            seal=kept.seal,
            tokens=kept.tokens,
            size_bytes=kept.file_bytes,
            key_bytes=kept.key_bytes,
            whole=bytes.fromhex(kept.whole),
            hashes=bytes.fromhex(kept.hashes),
            saved_unix_nano=round(kept.saved_unix_s * 1e9),
        )

    def check(self, kept: Kept) -> str:
        """Why its file must not be restored; empty where it is as it was saved. Each is read once, then remembered."""
        if not kept.file:
            return kept.why
        if why := self._lost(kept):
            return why
        path = self._cache(kept)
        try:
            stat = path.lstat()
            seen = stat.st_size, stat.st_mtime_ns
            if self._verified.get(kept.file) != seen and digest_of(path) != kept.sha256:
                return f"its file is damaged: {_AGAIN}"
        except FileNotFoundError:
            return f"its file is gone: {_AGAIN}"
        self._remember(kept.file, seen)
        return ""

    def _lost(self, kept: Kept) -> str:
        """What tells without reading it that its file is not whole."""
        stat = _stat(self._cache(kept)) if kept.file else None
        if stat is None:
            return f"its file is gone: {_AGAIN}" if kept.file else ""
        is_whole = stat.st_size == kept.file_bytes
        return "" if is_whole else f"its file has {stat.st_size:,} of {kept.file_bytes:,} bytes: {_AGAIN}"

    def touch(self, kept: Kept) -> None:
        """It was used just now: others go before it."""
        os.utime(self._manifest(kept.tenant, kept.name))

    # --- writing

    def place(self, tenant: str) -> Path:
        """A tenant's folder."""
        return place_of(self.folder, tenant)

    def make_place(self, tenant: str) -> Path:
        """The same, made where it is missing."""
        for path in (self.folder, place := self.place(tenant)):
            path.mkdir(parents=True, exist_ok=True, mode=0o700)
        return place

    def admit(self, tenant: str, name: str) -> None:
        """Make the place for a session that is about to be computed; ConfigError: its tenant has too many."""
        self.make_place(tenant)
        self._check_count(self._manifest(tenant, name))

    def commit(self, kept: Kept, said: Said | None = None) -> Kept:
        """Keep a session whose cache, if it has one, lies in its place; what it replaces goes.

        Args:
            kept: what is known of it.
            said: its messages; None: they are not kept.

        Returns:
            It as it was kept: without a cache, and with the reason, where there is no room for that.

        Raises:
            DiskFullError: there is no room for its messages. Nothing of it stays, and what it were to replace does.
            ConfigError: its tenant has too many.
        """
        self.make_place(kept.tenant)
        text = b"" if said is None else said.encode()
        kept = kept if said is None else kept.with_said(len(text))
        try:
            if kept.file:
                kept = self._seal(kept)
            with self._locked():
                return self._put(kept, text)
        except BaseException:
            self.discard(kept.tenant, {kept.file, kept.said} - files_of(self._manifest(kept.tenant, kept.name)))
            raise

    def discard(self, tenant: str, files: set[str]) -> None:
        """Remove files of a session that did not become one."""
        _remove(self.place(tenant), files)

    def delete(self, tenant: str, name: str) -> None:
        """Remove a session; SessionNotFoundError where there is none."""
        path = self._manifest(tenant, check_name(name))
        with self._locked():
            files = files_of(path)
            try:
                path.unlink()
            except FileNotFoundError:
                raise SessionNotFoundError(name) from None
            _remove(path.parent, files)

    def rename(self, tenant: str, name: str, to: str) -> Kept:
        """Give a session another name.

        Raises:
            SessionNotFoundError: there is none.
            ConfigError: the other name is taken, or no name.
        """
        source, target = self._manifest(tenant, check_name(name)), self._manifest(tenant, check_name(to, "to"))
        with self._locked():
            kept = self.load(tenant, name)
            if target.exists():
                raise ConfigError("to", to, "is a session already; delete it first")
            kept = replace(kept, name=to)
            self._write(target, kept)
            source.unlink()
        return kept

    # --- the disk

    def _cache(self, kept: Kept) -> Path:
        return SlotFolder(self.place(kept.tenant)).path_of(kept.file)

    def _manifest(self, tenant: str, name: str) -> Path:
        return manifest_of(self.folder, tenant, name)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)

    def _readable(self, path: Path) -> Kept | None:
        """None, and a line in the log, where this version cannot read it."""
        try:
            return Kept.read(path)
        except ConfigError as error:
            _log.warning("%s", error.message)
            return None

    def _check_count(self, path: Path) -> None:
        if not path.exists() and sum(1 for _ in path.parent.glob("*.json")) >= MOST_SESSIONS:
            raise ConfigError("sessions", MOST_SESSIONS, "this key has as many as it may have: delete some first")

    def _seal(self, kept: Kept) -> Kept:
        """Its file is on disk, and known by its sum; before the lock, for that takes time."""
        path = self._cache(kept)
        _sync(path)
        self._remember(kept.file, (kept.file_bytes, path.stat().st_mtime_ns))
        return replace(kept, sha256=digest_of(path))

    def _put(self, kept: Kept, text: bytes) -> Kept:
        path = self._manifest(kept.tenant, kept.name)
        self._check_count(path)
        self._sweep()
        before = files_of(path)
        kept = self._fit(kept, {path, *(path.parent / name for name in before)})
        if kept.said:
            write_new(path.parent / kept.said, text)
        self._write(path, kept)
        _remove(path.parent, before - {kept.file, kept.said})
        return kept

    def _write(self, path: Path, kept: Kept) -> None:
        fresh = path.with_suffix(f".{secrets.token_hex(4)}.new")
        write_new(fresh, kept.encode())
        fresh.replace(path)
        _sync(path.parent)

    # --- the bound

    def _fit(self, kept: Kept, leaving: set[Path]) -> Kept:
        """Make room for a session; without its cache where there is none for that.

        Args:
            kept: its cache lies in its place, its messages not yet.
            leaving: what it replaces.

        Raises:
            DiskFullError: messages and manifests alone pass the bound; nothing was done.
        """
        own = SlotFolder(self.place(kept.tenant))
        mine = leaving | ({own.path_of(kept.file)} if kept.file else set())
        texts_bytes, caches_bytes = self._usage(mine)
        texts_bytes += kept.said_bytes + len(kept.encode())
        if texts_bytes > self.limit_bytes:
            why = "gateway.sessions_mib is full of what was said: delete sessions, or start the fleet with more"
            raise DiskFullError(why, need_bytes=texts_bytes, limit_bytes=self.limit_bytes)
        fits = texts_bytes + kept.file_bytes <= self.limit_bytes
        wanted_bytes = texts_bytes + (kept.file_bytes if fits else 0) - self.limit_bytes
        missing_bytes = self._drop_caches(kept, caches_bytes + wanted_bytes)
        if kept.file and (missing_bytes > 0 or not fits):
            own.remove(kept.file)
            why = f"gateway.sessions_mib={self.limit_bytes / 2**20:,.0f} has no room for its {_mib(kept.file_bytes)}"
            return kept.without_file(f"{why}: raise it, or delete sessions, and save it again")
        return kept

    def _usage(self, without: set[Path]) -> tuple[int, int]:
        """Bytes of messages and manifests, and of caches."""
        texts_bytes = caches_bytes = 0
        for path in self.folder.glob("*/*"):
            stat = None if path in without else _stat(path)
            if stat is not None and path.suffix == ".bin":
                caches_bytes += stat.st_size
            elif stat is not None:
                texts_bytes += stat.st_size
        return texts_bytes, caches_bytes

    def _drop_caches(self, newest: Kept, wanted_bytes: int) -> int:
        """Drop caches, its tenant's own first, and of those what was used longest ago; bytes that still are missing."""
        own, path = self.place(newest.tenant), self._manifest(newest.tenant, newest.name)
        stats = {each: stat for each in self.folder.glob("*/*.json") if each != path and (stat := _stat(each))}
        for each in sorted(stats, key=lambda each: (each.parent != own, stats[each].st_mtime)):
            if wanted_bytes <= 0:
                break
            kept = self._readable(each)
            if kept is not None and kept.file:
                _remove(each.parent, {kept.file})
                why = f"its {_mib(kept.file_bytes)} made room for later ones: raise gateway.sessions_mib"
                self._write(each, kept.without_file(f"{why}={self.limit_bytes / 2**20:,.0f}"))
                os.utime(each, ns=(stats[each].st_atime_ns, stats[each].st_mtime_ns))
                wanted_bytes -= kept.file_bytes
                _log.info("a session's cache of %d bytes is dropped for a later one", kept.file_bytes)
        return wanted_bytes

    def _sweep(self) -> None:
        """What nobody lists: its gateway died before it did. At most once an hour, for it reads all manifests."""
        now_unix_s = time.time()
        if now_unix_s < self._swept_unix_s + STALE_S:
            return
        self._swept_unix_s = now_unix_s
        for place in self.folder.glob("*/"):
            listed = [self._readable(path) for path in place.glob("*.json")]
            if None in listed:
                continue  # what this version cannot read may list anything
            known = {name for kept in listed if kept for name in (kept.file, kept.said)}
            for path in (*place.glob("lltm-*"), *place.glob("*.new")):
                stat = _stat(path)
                if path.name not in known and stat is not None and stat.st_ctime < now_unix_s - STALE_S:
                    path.unlink(missing_ok=True)

    def _remember(self, file: str, seen: tuple[int, int]) -> None:
        if len(self._verified) >= _MOST_VERIFIED:
            self._verified.clear()
        self._verified[file] = seen


def digest_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _remove(place: Path, files: set[str]) -> None:
    """What cannot be removed now is swept later: what it belonged to is gone already."""
    for name in files - {""}:
        try:
            (place / name).unlink(missing_ok=True)
        except OSError as error:
            _log.warning("%s of a session is left behind: %s", name[:SHOWN], error.strerror)


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / 2**20:,.1f} MiB"


def _stat(path: Path) -> os.stat_result | None:
    """None: it is gone."""
    try:
        return path.lstat()
    except FileNotFoundError:
        return None


def _sync(path: Path) -> None:
    """On disk also after a power cut; folders as well."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
