"""Models of any shape in no time: a true header, and zeros that a sparse file does not store."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lltm_ray.models.gguf import GgufInfo, read_gguf
from lltm_ray.models.gguf_header import TENSOR_TYPES

TYPE_IDS = {name: (kind, elements, nbytes) for kind, (name, elements, nbytes) in TENSOR_TYPES.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Of a model like Llama."""

    architecture: str = "llama"
    n_embd: int = 512
    n_head: int = 8
    n_head_kv: int = 4
    head_length: int = 0
    """0: n_embd / n_head."""
    n_layer: int = 4
    n_ff: int = 1536
    n_vocab: int = 4096
    n_ctx: int = 131_072
    n_expert: int = 0
    n_expert_used: int = 0
    window: int = 0
    tied: bool = False
    kind: str = "F32"
    """Of the matrices; vectors are float32."""


LLAMA_8B = Shape(n_embd=4096, n_head=32, n_head_kv=8, n_layer=32, n_ff=14_336, n_vocab=128_256, kind="F16")
LLAMA_70B = Shape(n_embd=8192, n_head=64, n_head_kv=8, n_layer=80, n_ff=28_672, n_vocab=128_256, kind="F16")


def tensors(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and dimensions, the fastest first, as llama.cpp wants them."""
    length = shape.head_length or shape.n_embd // shape.n_head
    n_q, n_kv = length * shape.n_head, length * shape.n_head_kv
    yield "token_embd.weight", (shape.n_embd, shape.n_vocab)
    yield "output_norm.weight", (shape.n_embd,)
    if not shape.tied:
        yield "output.weight", (shape.n_embd, shape.n_vocab)
    for block in (f"blk.{index}." for index in range(shape.n_layer)):
        yield block + "attn_norm.weight", (shape.n_embd,)
        yield block + "attn_q.weight", (shape.n_embd, n_q)
        yield block + "attn_k.weight", (shape.n_embd, n_kv)
        yield block + "attn_v.weight", (shape.n_embd, n_kv)
        yield block + "attn_output.weight", (n_q, shape.n_embd)
        if shape.architecture in ("qwen3", "qwen3moe", "gemma3"):
            yield block + "attn_q_norm.weight", (length,)
            yield block + "attn_k_norm.weight", (length,)
        if shape.architecture == "gemma3":
            yield block + "post_attention_norm.weight", (shape.n_embd,)
            yield block + "post_ffw_norm.weight", (shape.n_embd,)
        if shape.architecture != "cohere2":
            yield block + "ffn_norm.weight", (shape.n_embd,)
        experts = (shape.n_expert,) if shape.n_expert else ()
        suffix = "_exps" if experts else ""
        if experts:
            yield block + "ffn_gate_inp.weight", (shape.n_embd, shape.n_expert)
        yield f"{block}ffn_gate{suffix}.weight", (shape.n_embd, shape.n_ff, *experts)
        yield f"{block}ffn_up{suffix}.weight", (shape.n_embd, shape.n_ff, *experts)
        yield f"{block}ffn_down{suffix}.weight", (shape.n_ff, shape.n_embd, *experts)


def write_sparse(path: Path, shape: Shape, *, tokens: bool = True) -> GgufInfo:
    """A file that llama.cpp loads, all weights zero; takes the disk space of its header.

    Without `tokens` it has no vocabulary, which is the slow part.
    """
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(path, shape.architecture)
    _write_metadata(writer, shape)
    if tokens:
        _write_tokens(writer, shape.n_vocab)
    else:
        writer.add_vocab_size(shape.n_vocab)
    size = 0
    for name, dims in tensors(shape):
        kind = "F32" if len(dims) == 1 or "gate_inp" in name else shape.kind
        number, elements, nbytes = TYPE_IDS[kind]
        rows, whole = dims[:0:-1], math.prod(dims) // elements * nbytes
        # gguf takes rows of quantized tensors in bytes
        last, dtype = (dims[0] // elements * nbytes, np.uint8) if elements > 1 else (dims[0], np.float32)
        writer.add_tensor_info(name, (*rows, last), np.dtype(dtype), whole, gguf.GGMLQuantizationType(number))
        size += -(-whole // 32) * 32
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    os.truncate(path, -(-path.stat().st_size // 32) * 32 + size)
    return read_gguf(path)


def _write_metadata(writer: Any, shape: Shape) -> None:
    length = shape.head_length or shape.n_embd // shape.n_head
    writer.add_context_length(shape.n_ctx)
    writer.add_embedding_length(shape.n_embd)
    writer.add_block_count(shape.n_layer)
    writer.add_feed_forward_length(shape.n_ff)
    writer.add_head_count(shape.n_head)
    writer.add_head_count_kv(shape.n_head_kv)
    writer.add_rope_dimension_count(length)
    writer.add_key_length(length)
    writer.add_value_length(length)
    if shape.window:
        writer.add_sliding_window(shape.window)
    if shape.n_expert:
        writer.add_expert_count(shape.n_expert)
        writer.add_expert_used_count(shape.n_expert_used)
        writer.add_expert_feed_forward_length(shape.n_ff)
    if shape.architecture == "cohere2":
        writer.add_layer_norm_eps(1e-5)
        writer.add_logit_scale(1.0)
    else:
        writer.add_layer_norm_rms_eps(1e-5)


def _write_tokens(writer: Any, n_vocab: int) -> None:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{value:02X}>" for value in range(256))]
    tokens += [f"t{index}" for index in range(n_vocab - len(tokens))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * n_vocab)
    writer.add_token_types([2, 3, 3, *[6] * 256, *[1] * (n_vocab - 259)])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
