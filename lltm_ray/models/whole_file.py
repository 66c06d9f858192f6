"""Files that appear when they are whole: written in a folder beside, with a lock while the writer lives.

What a killed writer left behind goes with the next one.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import io
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from lltm_ray.errors import ConfigError, DiskFullError, LltmRayError
from lltm_ray.models.gguf import shard_paths

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

_LOCK = "lock"
"""In the folder: a folder itself has no lock on NFS."""


@contextmanager
def whole_file(target: Path) -> Iterator[Path]:
    """An empty file to write to, which takes `target`'s place at the end, and is gone after any error.

    Raises:
        ConfigError: `target` cannot be written.
        DiskFullError: the disk has no room.
    """
    with _scratch_folder(target) as folder:
        path = _make(folder, target)
        yield path
        _sync(path)
        with _own():
            path.replace(target)
        _sync(target.absolute().parent)


@contextmanager
def new_files(targets: Sequence[Path]) -> Iterator[tuple[Path, ...]]:
    """As `whole_file`, for several in one folder that are not there yet: who sees the first sees them all.

    Raises:
        ConfigError: one cannot be written, or has appeared meanwhile; none is left.
        DiskFullError: the disk has no room.
    """
    with _scratch_folder(targets[0]) as folder:
        paths = tuple(_make(folder, target) for target in targets)
        yield paths
        for path in paths:
            _sync(path)
        done: list[Path] = []
        try:
            for path, target in reversed(list(zip(paths, targets, strict=True))):
                _publish(path, target)
                done.append(target)
        except BaseException:
            for target in done:
                target.unlink(missing_ok=True)
            raise
        _sync(targets[0].absolute().parent)


def open_scratch(path: Path) -> io.BufferedWriter:
    """Open what `whole_file` or `new_files` gave, to write it; they tell which OSErrors are this file's own."""
    with _own():
        return io.BufferedWriter(_Scratch(path, "r+", opener=_open_no_link))


def refuse_same(out: str | os.PathLike[str], *inputs: str | os.PathLike[str]) -> None:
    """See that a file to write is none of those that are read, by whatever name.

    Args:
        out: the file to write.
        inputs: files, with all their shards, or folders, with all in them but GGUF files.

    Raises:
        ConfigError: it is one, or a folder.
    """
    target = Path(out)
    if target.is_dir():
        raise ConfigError("out", str(out), "is a folder; give a file")
    if target.exists() and any(each.exists() and target.samefile(each) for given in inputs for each in _files(given)):
        raise ConfigError("out", str(out), "is one of the files that it is made of; give another")


def check_space(needed: dict[Path, int]) -> None:
    """See that each disk has room for all files that are to be written on it.

    Args:
        needed: file -> bytes.

    Raises:
        DiskFullError: one has not.
        ConfigError: a file's folder is not there.
    """
    disks: dict[int, tuple[Path, int]] = {}
    for file, nbytes in needed.items():
        try:
            disk = file.absolute().parent.stat().st_dev
        except OSError as error:
            raise ConfigError("out", str(file), f"its folder cannot be used: {error.strerror}") from error
        folder, before = disks.get(disk, (file.absolute().parent, 0))
        disks[disk] = (folder, before + nbytes)
    for folder, nbytes in disks.values():
        free = shutil.disk_usage(folder).free
        if nbytes > free:
            has, needs = f"{free / 2**30:.2f} GiB free", f"{nbytes / 2**30:.2f} GiB are needed"
            why = f"{folder} has {has}, {needs}; free some, or write elsewhere"
            raise DiskFullError(why, folder=str(folder), need_bytes=nbytes, free_bytes=free)


class _OwnError(OSError):
    """Of the file that is written, not of what is read for it, nor of a caller's progress."""


class _Scratch(io.FileIO):
    def write(self, data: ReadableBuffer, /) -> int:
        with _own():
            return super().write(data)


@contextmanager
def _own() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _OwnError(error.errno, error.strerror) from error


@contextmanager
def _scratch_folder(target: Path) -> Iterator[Path]:
    try:
        with _own():
            folder, lock = _make_folder(target)
        try:
            yield folder
        finally:
            os.close(lock)
            shutil.rmtree(folder, ignore_errors=True)
    except _OwnError as error:
        raise _named(error, target) from error


def _named(error: OSError, target: Path) -> LltmRayError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskFullError(f"no room for {target}; free some, or write elsewhere", folder=str(target.parent))
    return ConfigError("out", str(target), f"cannot be written: {error.strerror}")


def _make_folder(target: Path) -> tuple[Path, int]:
    for left in target.parent.glob(f".{glob.escape(target.name)}.*.partial"):
        with suppress(OSError):  # somebody writes there now, or has just removed it
            _remove_if_left(left)
    while True:
        folder = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
        folder.mkdir()
        lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (folder / _LOCK).exists():  # else another writer took it for a leftover before it was locked
            return folder, lock
        os.close(lock)


def _remove_if_left(folder: Path) -> None:
    lock = os.open(folder / _LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder)
    finally:
        os.close(lock)


def _make(folder: Path, target: Path) -> Path:
    """Of the target's own name, but ending in `.gguf`: llama.cpp's programs choose the format by it."""
    path = folder / f"{target.name.removesuffix('.gguf')}.gguf"
    with _own():
        path.touch(exist_ok=False)
    return path


def _open_no_link(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC)


def _publish(path: Path, target: Path) -> None:
    try:
        with _own():
            os.link(path, target)
    except _OwnError as error:
        if error.errno == errno.EEXIST:
            raise ConfigError("out", str(target), "is there already; remove it or give another name") from error
        raise


def _sync(path: Path) -> None:
    with _own():
        file = _open_no_link(str(path), os.O_RDONLY)
        try:
            os.fsync(file)
        finally:
            os.close(file)


def _files(given: str | os.PathLike[str]) -> Iterator[Path]:
    path = Path(given)
    if path.is_dir():
        yield from (each for each in path.iterdir() if each.suffix != ".gguf")
    else:
        yield from shard_paths(path)
