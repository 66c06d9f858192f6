"""Who holds which block of a paged KV cache: bookkeeping alone, no tensors.

A sequence's tokens lie in blocks of `block_size`. Blocks are counted by reference: forks share all of theirs, and
sequences that begin with the same tokens share the full blocks of that beginning. A shared block is copied before it is
written. Blocks that nobody holds keep their content, and can be shared again, until another sequence needs the room.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count

from lltm_ray.errors import CacheFullError, ConfigError

_ROOT = 0


@dataclass(slots=True)
class _Held:
    """One sequence."""

    blocks: array[int] = field(default_factory=lambda: array("i"))
    length: int = 0
    tail: list[int] = field(default_factory=list)
    """Tokens of the last block, while it is not full."""
    content: int | None = _ROOT
    """Number of the content of its full blocks; None once a token was not told: nothing after it can be shared."""


class BlockTables:
    """Block tables of all sequences of one cache.

    Args:
        n_blocks: blocks there are.
        block_size: tokens a block holds.

    Raises:
        ConfigError: a number below 1.
    """

    def __init__(self, n_blocks: int, block_size: int) -> None:
        for name, value in (("n_blocks", n_blocks), ("block_size", block_size)):
            if value < 1:
                raise ConfigError(name, value, "must be at least 1")
        self.n_blocks, self.block_size = n_blocks, block_size
        self._holders = array("i", bytes(4 * n_blocks))
        self._empty = list(range(n_blocks - 1, -1, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()
        """Blocks that nobody holds but whose content is known; the first one goes first."""
        self._known: dict[tuple[int, tuple[int, ...]], tuple[int, int]] = {}
        """(content before, tokens) -> (block, content after). Tokens are kept, so no two beginnings can collide."""
        self._key_of: dict[int, tuple[int, tuple[int, ...]]] = {}
        self._numbers = count(_ROOT + 1)
        self._ids = count()
        self._sequences: dict[int, _Held] = {}

    # what there is ----------------------------------------------------------------------------------------------

    @property
    def free_blocks(self) -> int:
        """Blocks that no sequence holds."""
        return len(self._empty) + len(self._idle)

    def __len__(self) -> int:
        return len(self._sequences)

    def length(self, sequence: int) -> int:
        """Tokens whose keys and values are in the cache."""
        return self._held(sequence).length

    def blocks(self, sequence: int) -> array[int]:
        """The sequence's blocks in order; not to be changed."""
        return self._held(sequence).blocks

    def blocks_for(self, n_tokens: int) -> int:
        """Blocks that hold so many tokens."""
        return -(-n_tokens // self.block_size)

    # sequences --------------------------------------------------------------------------------------------------

    def open(self, tokens: Sequence[int] = ()) -> int:
        """A new sequence that shares what the cache has of the beginning of `tokens`, in whole blocks.

        At least one of `tokens` is left to compute, for its logits are wanted. `length` tells how many are there.
        """
        held = _Held()
        for start in range(0, len(tokens) - self.block_size, self.block_size):
            found = self._known.get((held.content or _ROOT, tuple(tokens[start : start + self.block_size])))
            if found is None:
                break
            block, held.content = found
            self._hold(block)
            held.blocks.append(block)
            held.length += self.block_size
        return self._add(held)

    def fork(self, sequence: int) -> int:
        """A second sequence with the same tokens; blocks are copied when one of the two writes into them."""
        held = self._held(sequence)
        for block in held.blocks:
            self._hold(block)
        return self._add(_Held(held.blocks[:], held.length, list(held.tail), held.content))

    def reserve(self, sequence: int, n_tokens: int) -> list[tuple[int, int]]:
        """Make room for `n_tokens` more, all of it or none.

        Returns:
            (from, to) of blocks whose content must be copied before the sequence is written.

        Raises:
            CacheFullError: fewer blocks are free than needed.
        """
        held = self._held(sequence)
        end = self.blocks_for(held.length + n_tokens)
        written = range(held.length // self.block_size, min(end, len(held.blocks)))
        shared = [position for position in written if self._holders[held.blocks[position]] > 1]
        more = max(0, end - len(held.blocks))
        need = more + len(shared)
        if need > self.free_blocks:
            why = f"{need} blocks of {self.block_size} tokens needed, {self.free_blocks} of {self.n_blocks} free"
            raise CacheFullError(
                f"the KV cache is full: {why}; free a sequence or make the cache larger",
                need_blocks=need,
                free_blocks=self.free_blocks,
            )
        copies = [self._split(held, position) for position in shared]
        held.blocks.extend(self._take() for _ in range(more))
        return copies

    def advance(self, sequence: int, tokens: Sequence[int], *, shareable: bool = True) -> None:
        """Say that the keys and values of `tokens` were written behind the sequence's others.

        Args:
            sequence: which one.
            tokens: what they were.
            shareable: False if the tokens alone do not say what was written (images): they are never shared.

        Raises:
            ConfigError: there was no room reserved for them.
        """
        held = self._held(sequence)
        if held.length + len(tokens) > len(held.blocks) * self.block_size:
            raise ConfigError("tokens", len(tokens), "are more than were reserved; call reserve first")
        held.length += len(tokens)
        if not shareable:
            held.content = None
        if held.content is None:
            return
        held.tail += tokens
        while len(held.tail) >= self.block_size:
            held.content = self._remember(held, (held.content, tuple(held.tail[: self.block_size])))
            del held.tail[: self.block_size]

    def free(self, sequence: int) -> None:
        """Give the sequence's blocks back; what they hold can be shared until they are needed."""
        held = self._held(sequence)
        del self._sequences[sequence]
        for block in reversed(held.blocks):  # a beginning is worth more than its end, so the end goes first
            self._drop(block)

    # blocks -----------------------------------------------------------------------------------------------------

    def _held(self, sequence: int) -> _Held:
        held = self._sequences.get(sequence)
        if held is None:
            raise ConfigError("sequence", sequence, "is not open; it was freed, or is of another cache")
        return held

    def _add(self, held: _Held) -> int:
        sequence = next(self._ids)
        self._sequences[sequence] = held
        return sequence

    def _hold(self, block: int) -> None:
        self._idle.pop(block, None)
        self._holders[block] += 1

    def _drop(self, block: int) -> None:
        self._holders[block] -= 1
        if self._holders[block]:
            return
        if block in self._key_of:
            self._idle[block] = None
        else:
            self._empty.append(block)

    def _take(self) -> int:
        if self._empty:
            block = self._empty.pop()
        else:
            block, _ = self._idle.popitem(last=False)
            del self._known[self._key_of.pop(block)]
        self._holders[block] = 1
        return block

    def _split(self, held: _Held, position: int) -> tuple[int, int]:
        shared, own = held.blocks[position], self._take()
        held.blocks[position] = own
        self._drop(shared)
        return shared, own

    def _remember(self, held: _Held, key: tuple[int, tuple[int, ...]]) -> int:
        """Let the block that has just become full be shared; the number of the content up to its end."""
        if key not in self._known:
            block = held.blocks[(held.length - len(held.tail)) // self.block_size]
            self._known[key] = (block, next(self._numbers))
            self._key_of[block] = key
        return self._known[key][1]
