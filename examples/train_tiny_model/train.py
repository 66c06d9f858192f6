"""Step 5: train the model and its draft; one GPU, a few minutes.

    python train.py --text build/text.jsonl.gz --out build      # build/tiny and build/draft, as Hugging Face saves them

First mostly text, then mostly conversations; the draft learns to say what the model says (distillation).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from data import CONTEXT, Batch, chat_batches, draw_chats, encode_chats, encode_text, read_text, text_batches
from lessons import as_text, draw_sheet, load_lessons
from network import DRAFT, TINY, Llama
from safetensors.torch import save_file
from torch.nn import functional
from vocabulary import save_tokenizer, train_tokenizer

N_CHATS = 600_000
N_CHATS_AS_TEXT = 64_000
"""Conversations among the text, where every token counts: so questions are learnt too."""
N_SHEETS = 64
"""Lists of questions that mean the same, for each fact, among the text."""
Loss = Callable[[Batch], torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How long and how fast."""

    steps: int
    rate: float
    text_share: tuple[float, float]
    """Share of text batches before and after the middle; the rest are conversations."""
    dropout: float = 0.0
    averaged: float = 0.1
    """The weights that are kept are a moving average over this share of the steps."""
    warm_up: int = 100
    weight_decay: float = 0.1

    def rate_at(self, step: int) -> float:
        """Linear up, then down along a cosine to a hundredth."""
        if step < self.warm_up:
            return self.rate * (step + 1) / self.warm_up
        done = (step - self.warm_up) / max(1, self.steps - self.warm_up)
        return self.rate * (0.01 + 0.99 * (1 + math.cos(math.pi * done)) / 2)

    def newest_at(self, step: int) -> float:
        """Share of a step's weights in the average: a plain mean until it is as long as it shall be."""
        return 1 / max(1, min(step, self.averaged * self.steps))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, default=Path("build/text.jsonl.gz"), help="what gather.py wrote")
    parser.add_argument("--out", type=Path, default=Path("build"))
    parser.add_argument("--steps", type=int, default=7_000, help="of the model; the draft takes a third")
    parser.add_argument("--rate", type=float, default=3e-3, help="highest learning rate")
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--chats", type=int, default=N_CHATS, help="how many conversations are drawn")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--exact", action="store_true", help="kernels that add in one order: a seed repeats to the bit")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    train(parser.parse_args())


