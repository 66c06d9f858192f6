"""Step 3: the tokenizer: byte-level BPE with GPT-2's splitting, which llama.cpp knows as `gpt-2`."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
"""Ids 0, 1 and 2; the last ends an answer."""
SIZE = 4096
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = [AddedToken(token, special=True, normalized=False) for token in (END_OF_TEXT, START, END)]
    trainer = trainers.BpeTrainer(
        vocab_size=SIZE, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def random_text(dice: random.Random) -> str:
    """Up to 60 pieces of one to three kinds: letters, signs, control characters, any of Unicode, special tokens."""
    kinds = dice.sample(range(6), dice.randint(1, 3))
    return "".join(_piece(dice.choice(kinds), dice) for _ in range(dice.randint(1, 60)))


def _piece(kind: int, dice: random.Random) -> str:
    if kind == 0:
        return chr(dice.randint(32, 126))
    if kind == 1:
        return dice.choice((" ", "  ", "\n", "\t", "\r\n", "'s", "'LL", " the", "token", "123", "_"))
    if kind == 2:
        return chr(dice.randint(1, 31))
    if kind == 3:
        return chr(dice.randint(0xA0, 0x2FFF))
    if kind == 4:
        return chr(dice.choice((dice.randint(0x3000, 0xD7FF), dice.randint(0xE000, 0x10FFFF))))
    return dice.choice((START, END, END_OF_TEXT, "<|im_", "|>"))


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """As a checkpoint holds it: `tokenizer.json` and, with the chat template, `tokenizer_config.json`."""
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 1024,
        "add_bos_token": False, "add_prefix_space": False,
        "bos_token": END_OF_TEXT, "eos_token": END, "pad_token": END_OF_TEXT, "chat_template": TEMPLATE,
    }  # fmt: skip
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
