"""Whether the GGUF is the model that was trained: its tokens and its logits, llama.cpp against PyTorch. Needs torch.

    python check.py --from build                  # after train.py and export.py

10,000 random strings, Unicode and control characters among them, and the next-token log-probabilities after random
prompts, from the F32 file with an F32 cache.
"""

from __future__ import annotations

import argparse
import json
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import requests
import torch
from network import Llama, Shape
from safetensors.torch import load_file
from tokenizers import Tokenizer
from vocabulary import random_text

from lltm_ray import ServerManager
from lltm_ray.llamacpp.client import LlamaClient

N_STRINGS, N_PROMPTS = 10_000, 32
EXACT = {"cache_type_k": "f32", "cache_type_v": "f32", "flash_attn": "off"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", dest="source", type=Path, default=Path("build"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    dice = random.Random(options.seed)
    folder = options.source / "tiny"
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    with ServerManager() as manager:
        manager.start_server(str(options.source / "tiny-f32.gguf"), n_parallel=4, ctx_size=4096, **EXACT)
        texts = [random_text(dice) for _ in range(N_STRINGS)]
        with ThreadPoolExecutor(8) as pool:
            found = pool.map(manager.client.tokenize, texts)
            odd = [text for text, ids in zip(texts, found, strict=True) if list(ids) != tokenizer.encode(text).ids]
        print(f"{N_STRINGS} random strings: {len(odd)} tokenized otherwise {odd[:3]}")
        far = compare_logits(manager.client, load(folder), dice)
    print(f"{N_PROMPTS} random prompts: log-probabilities differ by at most {far:.2e}")
    if odd or far > 1e-3:
        raise SystemExit("the GGUF is not the model that was trained")


def load(folder: Path) -> Llama:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    model = Llama(Shape(**{name: config[name] for name in Shape.__dataclass_fields__}))
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.eval()


@torch.no_grad()
def compare_logits(client: LlamaClient, model: Llama, dice: random.Random) -> float:
    """Largest difference of a next token's log-probability, over the whole vocabulary and all prompts."""
    size, far = model.shape.vocab_size, 0.0
    for _ in range(N_PROMPTS):
        ids = [dice.randrange(3, size) for _ in range(dice.randint(1, 200))]
        wanted = torch.log_softmax(model(torch.tensor([ids]))[0, -1].double(), dim=-1).numpy()
        body = {"prompt": ids, "n_predict": 1, "n_probs": size, "temperature": 0.0, "cache_prompt": False}
        headers = {"authorization": f"Bearer {client.api_key}"}
        reply = requests.post(f"{client.url}/completion", json=body, headers=headers, timeout=60)
        reply.raise_for_status()
        told = np.full(size, np.nan)
        for each in reply.json()["completion_probabilities"][0]["top_logprobs"]:
            told[each["id"]] = each["logprob"]
        far = max(far, float(np.abs(told - wanted).max()))
    return far


if __name__ == "__main__":
    main()