def train(options: argparse.Namespace) -> None:
    began = time.perf_counter()
    device = torch.device(options.device)
    be_repeatable(options.seed, exactly=options.exact)
    lessons = load_lessons()
    texts, kept = read_text(options.text)
    chats = draw_chats(lessons, options.chats, options.seed)
    spoken = chats[:: max(1, len(chats) // N_CHATS_AS_TEXT)]
    tokenizer = train_tokenizer([*texts[::3], *(message["content"] for chat in spoken[::8] for message in chat)])
    dice = random.Random(options.seed)
    sheets = [draw_sheet(fact, dice) for fact in lessons.facts for _ in range(N_SHEETS)]
    ids, held_out = encode_text(tokenizer, [*texts, *map(as_text, spoken), *sheets]), encode_text(tokenizer, kept)
    print(f"{len(ids):,} tokens of text, {len(chats):,} conversations, {time.perf_counter() - began:.0f} s", flush=True)
    encoded = encode_chats(tokenizer, chats)
    print(f"encoded after {time.perf_counter() - began:.0f} s", flush=True)
    text, chat = text_batches(ids, device, options.seed), chat_batches(encoded, device, options.seed)
    plan = Plan(steps=options.steps, rate=options.rate, text_share=(0.6, 0.15), dropout=options.dropout)
    model = Llama(TINY, dropout=plan.dropout).to(device)
    learnt = fit(model, plan, learn(model), mixed(text, chat, plan, options.seed))
    losses = {"tiny": perplexity(model, held_out, device)}
    save(model, tokenizer, options.out / "tiny")
    plan = Plan(steps=options.steps // 3, rate=2 * options.rate, text_share=(0.3, 0.1), weight_decay=0.0)
    draft = Llama(DRAFT).to(device)
    imitated = fit(draft, plan, imitate(draft, model), mixed(text, chat, plan, options.seed + 1))
    losses["draft"] = perplexity(draft, held_out, device)
    save(draft, tokenizer, options.out / "draft")
    told = {
        "seconds": time.perf_counter() - began, "device": device_name(device), "torch": torch.__version__,
        "seed": options.seed, "steps": options.steps, "text_tokens": len(ids), "conversations": len(chats),
        "perplexity": losses,
        "parameters": {"tiny": model.count(), "draft": draft.count()}, "curve": learnt, "draft_curve": imitated,
    }  # fmt: skip
    (options.out / "training.json").write_text(json.dumps(told) + "\n", encoding="utf-8")
    print({key: value for key, value in told.items() if "curve" not in key})


def be_repeatable(seed: int, *, exactly: bool) -> None:
    """Seed what is not seeded where it is used: weights and dropout; let kernels add in one order only."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("TORCHINDUCTOR_DETERMINISTIC", str(int(exactly)))  # no choice of kernels by their speed
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(exactly)
    torch.utils.deterministic.fill_uninitialized_memory = False


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def mixed(text: Iterator[Batch], chat: Iterator[Batch], plan: Plan, seed: int) -> Iterator[Batch]:
    """Batches of both kinds in the plan's shares."""
    dice = np.random.default_rng(seed)
    for step in range(plan.steps):
        share = plan.text_share[2 * step >= plan.steps]
        yield next(text) if dice.random() < share else next(chat)


def learn(model: Llama) -> Loss:
    """Cross-entropy with the targets, over those that count."""
    torch._dynamo.config.recompile_limit = 16  # three lengths each for the model, as a teacher, and the draft
    run = torch.compile(model, dynamic=False) if _is_cuda(model) else model

    def loss(batch: Batch) -> torch.Tensor:
        return functional.cross_entropy(
            run(batch.inputs).flatten(0, 1).float(), batch.targets.flatten(), ignore_index=-100
        )

    return loss


def imitate(draft: Llama, teacher: Llama) -> Loss:
    """Divergence of the draft's next-token probabilities from the teacher's, over tokens that count."""
    teacher.eval()
    compiled = _is_cuda(draft)
    run = torch.compile(draft, dynamic=False) if compiled else draft
    ask = torch.compile(teacher, dynamic=False) if compiled else teacher

    def loss(batch: Batch) -> torch.Tensor:
        counts = (batch.targets != -100).flatten()
        with torch.no_grad():
            wanted = functional.log_softmax(ask(batch.inputs).flatten(0, 1)[counts].float(), dim=-1)
        said = functional.log_softmax(run(batch.inputs).flatten(0, 1)[counts].float(), dim=-1)
        return functional.kl_div(said, wanted, log_target=True, reduction="batchmean")

    return loss


def _is_cuda(model: Llama) -> bool:
    return next(model.parameters()).is_cuda


def fit(model: Llama, plan: Plan, loss_of: Loss, batches: Iterator[Batch]) -> list[tuple[int, float]]:
    """AdamW in bfloat16 over float32 weights, then their average; the curve as (step, mean loss since the last)."""
    device = next(model.parameters()).device
    weights = list(model.parameters())
    averages = [weight.detach().clone() for weight in weights]
    decayed = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    others = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": plan.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=plan.rate, betas=(0.9, 0.95), fused=device.type == "cuda")
    model.train()
    curve, began, since = [], time.perf_counter(), torch.zeros((), device=device)
    for step, batch in enumerate(batches, start=1):
        for group in optimizer.param_groups:
            group["lr"] = plan.rate_at(step - 1)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss = loss_of(batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(averages, weights, plan.newest_at(step))
        since += loss.detach()
        if step % 50 == 0 or step == plan.steps:
            mean = since.item() / (step - (curve[-1][0] if curve else 0))
            curve.append((step, round(mean, 4)))
            since.zero_()
            if step % 500 == 0 or step == plan.steps:
                print(f"step {step}/{plan.steps}: loss {mean:.3f}, {time.perf_counter() - began:.0f} s", flush=True)
    adopt(model, averages)
    return curve


@torch.no_grad()
def adopt(model: Llama, weights: list[torch.Tensor]) -> None:
    """Give a model that has learnt these weights."""
    torch._foreach_copy_(list(model.parameters()), weights)
    model.eval()


@torch.no_grad()
def perplexity(model: Llama, ids: np.ndarray[Any, np.dtype[np.uint16]], device: torch.device) -> float:
    """Of held-out text, in windows of the whole context, float32; every token but a window's first is predicted."""
    rows = min(len(ids) // CONTEXT, 64)
    tokens = torch.from_numpy(ids[: rows * CONTEXT].astype(np.int64)).view(rows, CONTEXT).to(device)
    losses = [functional.cross_entropy(model(row[None, :-1]).flatten(0, 1).float(), row[1:]).item() for row in tokens]
    return math.exp(sum(losses) / len(losses))


def save(model: Llama, tokenizer: Any, folder: Path) -> None:
    """A checkpoint folder: config.json, model.safetensors (float32), the tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(model.shape.config(), indent=1) + "\n", encoding="utf-8")
    weights = {name: value.detach().float().cpu().contiguous() for name, value in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    save_tokenizer(tokenizer, folder)


if __name__ == "__main__":
    main()
