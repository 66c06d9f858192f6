"""Sizes as people write them: `16GiB`, `500MB`; for several GPUs `2x16GiB` or `16GiB,24GiB`."""

from __future__ import annotations

import re

from lltm_ray.errors import ConfigError

_SIZE = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,15})?)\s*(?:([KMGT])(I?))?B?\Z", re.IGNORECASE)
_POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


def parse_bytes(field: str, text: str) -> int:
    """Bytes; `GiB` counts in 1024, `GB` and `G` in 1000.

    Raises:
        ConfigError: it is no size, or none above 0.
    """
    match = _SIZE.match(text.strip())
    size = int(float(match[1]) * (1024 if match[3] else 1000) ** _POWERS[(match[2] or "").upper()]) if match else 0
    if size <= 0:
        raise ConfigError(field, text, "must be a size such as 16GiB or 500MB")
    if match and not match[2] and size < 2**20:
        raise ConfigError(field, text, f"is in bytes; for GiB write {match[1]}GiB")
    return size


def parse_gpus(field: str, text: str) -> list[int]:
    """Memory of each GPU: sizes with a comma between, each with `<number>x` before it where there are several.

    Raises:
        ConfigError: as `parse_bytes`, or more than 128 GPUs.
    """
    found: list[int] = []
    for part in text.split(","):
        count, times, size = part.strip().lower().rpartition("x")
        if times and not count.isdecimal():
            raise ConfigError(field, text, "must be sizes such as 16GiB, 2x16GiB or 16GiB,24GiB")
        found += [parse_bytes(field, size)] * min(int(count or 1), 129)
    if not 0 < len(found) <= 128:
        raise ConfigError(field, text, "must be 1 to 128 GPUs")
    return found
