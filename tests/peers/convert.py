"""Our converter beside llama.cpp's own, tensor by tensor: `python -m tests.peers.convert LLAMA_CPP [--write]`.

Needs a checkout of llama.cpp at LLAMA_CPP, and a Python with torch and transformers (`--python`). `--write` keeps the
digests of llama.cpp's tensors for the unit tests.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import gguf

from lltm_ray.models.convert.convert import convert
from tests.checkpoints import CONFIGS, write_checkpoint

DIGESTS = Path(__file__).parents[1] / "unit" / "models" / "converted.json"
TYPES = ("f32", "f16", "bf16", "q8_0")
NUMBERS = ("general.file_type", "general.type", "general.architecture", "general.quantization_version")
BASE = (10_000.0, None)
"""llama.cpp's default of `rope.freq_base`: its converter leaves it out for Gemma, ours says it."""
# The random tokenizers are nobody's: llama.cpp's converter would refuse them by their digest.
_CHILD = """
import sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/gguf-py"]
import conversion.base as base
base.TextModel.set_vocab = lambda self: None
from conversion import *
import conversion.llama, conversion.qwen, conversion.gemma, conversion.bert
for kind in vars(base.ModelBase)["_model_classes"].values():
    for model in kind.values():
        model.set_vocab = lambda self: None
sys.argv = ["convert_hf_to_gguf.py", *sys.argv[2:]]
import runpy
runpy.run_path(sys.path[0] + "/convert_hf_to_gguf.py", run_name="__main__")
"""


def contents(path: Path) -> tuple[dict[str, list[object]], dict[str, object]]:
    """Of each tensor its type, shape and SHA-256; and the numbers of the header, without the tokenizer's."""
    reader = gguf.GGUFReader(path)
    tensors = {
        each.name: [
            each.tensor_type.name,
            [int(size) for size in each.shape],
            hashlib.sha256(each.data.tobytes()).hexdigest(),
        ]
        for each in reader.tensors
    }
    numbers = {
        name: field.contents()
        for name, field in reader.fields.items()
        if not name.startswith(("GGUF.", "tokenizer.", "general.")) or name in NUMBERS
    }
    return tensors, numbers


def main() -> int:
    """0 if everything is equal."""
    parser = argparse.ArgumentParser(prog="python -m tests.peers.convert", description=__doc__)
    parser.add_argument("llama_cpp", type=Path)
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--write", action="store_true")
    chosen = parser.parse_args()
    wanted: dict[str, object] = {}
    different = 0
    with tempfile.TemporaryDirectory() as name:
        for architecture in CONFIGS:
            folder = write_checkpoint(Path(name) / architecture, architecture)
            for kind in TYPES:
                theirs, ours = folder / f"theirs-{kind}.gguf", folder / f"ours-{kind}.gguf"
                command = [chosen.python, "-c", _CHILD, str(chosen.llama_cpp), str(folder), "--outfile", str(theirs)]
                subprocess.run([*command, "--outtype", kind], check=True)
                convert(folder, ours, out_type=kind)
                here, there = contents(ours), contents(theirs)
                for word, own, other in zip(("tensors", "numbers"), here, there, strict=True):
                    odd = {each: (own.get(each), other.get(each)) for each in own.keys() | other.keys()}
                    odd = {each: pair for each, pair in odd.items() if pair[0] != pair[1] and pair != BASE}
                    different += bool(odd)
                    print(f"{architecture:20} {kind:5} {len(other):3} {word}: {odd or 'equal'}")
                wanted[f"{architecture} {kind}"] = dict(zip(("tensors", "numbers"), there, strict=True))
    if chosen.write and not different:
        DIGESTS.write_text(json.dumps(wanted, indent=0, sort_keys=True) + "\n")
    return different


if __name__ == "__main__":
    sys.exit(main())
