"""Which blocks hold NaN or infinity, beside ggml's own word: `python -m tests.peers.blocks LIBGGML_BASE`.

LIBGGML_BASE is a build's libggml-base.so; its `ggml_validate_row_data` is asked for each of 3,000 random blocks. It
knows no Q8_1, which is for intermediate results.
"""

from __future__ import annotations

import argparse
import ctypes
import sys
import tempfile
from pathlib import Path

import numpy as np

from lltm_ray.models.gguf_header import TENSOR_TYPES, TensorInfo
from lltm_ray.models.gguf_values import find_bad_blocks

COUNT = 3000


def main() -> int:
    """0 if both say the same of every type."""
    parser = argparse.ArgumentParser(prog="python -m tests.peers.blocks", description=__doc__)
    parser.add_argument("library", type=Path)
    validate = ctypes.CDLL(str(parser.parse_args().library)).ggml_validate_row_data
    validate.restype, validate.argtypes = ctypes.c_bool, (ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t)
    different = 0
    with tempfile.NamedTemporaryFile() as file:
        for number, (kind, elements, size) in TENSOR_TYPES.items():
            if kind == "Q8_1":
                continue
            raw = np.random.default_rng(number).integers(0, 256, (COUNT, size), np.uint8)
            raw[:, ::3] |= 0x78  # exponents of all ones are rare else
            file.seek(0)
            file.write(raw.tobytes())
            file.flush()
            theirs = [at for at in range(COUNT) if not validate(number, raw[at].tobytes(), size)]
            ours = find_bad_blocks(file.name, TensorInfo("t", (elements, COUNT), kind, 0, size * COUNT))
            same = ours == ((len(theirs), theirs[0] * size) if theirs else None)
            print(f"{kind:8} {len(theirs):5} of {COUNT}, ours {ours[0] if ours else 0:5}: {'equal' if same else 'NOT'}")
            different += not same
    return different


if __name__ == "__main__":
    sys.exit(main())
