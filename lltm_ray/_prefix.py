"""Salted hashes of a prompt's beginnings: what analytics may see of prompts.

Two prompts of one fleet share the hash at a length exactly if they share all bytes before it. The salt is the fleet's:
who reads the hashes without it cannot test what a prompt was. It is in the memory of the fleet's drivers, directory and
gateways, and in Ray's control store, for it is an argument of the directory's actor (a Redis that backs that store has
it on disk). We ourselves write it to no log and no file. Lengths grow with the prompt, so that one of a megabyte has
72 hashes: every 256 bytes up to 2 KiB, every 512 up to 8, every 2 KiB up to 32, then 8 up to 128, 32 up to 1 MiB.
"""

from __future__ import annotations

from hashlib import blake2b

HASH_BYTES = 8
SALT_BYTES = 32
END_BYTES = (
    *range(256, 2048, 256),
    *range(2048, 8192, 512),
    *range(8192, 32_768, 2048),
    *range(32_768, 131_072, 8192),
    *range(131_072, 2**20 + 1, 32_768),
)
"""Depth -> bytes of the prompt that its hash covers."""


def hash_prefixes(prompt: bytes, salt: bytes) -> bytes:
    """`HASH_BYTES` for each beginning that is long enough, in the order of their depth.

    Args:
        prompt: as the router compares it.
        salt: 16 to 64 bytes, the same in all gateways of a fleet.
    """
    size, start, last = len(prompt), 0, b""
    found = []
    for end in END_BYTES:
        if end > size:
            break
        last = blake2b(prompt[start:end] + last, digest_size=HASH_BYTES, key=salt).digest()
        found.append(last)
        start = end
    return b"".join(found)
