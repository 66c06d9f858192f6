"""A paged cache's bookkeeping against a model of it: dictionaries of token lists."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lltm_ray.errors import CacheFullError, ConfigError
from lltm_ray.kernels.block_tables import BlockTables


class Memory:
    """What blocks would hold, if tokens were written where the tables say."""

    def __init__(self, n_blocks: int, size: int) -> None:
        self.tables, self.size = BlockTables(n_blocks, size), size
        self.blocks = [[None] * size for _ in range(n_blocks)]

    def extend(self, sequence: int, tokens: list[int]) -> None:
        for source, target in self.tables.reserve(sequence, len(tokens)):
            self.blocks[target] = list(self.blocks[source])
        held, start = self.tables.blocks(sequence), self.tables.length(sequence)
        for place, token in enumerate(tokens, start):
            self.blocks[held[place // self.size]][place % self.size] = token
        self.tables.advance(sequence, tokens)

    def read(self, sequence: int) -> list[int]:
        held = self.tables.blocks(sequence)
        return [self.blocks[held[at // self.size]][at % self.size] for at in range(self.tables.length(sequence))]


def test_blocks_are_taken_as_needed_and_given_back():
    memory = Memory(4, 4)
    one = memory.tables.open()
    memory.extend(one, [1, 2, 3])
    assert (memory.tables.free_blocks, memory.tables.length(one)) == (3, 3)
    memory.extend(one, [4])
    assert memory.tables.free_blocks == 3
    memory.extend(one, [5])
    assert memory.tables.free_blocks == 2
    memory.tables.free(one)
    assert (memory.tables.free_blocks, len(memory.tables)) == (4, 0)


def test_a_full_cache_says_what_it_lacks_and_changes_nothing():
    memory = Memory(2, 4)
    one = memory.tables.open()
    memory.extend(one, [1, 2, 3, 4, 5])
    with pytest.raises(CacheFullError, match="2 blocks of 4 tokens needed, 0 of 2 free") as caught:
        memory.tables.reserve(one, 8)
    assert (caught.value.need_blocks, caught.value.free_blocks) == (2, 0)
    memory.extend(one, [6, 7, 8])
    assert memory.read(one) == [1, 2, 3, 4, 5, 6, 7, 8]


def test_a_fork_is_copied_when_one_of_the_two_writes():
    memory = Memory(8, 4)
    one = memory.tables.open()
    memory.extend(one, [1, 2, 3, 4, 5])
    two = memory.tables.fork(one)
    assert memory.tables.free_blocks == 6
    memory.extend(two, [7])
    memory.extend(one, [6])
    assert (memory.read(one), memory.read(two)) == ([1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 7])
    assert memory.tables.free_blocks == 5
    assert memory.tables.blocks(one)[0] == memory.tables.blocks(two)[0]


def test_room_reserved_before_a_fork_is_no_ones_alone():
    memory = Memory(8, 2)
    one = memory.tables.open()
    memory.tables.reserve(one, 5)
    two = memory.tables.fork(one)
    memory.extend(one, [1, 2, 3, 4])
    memory.extend(two, [5, 6, 7, 8])
    assert (memory.read(one), memory.read(two)) == ([1, 2, 3, 4], [5, 6, 7, 8])


def test_a_beginning_is_shared_in_whole_blocks_and_one_token_is_left():
    memory = Memory(8, 4)
    prompt = list(range(12))
    one = memory.tables.open(prompt)
    memory.extend(one, prompt)
    lengths = [memory.tables.length(memory.tables.open(each)) for each in (prompt, prompt[:9], prompt[:8], [9] * 12)]
    assert lengths == [8, 8, 4, 0]
    assert memory.tables.free_blocks == 5


def test_a_beginning_outlives_its_sequence_until_the_room_is_needed():
    memory = Memory(3, 4)
    prompt = list(range(9))
    one = memory.tables.open(prompt)
    memory.extend(one, prompt)
    memory.tables.free(one)
    again = memory.tables.open(prompt)
    assert memory.read(again) == prompt[:8]
    memory.tables.free(again)
    other = memory.tables.open()
    memory.extend(other, [50] * 8)  # takes the empty block, then the end of the prompt
    assert memory.tables.length(memory.tables.open(prompt)) == 4


def test_tokens_that_do_not_say_what_was_written_are_not_shared():
    tables = BlockTables(8, 2)
    one = tables.open()
    tables.reserve(one, 4)
    tables.advance(one, [1, 2])
    tables.advance(one, [3, 4], shareable=False)
    assert tables.length(tables.open([1, 2, 3, 4, 5])) == 2


def test_mistakes_are_told():
    tables = BlockTables(2, 4)
    one = tables.open()
    with pytest.raises(ConfigError, match="call reserve first"):
        tables.advance(one, [1])
    tables.free(one)
    for call in (tables.free, tables.length, tables.fork):
        with pytest.raises(ConfigError, match="is not open"):
            call(one)
    with pytest.raises(ConfigError, match="block_size"):
        BlockTables(2, 0)


@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 10**6), n_blocks=st.integers(1, 12), size=st.integers(1, 4))
def test_whatever_is_done_each_sequence_reads_back_its_own_tokens(seed, n_blocks, size):
    source, memory, expected = random.Random(seed), Memory(n_blocks, size), {}
    for _ in range(60):
        act = source.choice("oefx") if expected else "o"
        chosen = source.choice(sorted(expected)) if expected else -1
        tokens = [source.randrange(2) for _ in range(source.randrange(8))]
        if act == "o" and len(expected) < 6:
            new = memory.tables.open(tokens)
            expected[new] = tokens[: memory.tables.length(new)]
        elif act == "f" and len(expected) < 6:
            expected[memory.tables.fork(chosen)] = list(expected[chosen])
        elif act == "x":
            memory.tables.free(chosen)
            del expected[chosen]
        elif act == "e":
            before = memory.tables.free_blocks
            try:
                memory.extend(chosen, tokens)
                expected[chosen] += tokens
            except CacheFullError:
                assert memory.tables.free_blocks == before
        assert {each: memory.read(each) for each in expected} == expected
        used = {block for each in expected for block in memory.tables.blocks(each)}
        assert memory.tables.free_blocks == n_blocks - len(used)
