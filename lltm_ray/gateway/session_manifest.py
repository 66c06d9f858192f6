"""What stands on disk of one session: a small manifest, and what was said in a file of its own beside it."""

from __future__ import annotations

import json
import os
import re
import secrets
from dataclasses import asdict, dataclass, field, fields, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any, Self

from lltm_ray.errors import ConfigError
from lltm_ray.gateway.slot_files import SHOWN

FORMAT = 2
_FILE = re.compile(r"lltm-[0-9a-f]{32}\.bin\Z")
_SAID = re.compile(r"lltm-[0-9a-f]{32}\.said\Z")


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """What was said, and the fields that templates write before it."""

    messages: list[dict[str, Any]]
    fields: dict[str, Any] = field(default_factory=dict)

    def encode(self) -> bytes:
        """As its file has it."""
        return _encode(asdict(self))

    @classmethod
    def read(cls, path: Path) -> Self:
        """OSError as the system raises it; ConfigError: the file is damaged."""
        try:
            raw = json.loads(path.read_bytes())
            return cls(messages=raw["messages"], fields=raw["fields"])
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise ConfigError("messages", path.name[:SHOWN], f"are damaged, save them again: {error}") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """One session as its manifest has it; bytes are hexadecimal there."""

    name: str
    tenant: str
    model: str
    message_count: int
    said: str = ""
    """File of its messages; empty: they are not kept."""
    said_bytes: int = 0
    file: str = ""
    """Of its cache; empty: nothing can be restored, and `why` says why."""
    why: str = ""
    seal: str = ""
    build: str = ""
    tokens: int = 0
    file_bytes: int = 0
    sha256: str = ""
    salt: str = ""
    key_bytes: int = 0
    whole: str = ""
    hashes: str = ""
    saved_unix_s: float = 0.0
    format: int = FORMAT

    def with_said(self, size_bytes: int) -> Kept:
        """With a new file for its messages, whose name nobody can guess."""
        return replace(self, said=f"lltm-{secrets.token_hex(16)}.said", said_bytes=size_bytes)

    def without_file(self, why: str) -> Kept:
        """The same conversation; its cache is gone."""
        return replace(self, file="", file_bytes=0, tokens=0, sha256="", whole="", hashes="", why=why)

    def encode(self) -> bytes:
        """As its manifest has it."""
        return _encode(asdict(self))

    @classmethod
    def read(cls, path: Path, shown: str = "") -> Self | None:
        """A manifest; None where there is no such file.

        Args:
            path: its place is made of the tenant and the name that stand in it.
            shown: what errors call it; empty: the file's beginning.

        Raises:
            ConfigError: it is none, of another version, or another session's.
        """
        try:
            raw = json.loads(path.read_bytes())
            if raw["format"] != FORMAT:
                raise ValueError("another version of lltm_ray wrote it")
            kept = cls(**{each.name: raw[each.name] for each in fields(cls) if each.name in raw})
            if path != manifest_of(path.parent.parent, kept.tenant, kept.name):
                raise ValueError("it is another session's")
            bytes.fromhex(kept.salt + kept.whole + kept.hashes)
            if len(files_in(raw)) != bool(kept.file) + bool(kept.said):
                raise ValueError("it names files that are none of ours")
            return kept
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            why = f"cannot be read, save it again or delete it: {error}"
            raise ConfigError("session", shown or path.name[:SHOWN], why) from None


def place_of(folder: Path, tenant: str) -> Path:
    """A tenant's folder; its name becomes no path."""
    return folder / _digest(tenant)


def manifest_of(folder: Path, tenant: str, name: str) -> Path:
    """Where a session's manifest is; names become no paths."""
    return place_of(folder, tenant) / f"{_digest(name)}.json"


def files_of(path: Path) -> set[str]:
    """Files that a manifest names, also one of another version; none where it is no JSON, or not there."""
    try:
        return files_in(json.loads(path.read_bytes()))
    except (FileNotFoundError, ValueError, RecursionError):
        return set()


def files_in(raw: Any) -> set[str]:
    """Those of a manifest's files that are ours: of no other folder, and of no other kind."""
    if not isinstance(raw, dict):
        return set()
    named = ((raw.get("file"), _FILE), (raw.get("said"), _SAID))
    return {name for name, form in named if isinstance(name, str) and form.match(name)}


def write_new(path: Path, data: bytes) -> None:
    """A new file, readable by its owner only; on disk also after a power cut, or not there."""
    try:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600), "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def _encode(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")


def _digest(text: str) -> str:
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
