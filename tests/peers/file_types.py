"""Sizes of quantized files beside llama-quantize's own: `python -m tests.peers.file_types LLAMA_QUANTIZE [--write]`.

LLAMA_QUANTIZE is llama.cpp's tool; it plans each file (`--dry-run`), and writes those of one small model whole.
`--write` keeps its sizes for the unit tests.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import gguf
import numpy as np

from lltm_ray.models.file_types import FILE_TYPES, quantized
from lltm_ray.models.gguf import read_gguf
from tests.sparse_models import LLAMA_8B, LLAMA_70B, Shape, write_sparse

SIZES = Path(__file__).parents[1] / "unit" / "models" / "file_sizes.json"
SHAPES = {
    "small": Shape(kind="F16", n_layer=3, n_embd=256, n_ff=512, n_vocab=512),
    "8B": LLAMA_8B,
    "70B": LLAMA_70B,
    "tied 3B": Shape(n_embd=3072, n_head=24, n_head_kv=8, n_layer=28, n_ff=8192, n_vocab=128_256, tied=True,
                     kind="F16"),
    "mixtral": Shape(n_embd=4096, n_head=32, n_head_kv=8, n_layer=32, n_ff=14_336, n_vocab=32_000, n_expert=8,
                     n_expert_used=2, kind="F16"),
    "30B-A3B": Shape(architecture="qwen3moe", n_embd=2048, n_head=32, n_head_kv=4, head_length=128, n_layer=48,
                     n_ff=768, n_vocab=151_936, n_expert=128, n_expert_used=8, kind="F16"),
    "odd rows": Shape(n_embd=896, n_head=14, n_head_kv=2, n_layer=24, n_ff=4864, n_vocab=151_936, kind="F16"),
}  # fmt: skip


def write_imatrix(path: Path) -> None:
    """A matrix that says nothing: it is its being there that the mixture asks for."""
    writer = gguf.GGUFWriter(path, "none")
    writer.add_string("general.type", "imatrix")
    writer.add_array("imatrix.datasets", ["none"])
    writer.add_uint32("imatrix.chunk_count", 1)
    writer.add_uint32("imatrix.chunk_size", 512)
    writer.add_tensor("blk.0.attn_q.weight.in_sum2", np.ones((1, 256), np.float32))
    writer.add_tensor("blk.0.attn_q.weight.counts", np.ones((1, 1), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> int:
    """0 if every tensor has the type that llama-quantize gives it."""
    parser = argparse.ArgumentParser(prog="python -m tests.peers.file_types", description=__doc__)
    parser.add_argument("llama_quantize", type=Path)
    parser.add_argument("--write", action="store_true")
    chosen = parser.parse_args()
    kept: dict[str, dict[str, float]] = {}
    different = 0
    with tempfile.TemporaryDirectory() as name:
        source, target, matrix = (Path(name) / each for each in ("f16.gguf", "out.gguf", "imatrix.gguf"))
        write_imatrix(matrix)
        for shape_name, shape in SHAPES.items():
            info = write_sparse(source, shape)
            for kind, file_type in FILE_TYPES.items():
                command = [str(chosen.llama_quantize), *(["--imatrix", str(matrix)] if file_type.imatrix else [])]
                done = subprocess.run([*command, "--dry-run", str(source), kind], check=True, capture_output=True)
                log = (done.stdout + done.stderr).decode()
                theirs = re.findall(r"^\[ *\d+/ *\d+\] (\S+) +- .*?type = +(\w+),.*?(?:\((\w+)\))?$", log, re.MULTILINE)
                ours = {each.name: each.type for each in quantized(info, kind).tensors}
                given = {name: (new or old).upper() for name, old, new in theirs}
                wrong = {each: (kind, given.get(each)) for each, kind in ours.items() if kind != given.get(each)}
                size = float(re.findall(r"quant size += +([\d.]+) MiB", log)[0])
                mine = quantized(info, kind).tensor_bytes / 2**20
                print(f"{shape_name:9} {kind:8} {size:10.2f} MiB, ours {mine:10.2f}; {wrong or 'all types equal'}")
                different += bool(wrong) or len(given) != len(info.tensors)
                kept.setdefault(shape_name, {})[kind] = size
                if shape_name == "small" and not file_type.imatrix:
                    subprocess.run([*command, str(source), str(target), kind], check=True, capture_output=True)
                    real, ours_bytes = target.stat().st_size, quantized(info, kind).file_bytes
                    print(f"          written: {real} bytes, ours {ours_bytes} ({ours_bytes / real - 1:+.3%})")
                    same = {each.name: each.type for each in read_gguf(target).tensors} == ours
                    different += not same
    if chosen.write and not different:
        SIZES.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    return different


if __name__ == "__main__":
    sys.exit(main())
