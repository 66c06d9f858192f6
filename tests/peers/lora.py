"""Adapters beside llama.cpp's own: `python -m tests.peers.lora LLAMA_CPP [--python P] [--export-lora E] [--write]`.

Converted ones beside convert_lora_to_gguf.py's, tensor by tensor; it needs a checkout of llama.cpp at LLAMA_CPP and a
Python with torch and transformers. Merged ones beside llama-export-lora's. `--write` keeps the digests of llama.cpp's
tensors for the unit tests.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from lltm_ray.models.convert.convert import convert
from lltm_ray.models.lora.convert import OUT_TYPES, convert_adapter
from lltm_ray.models.lora.merge import merge_adapter
from tests.checkpoints import CONFIGS, shapes, write_checkpoint, write_safetensors

DIGESTS = Path(__file__).parents[1] / "unit" / "models" / "converted_lora.json"
RANK, ALPHA = 8, 12.0
PREFIX = "base_model.model."
_SKIPPED = ("norm", "LayerNorm", "pooler", "position_embeddings", "token_type", "word_embeddings")


def modules(architecture: str) -> list[str]:
    """Every matrix that an adapter may change; an embedding where it is not the output, too."""
    found = [name for name, shape in shapes(architecture).items() if len(shape) == 2]
    is_tied = "lm_head.weight" not in found
    names = [name for name in found if not any(part in name for part in _SKIPPED)]
    return [name.removesuffix(".weight") for name in names if not (is_tied and "embed_tokens" in name)]


def write_peft(
    folder: Path,
    architecture: str,
    *,
    only: tuple[str, ...] = (),
    rank: int = RANK,
    ranks: dict[str, int] | None = None,
    seed: int = 0,
    strength: float = 0.3,
    sizes: dict[str, tuple[int, int]] | None = None,
    **config: Any,
) -> Path:
    """An adapter as PEFT saves it.

    Args:
        folder: is made.
        architecture: one of `CONFIGS`.
        only: endings of the modules that it changes; empty: all.
        rank: of its factors.
        ranks: by ending, where another.
        seed: of its numbers.
        strength: their standard deviation.
        sizes: by module, rows and columns; None: the architecture's own.
        config: what its adapter_config.json says beside or instead.
    """
    folder.mkdir(parents=True)
    said = {"peft_type": "LORA", "r": rank, "lora_alpha": ALPHA, "bias": "none", "modules_to_save": None,
            "use_dora": False, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}, "fan_in_fan_out": False,
            "init_lora_weights": True, "base_model_name_or_path": "nobody", "task_type": "CAUSAL_LM"}  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(said | config))
    own = sizes or {name.removesuffix(".weight"): shape for name, shape in shapes(architecture).items()}
    tensors, random = {}, np.random.default_rng(seed)
    for module in sizes or modules(architecture):
        if only and not module.endswith(only):
            continue
        rows, columns = own[module]
        mine = next((each for ending, each in (ranks or {}).items() if module.endswith(ending)), rank)
        is_embedding = "embed_tokens" in module
        names = ("lora_embedding_A", "lora_embedding_B") if is_embedding else ("lora_A.weight", "lora_B.weight")
        factors = ((mine, rows), (columns, mine)) if is_embedding else ((mine, columns), (rows, mine))
        for name, shape in zip(names, factors, strict=True):
            tensors[f"{PREFIX}{module}.{name}"] = random.normal(scale=strength, size=shape).astype(np.float32)
    write_safetensors(folder / "adapter_model.safetensors", tensors)
    return folder


def contents(path: Path) -> dict[str, Any]:
    """What both files must have in common: tensors with type, shape and digest, and what llama.cpp reads beside."""
    from tests.peers.convert import contents as read

    tensors, numbers = read(path)
    return {"tensors": tensors, "numbers": {name: numbers[name] for name in sorted(numbers)}}


def _converted(chosen: argparse.Namespace, folder: Path) -> tuple[int, dict[str, Any]]:
    different, wanted = 0, {}
    for architecture in CONFIGS:
        base = write_checkpoint(folder / architecture, architecture)
        adapter = write_peft(folder / f"{architecture}-lora", architecture)
        for kind in OUT_TYPES:
            theirs, ours = folder / f"{architecture}-{kind}-theirs.gguf", folder / f"{architecture}-{kind}-ours.gguf"
            script = str(chosen.llama_cpp / "convert_lora_to_gguf.py")
            command = [chosen.python, script, str(adapter), "--base", str(base), "--outfile", str(theirs)]
            subprocess.run([*command, "--outtype", kind], check=True)
            convert_adapter(adapter, ours, base=base, out_type=kind)
            here, there = contents(ours), contents(theirs)
            for word in here:
                own, other = here[word], there[word]
                odd = {each: (own.get(each), other.get(each)) for each in own.keys() | other.keys()}
                odd = {each: pair for each, pair in odd.items() if pair[0] != pair[1]}
                different += bool(odd)
                print(f"{architecture:20} {kind:5} {len(other):3} {word}: {odd or 'equal'}")
            wanted[f"{architecture} {kind}"] = there
    return different, wanted


def _merged(chosen: argparse.Namespace, folder: Path) -> int:
    different = 0
    base_folder, adapters = folder / "LlamaForCausalLM", []
    for seed in (1, 2):
        made = write_peft(folder / f"merge-{seed}", "LlamaForCausalLM", seed=seed)
        convert_adapter(made, folder / f"merge-{seed}.gguf", base=base_folder)
        adapters.append((folder / f"merge-{seed}.gguf", 0.5 * seed))
    for kind in ("f32", "f16", "q8_0"):
        base = folder / f"base-{kind}.gguf"
        convert(base_folder, base, out_type=kind)
        ours, theirs = folder / f"merged-{kind}-ours.gguf", folder / f"merged-{kind}-theirs.gguf"
        merge_adapter(base, adapters, ours, "f32" if kind == "f32" else "f16")
        scaled = ",".join(f"{path}:{scale}" for path, scale in adapters)
        command = [str(chosen.export_lora), "-m", str(base), "--lora-scaled", scaled, "-o", str(theirs)]
        subprocess.run(command, check=True, capture_output=True)
        here, there = ({each.name: each for each in gguf.GGUFReader(path).tensors} for path in (ours, theirs))
        worst = 0.0
        for name, other in there.items():
            pair = [gguf.quants.dequantize(each.data, each.tensor_type) for each in (here[name], other)]
            worst = max(worst, float(np.abs(pair[0] - pair[1]).max()))
            different += here[name].tensor_type != other.tensor_type
        different += worst > (1e-5 if kind == "f32" else 2e-3)
        print(f"merged into {kind:5} {len(there):3} tensors: furthest apart {worst:.2g}")
    return different


def main() -> int:
    """0 if everything is equal."""
    parser = argparse.ArgumentParser(prog="python -m tests.peers.lora", description=__doc__)
    parser.add_argument("llama_cpp", type=Path)
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--export-lora", type=Path, help="llama-export-lora; left out: nothing is merged")
    parser.add_argument("--write", action="store_true")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        different, wanted = _converted(chosen, Path(name))
        if chosen.export_lora is not None:
            different += _merged(chosen, Path(name))
    if chosen.write and not different:
        DIGESTS.write_text(json.dumps(wanted, indent=0, sort_keys=True) + "\n")
    return different


if __name__ == "__main__":
    sys.exit(main())
