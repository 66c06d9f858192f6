"""Step 4: text and conversations as token ids, in batches of one size."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from lessons import HELD_OUT_TEXT, Chat, Lessons, draw_chat
from tokenizers import Tokenizer
from vocabulary import END, END_OF_TEXT, START

Ids = npt.NDArray[np.uint16]
CONTEXT = 1024
LENGTHS = (128, 256, CONTEXT)
"""Conversations are padded to one of these: few shapes, few compilations."""
BATCH_TOKENS = 65_536
HELD_OUT_SOURCE, HELD_OUT_EVERY = "Python", 8
"""Of the standard library's documents each so many-th is kept back."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Inputs and targets, int64 (rows, length); targets are -100 where nothing is to be learnt."""

    inputs: torch.Tensor
    targets: torch.Tensor


def read_text(path: Path) -> tuple[list[str], list[str]]:
    """Documents for training, and those kept back."""
    with gzip.open(path, "rt", encoding="ascii") as file:
        documents = [json.loads(line) for line in file]
    test = [each["text"] for each in documents if each["source"].startswith(HELD_OUT_SOURCE)][::HELD_OUT_EVERY]
    kept, asked = set(test), set(HELD_OUT_TEXT.read_text(encoding="ascii").splitlines())
    others = (each["text"].splitlines() for each in documents if each["text"] not in kept)
    return ["\n".join(line for line in lines if line not in asked) for lines in others], test


def draw_chats(lessons: Lessons, count: int, seed: int) -> list[Chat]:
    """Conversations, drawn by as many processes as there are cores; the same seed gives the same ones."""
    parts = 64
    with ProcessPoolExecutor() as pool:
        drawn = pool.map(partial(_draw_part, lessons, count // parts), range(seed * parts, (seed + 1) * parts))
        return [chat for part in drawn for chat in part]


def _draw_part(lessons: Lessons, count: int, seed: int) -> list[Chat]:
    dice = random.Random(seed)
    return [draw_chat(lessons, dice) for _ in range(count)]


def encode_text(tokenizer: Tokenizer, texts: list[str]) -> Ids:
    """One long run of ids, the texts shuffled, each ended by the end-of-text token."""
    documents = random.Random(0).sample(texts, len(texts))
    encoded = tokenizer.encode_batch_fast([document + END_OF_TEXT for document in documents])
    return np.fromiter((token for each in encoded for token in each.ids), np.uint16)


def encode_chats(tokenizer: Tokenizer, chats: list[Chat]) -> list[tuple[Ids, npt.NDArray[np.bool_]]]:
    """Ids of each conversation, and which of them the assistant wrote (the token that ends an answer too)."""
    parts = [part for chat in chats for message in chat for part in _parts(message)]
    pieces = iter(each.ids for each in tokenizer.encode_batch_fast(parts))
    found = []
    for chat in chats:
        ids: list[int] = []
        wrote: list[bool] = []
        for message in chat:
            head, body, tail = next(pieces), next(pieces), next(pieces)
            ids += head + body + tail
            wrote += [False] * len(head) + [message["role"] == "assistant"] * len(body) + [False] * len(tail)
        found.append((np.array(ids, np.uint16), np.array(wrote)))
    return found


def _parts(message: dict[str, str]) -> tuple[str, str, str]:
    """A message in three pieces that tokenize alone as they do together."""
    return f"{START}{message['role']}\n", f"{message['content']}{END}", "\n"


def text_batches(ids: Ids, device: torch.device, seed: int) -> Iterator[Batch]:
    """Windows of the whole context at random places, for ever."""
    dice, rows = np.random.default_rng(seed), BATCH_TOKENS // CONTEXT
    whole = torch.from_numpy(ids.astype(np.int64)).to(device)
    steps = torch.arange(CONTEXT, device=device)
    while True:
        starts = torch.from_numpy(dice.integers(0, len(ids) - CONTEXT - 1, rows)).to(device)
        places = starts[:, None] + steps
        yield Batch(whole[places], whole[places + 1])


def chat_batches(chats: list[tuple[Ids, npt.NDArray[np.bool_]]], device: torch.device, seed: int) -> Iterator[Batch]:
    """Conversations from their beginning, padded to the next of `LENGTHS`, in a new order each time, for ever."""
    dice = np.random.default_rng(seed)
    buckets = [_pad(chats, low, high, device) for low, high in zip((0, *LENGTHS), LENGTHS, strict=False)]
    if all(len(bucket.inputs) < BATCH_TOKENS // bucket.inputs.shape[1] for bucket in buckets):
        raise ValueError(f"{len(chats)} conversations do not fill one batch: draw more (--chats)")
    while True:
        order = [(bucket, rows) for bucket in buckets for rows in _rows(bucket, dice)]
        for place in dice.permutation(len(order)):
            bucket, rows = order[place]
            chosen = torch.from_numpy(rows).to(device)
            yield Batch(bucket.inputs[chosen], bucket.targets[chosen])


def _pad(chats: list[tuple[Ids, npt.NDArray[np.bool_]]], low: int, high: int, device: torch.device) -> Batch:
    """All conversations of more than `low` and at most `high` predicted tokens."""
    fitting = [chat for chat in chats if low < len(chat[0]) - 1 <= high]
    inputs = np.zeros((len(fitting), high), np.int64)
    targets = np.full((len(fitting), high), -100, np.int64)
    for row, (ids, wrote) in enumerate(fitting):
        inputs[row, : len(ids) - 1] = ids[:-1]
        targets[row, : len(ids) - 1] = np.where(wrote[1:], ids[1:].astype(np.int64), -100)
    return Batch(torch.from_numpy(inputs).to(device), torch.from_numpy(targets).to(device))


def _rows(bucket: Batch, dice: np.random.Generator) -> Iterator[npt.NDArray[np.int64]]:
    """Whole batches alone; what is left over comes with the next order."""
    count, length = bucket.inputs.shape
    rows = BATCH_TOKENS // length
    order = dice.permutation(count)
    return (order[start : start + rows] for start in range(0, count - rows + 1, rows))
