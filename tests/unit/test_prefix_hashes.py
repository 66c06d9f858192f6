"""Hashes of beginnings: equal as far as prompts are, and of no use without the salt."""

from __future__ import annotations

import random

import pytest

from lltm_ray._prefix import END_BYTES, HASH_BYTES, SALT_BYTES, hash_prefixes

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
