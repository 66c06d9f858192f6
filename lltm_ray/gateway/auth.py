"""API keys: who may ask. Keys live here as digests only, and are never logged."""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Self

from lltm_ray._files import read_keys
from lltm_ray.errors import AuthenticationError

_log = logging.getLogger(__name__)


class ApiKeys:
    """Keys that open the gateway; none at all leaves it open, which `GatewayConfig` allows on loopback only."""

    def __init__(self, keys: Iterable[str] = ()) -> None:
        """Take keys, each with its tenant's name behind a space if it has one."""
        named = [key.split(None, 1) for key in keys]
        self._digests = {_digest(key.encode("utf-8")): "".join(name).strip() for key, *name in named}

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> Self:
        """Read one `KEY [TENANT]` a line; blank lines and lines that start with `#` are skipped.

        Keys of one tenant share its part of a full fleet; without a name a key is a tenant of its own.

        Raises:
            ConfigError: the file cannot be read or holds no key.
        """
        keys = read_keys(path)
        if Path(path).stat().st_mode & (stat.S_IRGRP | stat.S_IROTH):
            _log.warning("api_key_file %s can be read by others; chmod 600 it", path)
        return cls(keys)

    def __bool__(self) -> bool:
        return bool(self._digests)

    def __len__(self) -> int:
        return len(self._digests)

    def check(self, headers: Iterable[tuple[bytes, bytes]]) -> str:
        """Let a request with one of our keys in `Authorization: Bearer` or `x-api-key` pass.

        Args:
            headers: ASGI headers, names in lower case.

        Returns:
            The tenant: its name, else the beginning of the key's digest; empty where the gateway is open.

        Raises:
            AuthenticationError: no such key.
        """
        if not self._digests:
            return ""
        tenants = [tenant for key in _keys_of(headers) if (tenant := self._tenant(key)) is not None]
        if not tenants:
            raise AuthenticationError("Invalid API Key")
        return tenants[0]

    def _tenant(self, key: bytes) -> str | None:
        digest = _digest(key)
        found = None
        for each, name in self._digests.items():  # all of them, so that the time taken tells nothing
            if hmac.compare_digest(each, digest):
                found = name or f"key-{digest.hex()[:8]}"
        return found


def _keys_of(headers: Iterable[tuple[bytes, bytes]]) -> Iterable[bytes]:
    for name, value in headers:
        if name == b"authorization" and value[:7].lower() == b"bearer ":
            yield value[7:].strip()
        elif name == b"x-api-key":
            yield value.strip()


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
