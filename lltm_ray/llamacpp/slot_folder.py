"""Folders of saved slots: private, their files named at random, and nothing outside them is ever touched.

`own_folder` makes one for an engine and locks it for the life of this process; what a dead process left behind is
therefore known by its free lock, and swept by the next one that starts. `SlotFolder` is the only one that opens files.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import secrets
import shutil
import tempfile
import time
from pathlib import Path

from lltm_ray.errors import ConfigError

CHUNK_BYTES = 16 * 2**20
STALE_S = 3600.0
"""Files of ours this old in a folder that others use too: no move takes so long."""
_NAME = re.compile(r"lltm-[0-9a-f]{32}\.bin\Z")
_log = logging.getLogger(__name__)


def new_name() -> str:
    """A file name that nobody can guess: whoever names a slot's file can have its conversation restored."""
    return f"lltm-{secrets.token_hex(16)}.bin"


class SlotFolder:
    """Files of `new_name` in one folder.

    Every method raises ConfigError for any other name, and OSError as the system does.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def path_of(self, name: str) -> Path:
        """Where a file of ours is, whether or not it exists."""
        if not _NAME.match(name):
            raise ConfigError("filename", name, "is no name of a saved slot")
        return self.path / name

    def size(self, name: str) -> int | None:
        """Bytes of a file; None when there is none."""
        try:
            return self.path_of(name).stat(follow_symlinks=False).st_size
        except FileNotFoundError:
            return None

    def remove(self, name: str) -> bool:
        """Remove a file; whether there was one."""
        try:
            self.path_of(name).unlink()
        except FileNotFoundError:
            return False
        return True

    def take(self, name: str, source: SlotFolder, copy: str = "") -> None:
        """The same file here as in another folder of this machine: a hard link, or a private copy elsewhere on disk.

        Its name here is `copy`; empty: the same.
        """
        theirs, ours = source.path_of(name), self.path_of(copy or name)
        try:
            os.link(theirs, ours, follow_symlinks=False)
            ours.chmod(0o600)
        except FileNotFoundError:
            raise
        except OSError as error:  # another file system, or one without links
            _log.debug("%s is copied, not linked: %s", name, error)
            self._copy(theirs, ours)

    def _copy(self, theirs: Path, ours: Path) -> None:
        reading = os.open(theirs, os.O_RDONLY | os.O_NOFOLLOW)
        with os.fdopen(reading, "rb") as source, os.fdopen(self._create(ours), "wb") as target:
            shutil.copyfileobj(source, target, CHUNK_BYTES)

    def create(self, name: str) -> None:
        """An empty file, readable by its owner only; it must not exist."""
        os.close(self._create(self.path_of(name)))

    def read(self, name: str, offset: int, size: int) -> bytes:
        """`size` bytes from `offset` on; fewer mean that the file ends there."""
        with os.fdopen(os.open(self.path_of(name), os.O_RDONLY | os.O_NOFOLLOW), "rb") as stream:
            stream.seek(offset)
            return stream.read(size)

    def write(self, name: str, offset: int, data: bytes) -> None:
        """Put bytes at `offset` into a file that `create` made."""
        with os.fdopen(os.open(self.path_of(name), os.O_WRONLY | os.O_NOFOLLOW), "wb") as stream:
            stream.seek(offset)
            stream.write(data)

    def sweep(self, older_than_s: float = STALE_S) -> int:
        """Remove files of ours that nobody can still want; how many."""
        limit = time.time() - older_than_s
        old = [entry.name for entry in os.scandir(self.path) if _NAME.match(entry.name) and _changed(entry) < limit]
        return sum(self.remove(name) for name in old)

    @staticmethod
    def _create(path: Path) -> int:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)


def _changed(entry: os.DirEntry[str]) -> float:
    try:
        return entry.stat(follow_symlinks=False).st_mtime
    except FileNotFoundError:  # gone since it was listed
        return float("inf")


class OwnedFolder:
    """A folder that lives as long as this process, or until `remove`."""

    def __init__(self, path: Path, lock: int) -> None:
        self.path = path
        self._lock = lock

    def remove(self) -> None:
        """Remove the folder and what is in it; a second time does nothing."""
        if self._lock >= 0:
            shutil.rmtree(self.path, onerror=_complain)
            os.close(self._lock)
            self._lock = -1


def own_folder(parent: Path, name: str) -> OwnedFolder:
    """Make a private folder below `parent` and lock it.

    Args:
        parent: made where it is missing.
        name: what the folder's name begins with.

    Raises:
        OSError: it cannot be made.
    """
    parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    while True:
        path = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=parent))
        try:
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:  # somebody swept it before it was opened
            continue
        fcntl.flock(lock, fcntl.LOCK_SH)
        if path.exists():
            return OwnedFolder(path, lock)
        os.close(lock)  # or before it was locked


def sweep_folders(run_dirs: Path) -> int:
    """Remove slot folders of dead processes, `<run_dirs>/<run>/slots/<folder>`; how many."""
    found = (path for run_dir in _listed(run_dirs) for path in _listed(run_dir / "slots"))
    return sum(_remove_if_dead(path) for path in found if path.is_dir() and not path.is_symlink())


def _listed(folder: Path) -> list[Path]:
    """What is in a folder; nothing where it has gone meanwhile, as runs do that end."""
    try:
        return list(folder.iterdir())
    except OSError as error:
        _log.debug("%s: %s", folder, error)
        return []


def _remove_if_dead(path: Path) -> bool:
    try:
        lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError as error:
        _log.debug("%s: %s", path, error)
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(path, onerror=_complain)
        return True
    except OSError as error:  # its owner lives, or the file system cannot tell
        _log.debug("%s stays: %s", path, error)
        return False
    finally:
        os.close(lock)


def _complain(_function: object, path: str, error: tuple[object, BaseException, object]) -> None:
    if not isinstance(error[1], FileNotFoundError):
        _log.warning("%s cannot be removed: %s", path, error[1])
