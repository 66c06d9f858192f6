"""`python -m tests.peers.nf4_reference --out tests/unit/kernels/bitsandbytes.json`: what bitsandbytes makes of cases.

Needs `pip install bitsandbytes torch`; the CPU is enough. The file holds digests of its packed bytes, scales and
dequantized values, and one nested state whole: its search for 8-bit codes on a CPU is approximate, so that codes cannot
be compared.
"""

from __future__ import annotations

import argparse
import base64
import json
from pathlib import Path

from tests.unit.kernels.nf4_cases import CASES, digest, values


def text(tensor):
    return base64.b64encode(tensor.contiguous().numpy().tobytes()).decode()


def main():
    import bitsandbytes
    import torch
    from bitsandbytes import functional

    parser = argparse.ArgumentParser(prog="python -m tests.peers.nf4_reference", description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    cases = {}
    for name, size in CASES.items():
        for dtype in ("float32", "float16"):
            packed, state = functional.quantize_4bit(torch.from_numpy(values(size, dtype)), quant_type="nf4")
            back = functional.dequantize_4bit(packed, state)
            found = {"packed": packed.reshape(-1), "absmax": state.absmax, "values": back}
            cases[f"{name} {dtype}"] = {key: digest(tensor.numpy()) for key, tensor in found.items()}
    packed, state = functional.quantize_4bit(
        torch.from_numpy(values(CASES["tail"], "float32")), quant_type="nf4", compress_statistics=True
    )
    nested = {
        "absmax": text(state.absmax),
        "nested_absmax": text(state.state2.absmax),
        "offset": float(state.offset),
        "values": digest(functional.dequantize_4bit(packed, state).numpy()),
    }
    maps = {"levels": digest(state.code.numpy()), "dynamic": digest(functional.create_dynamic_map().numpy())}
    found = {"version": bitsandbytes.__version__, "maps": maps, "nested": nested, "cases": cases}
    out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
