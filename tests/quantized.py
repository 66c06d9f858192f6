"""Sources to quantize: small GGUF files of several architectures with the same weights for the same name."""

from __future__ import annotations

import hashlib
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from lltm_ray.llamacpp.ggml import load_ggml
from lltm_ray.models.gguf import GgufInfo
from lltm_ray.models.quantize.plan import Options, Plan
from lltm_ray.models.quantize.quantize import quantize
from lltm_ray.models.quantize.rewrite import write_quantized


@dataclass(frozen=True)
class Source:
    """What a file is like; llama-quantize asks for no shape, so rows are few."""

    arch: str
    layers: int
    heads: int = 4
    kv_heads: int = 2
    width: int = 256
    ff: int = 512
    rows: int = 4
    experts: int = 0
    tied: bool = False
    fused: bool = False
    """One attn_qkv, and no gate."""


SMALL = {
    "llama": Source("llama", 3),
    "qwen2": Source("qwen2", 2, 8, 2, tied=True),
    "gemma": Source("gemma", 2, 4, 1, tied=True),
    "mixtral": Source("llama", 2, experts=4),
    "odd": Source("qwen3", 2, width=288, ff=100),
}
"""For whole files."""
DEEP = {
    "llama-32": Source("llama", 32, 32, 8),
    "llama-16": Source("llama", 16, 8, 8),
    "llama-80": Source("llama", 80, 64, 8),
    "qwen2-80": Source("qwen2", 80, 64, 8),
    "qwen3-28": Source("qwen3", 28, 16, 8, tied=True),
    "gemma-18": Source("gemma", 18, 8, 1, tied=True),
    "mixtral-32": Source("llama", 32, 32, 8, experts=8),
    "moe-24": Source("llama", 24, 16, 8, experts=16),
    "falcon-32": Source("falcon", 32, 64, 1, fused=True),
    "odd-10": Source("qwen3", 10, width=288, ff=100),
}
"""For the choice of types alone."""
_KIND = gguf.GGMLQuantizationType


def write_source(path: Path, source: Source, kind: str = "F32") -> Path:
    """Write the file; matrices in `kind`, which gguf's own quantizer must know."""
    writer = gguf.GGUFWriter(path, source.arch)
    writer.add_name("source")
    writer.add_file_type(0)
    writer.add_context_length(512)
    writer.add_embedding_length(source.width)
    writer.add_block_count(source.layers)
    writer.add_feed_forward_length(source.ff)
    writer.add_head_count(source.heads)
    writer.add_head_count_kv(source.kv_heads)
    writer.add_key_length(64)
    writer.add_value_length(64)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_layer_norm_eps(1e-5)
    writer.add_rope_dimension_count(64)
    if source.experts:
        writer.add_expert_count(source.experts)
        writer.add_expert_used_count(2)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"<{number}>" for number in range(source.rows)])
    for name, shape in shapes(source).items():
        random = np.random.default_rng(zlib.crc32(name.encode()))
        values = (random.standard_normal(shape) * (1 + random.standard_normal(shape[-1]) ** 2)).astype(np.float32)
        wanted = _KIND[kind] if len(shape) > 1 and "norm" not in name else _KIND.F32
        writer.add_tensor(name, gguf.quants.quantize(values, wanted), raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def shapes(source: Source) -> dict[str, tuple[int, ...]]:
    """Tensors, rows first; blocks not in order, as converters write them."""
    narrow, wide = (source.rows, source.width), (source.rows, source.ff)
    found: dict[str, tuple[int, ...]] = {"token_embd.weight": narrow}
    for layer in range(source.layers):
        parts = {"attn_norm.weight": (source.width,), "attn_output.weight": narrow}
        parts |= (
            {"attn_qkv.weight": narrow}
            if source.fused
            else dict.fromkeys(("attn_q.weight", "attn_k.weight", "attn_v.weight"), narrow)
        )
        if source.arch == "qwen2":
            parts["attn_q.bias"] = (source.rows,)
        if source.experts:
            parts["ffn_gate_inp.weight"] = (source.experts, source.width)
            parts |= {f"ffn_{part}_exps.weight": (source.experts, *narrow) for part in ("gate", "up")}
            parts["ffn_down_exps.weight"] = (source.experts, *wide)
        else:
            parts |= {f"ffn_{part}.weight": narrow for part in (("up",) if source.fused else ("gate", "up"))}
            parts["ffn_down.weight"] = wide
        found |= {f"blk.{layer}.{name}": shape for name, shape in parts.items()}
    found["output_norm.weight"] = (source.width,)
    return found if source.tied else found | {"output.weight": narrow}


def write_matrix(path: Path, source: Source, *, metadata: bool = True, scale: float = 1.0) -> Path:
    """An importance matrix for the model, laid out as llama-imatrix does it."""
    writer = gguf.GGUFWriter(path, "")
    writer.add_type("imatrix")
    if metadata:
        writer.add_array("imatrix.datasets", ["text.txt", "more.txt"])
        writer.add_uint32("imatrix.chunk_count", 7)
        writer.add_uint32("imatrix.chunk_size", 512)
    for name, shape in shapes(source).items():
        if len(shape) < 2 or "norm" in name or name == "token_embd.weight":
            continue
        experts = shape[0] if len(shape) == 3 else 1
        random = np.random.default_rng(zlib.crc32(name.encode()) + 1)
        sums = (random.standard_normal((experts, shape[-1])) ** 2 * scale).astype(np.float32)
        counts = np.arange(experts, dtype=np.float32).reshape(-1, 1) + (experts == 1) * 5
        writer.add_tensor(f"{name}.in_sum2", sums)
        writer.add_tensor(f"{name}.counts", counts)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def by_ggml(plan: Plan, path: Path, *, progress: Any = None, cancel: Any = None) -> None:
    """`Write` with the PyPI engine's ggml."""
    write_quantized(plan, path, load_ggml(), progress=progress, cancel=cancel)


def make(source: Path, out: Path, kind: str, **options: Any) -> GgufInfo:
    """Quantize with the PyPI engine's ggml."""
    return quantize(source, out, Options(kind=kind, **options), write=by_ggml)


def digest(path: Path) -> str:
    """Of the whole file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
