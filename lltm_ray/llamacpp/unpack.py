"""Take llama-server and its libraries out of a release archive, which is hostile until every member has been looked at.

Refused anywhere in the archive: devices, hard links, paths that leave it, a name twice, too many members, too many
bytes. Real releases name their libraries through symbolic links (`libllama.so.0 -> libllama.so.0.5.0`); those may lead
to a file beside them and are unpacked as a second name of that file, so that nothing on disk points anywhere.
"""

from __future__ import annotations

import gzip
import os
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, Protocol

from lltm_ray.errors import ServerBinaryError
from lltm_ray.llamacpp.binary import SERVER_NAME

MAX_UNPACKED_BYTES = 4 * 2**30
"""The largest real one, CUDA with many architectures, is below 1 GiB."""
MAX_MEMBERS = 4096
_MAX_READ_BYTES = 2**20
_LINK_HOPS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One file of an archive; with `link` it is another name of the sibling called so."""

    path: PurePosixPath
    size: int
    source: Any
    link: str | None = None


class _Archive(Protocol):
    def members(self) -> Iterator[Member]: ...

    def open(self, member: Member) -> AbstractContextManager[IO[bytes]]: ...


def unpack_server(archive: Path, folder: Path) -> None:
    """Unpack llama-server and the files beside it into an empty `folder`; only the server becomes executable.

    Raises:
        ServerBinaryError: the archive is not a tar.gz or zip, is damaged, hostile, or holds no single llama-server.
    """
    try:
        with _opened(archive) as opened:
            members = _checked(opened.members())
            for member in _beside_server(members):
                _write(opened, member, folder)
            for member in _beside_server(members):
                if member.link is not None:
                    os.link(folder / _resolve(member, members).path.name, folder / member.path.name)
    except (tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ServerBinaryError(f"the archive is damaged: {error}", path=str(archive)) from error
    (folder / SERVER_NAME).chmod(0o755)


def _write(opened: _Archive, member: Member, folder: Path) -> None:
    if member.link is not None:
        return
    target = folder / member.path.name
    with opened.open(member) as source, target.open("xb") as file:
        shutil.copyfileobj(source, file, 64 * 1024)
        if file.tell() != member.size:
            raise ServerBinaryError(f"the archive's {member.path} has {file.tell()} bytes, not {member.size}")
    target.chmod(0o644)


def _checked(members: Iterable[Member]) -> dict[PurePosixPath, Member]:
    """All members by path, looked at one by one, so that a bomb is refused before it is unfolded."""
    found: dict[PurePosixPath, Member] = {}
    total = 0
    for member in members:
        total += member.size
        if total > MAX_UNPACKED_BYTES or len(found) >= MAX_MEMBERS:
            raise ServerBinaryError(f"the archive is over the limit of {MAX_MEMBERS} files, {MAX_UNPACKED_BYTES} bytes")
        if member.path in found or not member.path.name:
            raise ServerBinaryError(f"the archive holds {member.path} twice, or a file without a name")
        found[member.path] = member
    for member in found.values():
        _resolve(member, found)
    return found


def _resolve(member: Member, members: dict[PurePosixPath, Member]) -> Member:
    """The file that a link is another name of."""
    seen: Member | None = member
    for _ in range(_LINK_HOPS):
        if seen is None or seen.link is None:
            break
        beside = seen.path.parent / seen.link if PurePosixPath(seen.link).name == seen.link else None
        seen = members.get(beside) if beside is not None else None
    if seen is None or seen.link is not None:
        raise ServerBinaryError(f"the archive's {member.path} is a link to {member.link!r}, which is no file beside it")
    return seen


def _beside_server(members: dict[PurePosixPath, Member]) -> list[Member]:
    servers = [path for path, member in members.items() if path.name == SERVER_NAME and member.link is None]
    if len(servers) != 1:
        raise ServerBinaryError(f"the archive holds {len(servers)} files named {SERVER_NAME}; is it a llama.cpp build?")
    return [member for path, member in members.items() if path.parent == servers[0].parent]


def _safe_path(name: str) -> PurePosixPath:
    path = PurePosixPath(name)
    odd = "\\" in name or not name.isprintable() or len(name) > 512
    if odd or path.is_absolute() or ".." in path.parts:
        raise ServerBinaryError(f"the archive holds the path {name[:200]!r}, which leaves its folder or is not plain")
    return path


def _not_plain(name: str) -> ServerBinaryError:
    return ServerBinaryError(f"the archive holds {name!r}, which is neither a file nor a folder")


@contextmanager
def _opened(path: Path) -> Iterator[_Archive]:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as zipped:
            yield _Zip(zipped)
    else:
        with _BoundedGzip(path) as unzipped, tarfile.open(fileobj=unzipped, mode="r:") as tarred:
            yield _Tar(tarred)


class _BoundedGzip(gzip.GzipFile):
    """Refuses a huge single read: tarfile takes a header of whatever size it claims into memory at once."""

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= _MAX_READ_BYTES:
            raise ServerBinaryError(f"the archive holds a header of {size} bytes")
        return super().read(size)


class _Tar:
    def __init__(self, file: tarfile.TarFile) -> None:
        self._file = file

    def members(self) -> Iterator[Member]:
        for info in self._file:
            path = _safe_path(info.name)
            if info.isreg() and not info.issparse():
                yield Member(path=path, size=info.size, source=info)
            elif info.issym():
                yield Member(path=path, size=0, source=info, link=info.linkname)
            elif not info.isdir():
                raise _not_plain(info.name)

    def open(self, member: Member) -> IO[bytes]:
        file = self._file.extractfile(member.source)
        if file is None:
            raise _not_plain(member.source.name)
        return file


class _Zip:
    def __init__(self, file: zipfile.ZipFile) -> None:
        self._file = file

    def members(self) -> Iterator[Member]:
        for info in self._file.infolist():
            path = _safe_path(info.filename)
            kind = stat.S_IFMT(info.external_attr >> 16)
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR) or info.flag_bits & 1:
                raise _not_plain(info.filename)
            if not info.is_dir():
                yield Member(path=path, size=info.file_size, source=info)

    def open(self, member: Member) -> IO[bytes]:
        return self._file.open(member.source)
