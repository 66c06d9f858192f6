"""Hashes of beginnings: equal as far as prompts are, and of no use without the salt."""

from __future__ import annotations

import random

import pytest

from lltm_ray._prefix import (
    BLOCK_BYTES,
    END_BYTES,
    HASH_BYTES,
    LEAST_BLOCK,
    MOST_BLOCK,
    MOST_BLOCKS,
    SALT_BYTES,
    BlockSampler,
    hash_blocks,
    hash_prefixes,
)

SALT = bytes(range(SALT_BYTES))


def hashes(prompt: bytes, salt: bytes = SALT) -> list[bytes]:
    joined = hash_prefixes(prompt, salt)
    return [joined[at : at + HASH_BYTES] for at in range(0, len(joined), HASH_BYTES)]


def test_two_prompts_share_a_hash_exactly_where_they_share_all_bytes_before_it():
    dice = random.Random(0)
    for _ in range(200):
        same, sizes = dice.randrange(20_000), [dice.randrange(20_000) for _ in range(2)]
        start = dice.randbytes(same)
        one, other = (start + mark + dice.randbytes(size) for mark, size in zip((b"a", b"b"), sizes, strict=True))
        found = [a == b for a, b in zip(hashes(one), hashes(other), strict=False)]
        assert found == [end <= same for end in END_BYTES[: len(found)]]


@pytest.mark.parametrize("size", [0, 255, 256, 257, 2048, 8191, 8192, 40_000, 2**20, 2**20 + 5_000])
def test_a_prompt_has_a_hash_for_every_length_that_it_fills(size):
    assert len(hashes(bytes(size))) == sum(end <= size for end in END_BYTES)


def test_no_two_hashes_of_a_prompt_are_equal_even_where_its_text_repeats():
    found = hashes(bytes(2**20))
    assert len(found) == len(set(found)) == len(END_BYTES) == 72


def test_lengths_grow_and_end_at_a_megabyte():
    assert list(END_BYTES) == sorted(set(END_BYTES))
    assert (END_BYTES[0], END_BYTES[-1]) == (256, 2**20)


def test_another_salt_makes_other_hashes_of_the_same_prompt():
    prompt = b"the heron at dusk; " * 100
    assert not set(hashes(prompt)) & set(hashes(prompt, SALT[::-1]))


# --- blocks


def blocks(prompt: bytes, salt: bytes = SALT) -> list[bytes]:
    joined = hash_blocks(prompt, salt)
    return [joined[at : at + HASH_BYTES] for at in range(0, len(joined), HASH_BYTES)]


def sizes(found: list[bytes]) -> list[int]:
    return [int.from_bytes(each[6:], "big") for each in found]


@pytest.mark.parametrize("head", [b"", b"x", b"It is 08:15:03, Friday. ", b"The user is Ada. " * 9, bytes(700)])
def test_text_has_the_same_blocks_whatever_stands_before_it(head):
    text = random.Random(1).randbytes(12_000)
    alone, behind = blocks(text), blocks(head + text)
    same = set(alone) & set(behind)
    assert sum(sizes(list(same))) > 10_000
    assert [each for each in behind if each in same] == [each for each in alone if each in same]
    if head:
        assert not {hashes(text)[at] for at in range(5)} & set(hashes(head + text))


def test_blocks_tell_their_sizes_and_cover_the_prompt_but_for_a_short_rest():
    dice = random.Random(2)
    for size in (0, 127, 128, 129, 500, 5000, 50_000, BLOCK_BYTES):
        found = sizes(blocks(dice.randbytes(size)))
        assert size - LEAST_BLOCK < sum(found) <= size
        assert all(LEAST_BLOCK <= each <= MOST_BLOCK for each in found)


def test_a_row_stays_short_whatever_the_prompt_is():
    dice = random.Random(3)
    assert len(blocks(dice.randbytes(2**20))) <= MOST_BLOCKS
    assert sum(sizes(blocks(bytes(2**20)))) == BLOCK_BYTES
    for period in (1, 7, 64, 300):  # a cut in each period would make the shortest blocks
        for _ in range(20):
            assert len(blocks(dice.randbytes(period) * (2**16 // period))) <= MOST_BLOCKS


def test_another_salt_makes_other_blocks_of_other_sizes():
    prompt = random.Random(4).randbytes(20_000)
    mine, others = blocks(prompt), blocks(prompt, SALT[::-1])
    assert not {each[:6] for each in mine} & {each[:6] for each in others}
    assert sizes(mine) != sizes(others)


def test_a_second_has_room_for_the_blocks_of_so_many_prompts_and_no_more():
    now, prompt = [10.0], random.Random(0).randbytes(4096)
    sampler = BlockSampler(lambda: now[0])

    def told(prompt: bytes, asked: int) -> int:
        return sum(sampler.of(prompt, SALT) == hash_blocks(prompt, SALT) != b"" for _ in range(asked))

    assert told(prompt, 1000) == 2**19 // (4096 + 6144) + 1
    now[0] = 10.9
    assert told(prompt, 10) == 0
    now[0] = 11.0
    assert told(random.Random(0).randbytes(2**20), 100) == 2**19 // (BLOCK_BYTES + 6144) + 1, "of a long one its head"
