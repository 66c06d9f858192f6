"""Salted hashes of a prompt's beginnings, and of its blocks: what analytics may see of prompts.

Two prompts of one fleet share the hash at a length exactly if they share all bytes before it. The salt is the fleet's:
who reads the hashes without it cannot test what a prompt was. It is in the memory of the fleet's drivers, directory and
gateways, and in Ray's control store, for it is an argument of the directory's actor (a Redis that backs that store has
it on disk). We ourselves write it to no log and no file. Lengths grow with the prompt, so that one of a megabyte has
72 hashes: every 256 bytes up to 2 KiB, every 512 up to 8, every 2 KiB up to 32, then 8 up to 128, 32 up to 1 MiB.

A beginning says nothing of what follows a first difference. So there are hashes of a prompt's blocks besides, each of
its own bytes only, and cut where the text itself says, so that equal text has equal blocks wherever it stands
(content-defined chunking, Muthitacharoen et al. 2001). Where to cut depends on the salt too: else the sizes of blocks
would tell which text it is. Who reads them sees which prompts have passages in common, and how long these are.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import lru_cache
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


BLOCK_BYTES, MOST_BLOCKS = 2**16, 128
"""Of a prompt: what is cut into blocks, and how many are told at most."""
LEAST_BLOCK, MOST_BLOCK = 128, 4096
"""Bytes of a block; on average about 640."""
SIZE_BITS = 16
"""The last bits of a told block are its size, those before its hash."""
_WINDOW, _CUT_EVERY = 8, 512
"""Bytes that a cut depends on, and bytes from one to the next, on average."""


def hash_blocks(prompt: bytes, salt: bytes) -> bytes:
    """`HASH_BYTES` for each block, in their order: 6 of the salted hash of its bytes, then 2 of its size, big-endian.

    The same text has the same blocks in two prompts from the first cut that both make in it, mostly within 1 KB.

    Args:
        prompt: as the router compares it; the first `BLOCK_BYTES` count.
        salt: as for `hash_prefixes`.
    """
    size = min(len(prompt), BLOCK_BYTES)
    if size < LEAST_BLOCK:
        return b""
    found: list[bytes] = []
    start = 0
    for end in (*_cuts(prompt, size, salt), size):
        while end - start >= LEAST_BLOCK and len(found) < MOST_BLOCKS:
            stop = min(end, start + MOST_BLOCK)
            digest = blake2b(prompt[start:stop], digest_size=HASH_BYTES - SIZE_BITS // 8, key=salt).digest()
            found.append(digest + (stop - start).to_bytes(SIZE_BITS // 8, "big"))
            start = stop
    return b"".join(found)


_BUDGET_BYTES = 2**19
"""Of prompts that are cut into blocks in a second, so that it takes half a percent of a core at most."""
_CALL_BYTES = 6144
"""What it takes besides, in bytes that could have been cut in that time."""


class BlockSampler:
    """Hashes the blocks of as many prompts as a second has room for, in the order in which they come.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._second, self._left_bytes = -1, 0

    def of(self, prompt: bytes, salt: bytes) -> bytes:
        """As `hash_blocks`; nothing for a prompt that is left out."""
        second = int(self._clock())
        if second != self._second:
            self._second, self._left_bytes = second, _BUDGET_BYTES
        if self._left_bytes <= 0:
            return b""
        self._left_bytes -= min(len(prompt), BLOCK_BYTES) + _CALL_BYTES
        return hash_blocks(prompt, salt)


def _cuts(prompt: bytes, size: int, salt: bytes) -> list[int]:
    """Ends of the windows whose secret linear function is small."""
    import numpy as np  # who only reads hashes does without

    factor, summand = (np.uint64(each) for each in _secrets(salt))
    windows = np.ndarray((size - _WINDOW + 1,), "<u8", prompt, strides=(1,))
    is_cut = windows * factor + summand < np.uint64(2**64 // _CUT_EVERY)
    ends: list[int] = (np.flatnonzero(is_cut) + _WINDOW).tolist()
    return ends


@lru_cache(maxsize=8)
def _secrets(salt: bytes) -> tuple[int, int]:
    found = blake2b(b"cuts", digest_size=16, key=salt).digest()
    return int.from_bytes(found[:8]) | 1, int.from_bytes(found[8:])
