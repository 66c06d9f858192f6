"""Step 6: checkpoints to GGUF files.

    python export.py --from build --to build      # tiny-f32.gguf, tiny.gguf, tiny-draft.gguf

`tiny.gguf` and `tiny-draft.gguf` are Q8_0; copied to `lltm_ray/models/embedded/` they are what the package ships.
"""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path

from lltm_ray.models.convert.convert import convert

FILES = (("tiny", "tiny-f32.gguf", "f32"), ("tiny", "tiny.gguf", "q8_0"), ("draft", "tiny-draft.gguf", "q8_0"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", dest="source", type=Path, default=Path("build"), help="what train.py wrote")
    parser.add_argument("--to", type=Path, default=Path("build"))
    options = parser.parse_args()
    for folder, name, out_type in FILES:
        info = convert(options.source / folder, options.to / name, out_type=out_type)
        digest = hashlib.sha256((options.to / name).read_bytes()).hexdigest()
        print(f"{name}: {info.file_bytes:,} bytes, {info.n_params:,} parameters, sha256 {digest}")


if __name__ == "__main__":
    main()
