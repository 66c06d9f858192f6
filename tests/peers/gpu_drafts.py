"""Speculative decoding with the package's own models, on a target that is slow enough to gain from it.

`tiny` itself has 9 M parameters: a GPU takes as long to launch its kernels as those of a draft. `write_deep` gives it
layers that compute and add nothing, so that it says what `tiny` says and takes as long as a large model.
"""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

LAYERS = 320
"""98 tokens/s on an H200, where tiny does 2,324."""
DRAFTS: tuple[tuple[str, int], ...] = (("", 0), ("tiny-draft", 4), ("tiny-draft", 8), ("tiny", 16))
"""Names of the draft, and the most tokens it drafts at once."""
QUESTIONS = (
    "How do I start a fleet?",
    "What is a slot?",
    "What does drain do?",
    "How do I stop a fleet?",
    "What is the prefix index?",
    "Which policies does the router have?",
    "What is an engine?",
    "How do I see the dashboard?",
)
ANSWER_S = 300.0


def write_deep(path: Path, source: Path, layers: int = LAYERS) -> Path:
    """`source` with layers behind its own whose attention and feed-forward come out as zeros."""
    import gguf

    reader = gguf.GGUFReader(source)
    own = reader.fields["llama.block_count"].contents()
    writer = gguf.GGUFWriter(path, "llama")
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        value = layers if field.name == "llama.block_count" else field.contents()
        item = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, value, field.types[0], sub_type=item)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    first = [tensor for tensor in reader.tensors if tensor.name.startswith("blk.0.")]
    for layer in range(own, layers):
        for tensor in first:
            adds_up = any(part in tensor.name for part in ("attn_output", "ffn_down"))
            data = np.zeros_like(tensor.data) if adds_up else tensor.data
            writer.add_tensor(tensor.name.replace("blk.0.", f"blk.{layer}."), data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def chat(port: int, question: str, tokens: int = 64) -> dict[str, Any]:
    """One greedy answer of a llama-server, without the help of its cache."""
    body = {
        "messages": [{"role": "user", "content": question}],
        "max_tokens": tokens,
        "temperature": 0,
        "cache_prompt": False,
    }
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=ANSWER_S) as answer:
        told: dict[str, Any] = json.load(answer)
    return told


def measure(port: int) -> dict[str, Any]:
    """All questions one after the other, after a round that warms up: tokens/s of decoding, drafts, and the texts."""
    answers = [chat(port, each) for each in QUESTIONS * 2][len(QUESTIONS) :]
    timings = [each["timings"] for each in answers]
    spent_s = sum(each["predicted_ms"] for each in timings) / 1e3
    return {
        "tokens_s": sum(each["predicted_n"] for each in timings) / spent_s,
        "drafted": sum(each.get("draft_n", 0) for each in timings),
        "accepted": sum(each.get("draft_n_accepted", 0) for each in timings),
        "texts": [each["choices"][0]["message"]["content"] for each in answers],
    }


def markdown(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A table; texts are held against those without a draft."""
    lines = ["| draft | at most | tokens/s | drafted | accepted | same texts |", "|---|---|---|---|---|---|"]
    plain: list[str] = next((row["texts"] for row in rows if "texts" in row and not row["draft"]), [])
    for row in rows:
        told = row["failed"].replace("|", "/").replace("\n", " ") if "failed" in row else f"{row['tokens_s']:,.0f}"
        same = sum(map(str.__eq__, row.get("texts", []), plain))
        cells = (row["draft"] or "-", row["most"], told, row.get("drafted", "-"), row.get("accepted", "-"), same)
        lines.append(f"| {' | '.join(map(str, cells))} of {len(plain)} |")
    return lines
