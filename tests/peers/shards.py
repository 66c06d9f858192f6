"""Our shards beside llama.cpp's own: `python -m tests.peers.shards LLAMA_GGUF_SPLIT [MODEL]`.

Splits by number and by size with both and compares the files byte by byte; then each merges what the other split.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from lltm_ray.models.random_weights import RandomShape, write_random
from lltm_ray.models.shards import merge, split

LIMITS = (
    ({"max_tensors": 7}, ("--split-max-tensors", "7")),
    ({"max_tensors": 1}, ("--split-max-tensors", "1")),
    ({"max_bytes": 2_000_000}, ("--split-max-size", "2M")),
)


def main() -> int:
    """0 if everything is equal."""
    parser = argparse.ArgumentParser(prog="python -m tests.peers.shards", description=__doc__)
    parser.add_argument("llama_gguf_split", type=Path)
    parser.add_argument("model", type=Path, nargs="?")
    chosen = parser.parse_args()
    tool, different = str(chosen.llama_gguf_split), 0
    with tempfile.TemporaryDirectory() as name:
        model = chosen.model or Path(name) / "m.gguf"
        if chosen.model is None:
            write_random(model, RandomShape(n_embd=256, n_layer=6, n_ff=768))
        for number, (limit, flags) in enumerate(LIMITS):
            folders = [Path(name) / f"{side}-{number}" for side in ("ours", "theirs")]
            for folder in folders:
                folder.mkdir()
            ours = split(model, folders[0] / "m", **limit)
            subprocess.run([tool, "--split", *flags, model, folders[1] / "m"], check=True, capture_output=True)
            theirs = sorted(folders[1].iterdir())
            same = [one.read_bytes() == two.read_bytes() for one, two in zip(ours, theirs, strict=True)]
            back = merge(theirs[0], folders[0] / "back.gguf").read_bytes() == model.read_bytes()
            merged = folders[1] / "back.gguf"
            subprocess.run([tool, "--merge", ours[0], merged], check=True, capture_output=True)
            data = model.stat().st_size, merged.stat().st_size
            print(f"{limit}: {sum(same)} of {len(same)} shards equal; theirs merged by us is the model: {back};")
            print(f"  ours merged by llama-gguf-split: {data[1]} bytes, the model {data[0]} and its split.* keys")
            different += not (all(same) and back)
    return different


if __name__ == "__main__":
    sys.exit(main())
