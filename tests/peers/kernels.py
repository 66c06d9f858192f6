"""`python -m tests.peers.kernels`: speed of NF4, GGUF blocks, fused kernels and CUDA graphs on one GPU, as Markdown.

Method: calls of one kind are captured in a CUDA graph and the graph is replayed, so that what is timed is the device
and not Python; the median of 7 replays by CUDA events. Each call of a graph reads another copy of its first input and
writes another output, so that little comes out of the L2 cache. GB/s counts bytes that must be read and written, once
each; `of copy` is the share of what `torch.Tensor.copy_` reaches on the same machine at that size. Settings are tuned
first, as a user would.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from lltm_ray.kernels import fused, gguf_blocks, nf4
from lltm_ray.kernels.cuda_graphs import GraphPool
from lltm_ray.kernels.tuning import Tuner

REPLAYS, COPIES = 7, 8
BYTES_APART = 1 << 30
"""Copies of an input together take at most this."""


def milliseconds(torch: Any, calls: Sequence[Callable[[], Any]]) -> float:
    """Median device time of a call, in ms; all are captured in one graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in (*calls, *calls[:2]):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        kept = [call() for call in calls]
    took = timed(torch, graph.replay) / len(calls)
    del kept
    return took


def timed(torch: Any, call: Callable[[], Any]) -> float:
    """Median time of a call in ms, by events."""
    call()
    times = []
    for _ in range(REPLAYS):
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        call()
        after.record()
        after.synchronize()
        times.append(before.elapsed_time(after))
    return statistics.median(times)


def copies(torch: Any, tensor: Any) -> list[Any]:
    return [tensor.clone() for _ in range(max(1, min(COPIES, BYTES_APART // max(1, tensor.nbytes))))]


class Table:
    """Rows against the copy speed of a size."""

    def __init__(self, torch: Any, mebibytes: int) -> None:
        self._torch = torch
        source = torch.empty(mebibytes << 20, dtype=torch.uint8, device="cuda")
        pairs = [(each, torch.empty_like(each)) for each in copies(torch, source)]
        took = milliseconds(torch, [lambda pair=pair: pair[1].copy_(pair[0]) for pair in pairs])
        self._size = f"{mebibytes} MiB"
        self._copy = 2 * source.nbytes / took / 1e6
        self.add("copy", 2 * source.nbytes, took)

    def add(self, name: str, nbytes: int, took: float) -> None:
        speed = nbytes / took / 1e6
        print(f"| {self._size} | {name} | {took * 1e3:.1f} | {speed:.0f} | {speed / self._copy:.2f} |", flush=True)

    def time(self, name: str, nbytes: int, call: Callable[[Any], Any], inputs: Sequence[Any]) -> None:
        """One call for each of `inputs`."""
        self.add(name, nbytes, milliseconds(self._torch, [lambda each=each: call(each) for each in inputs]))


def nf4_rows(torch: Any, table: Table, mebibytes: int, tuner: Tuner) -> None:
    for dtype in ("bfloat16", "float16", "float32"):
        kind = getattr(torch, dtype)
        values = torch.randn((mebibytes << 20) // kind.itemsize, device="cuda").to(kind)
        inputs = copies(torch, values)
        for double in (False, True):
            held = nf4.quantize(values, double=double, tuner=tuner)
            nf4.dequantize(held, tuner=tuner)
            moved, label = values.nbytes + held.nbytes, f"{dtype}{', double' if double else ''}"
            table.time(
                f"NF4 quantize {label}", moved, lambda each, d=double: nf4.quantize(each, double=d, tuner=tuner), inputs
            )
            states = [nf4.quantize(each, double=double) for each in inputs]
            table.time(f"NF4 dequantize {label}", moved, lambda each: nf4.dequantize(each, tuner=tuner), states)
            if importlib.util.find_spec("bitsandbytes"):
                bitsandbytes_rows(table, label, moved, inputs, double)


def bitsandbytes_rows(table: Table, label: str, moved: int, inputs: list[Any], double: bool) -> None:
    from bitsandbytes import functional

    def quantize(each: Any) -> Any:
        return functional.quantize_4bit(each, quant_type="nf4", compress_statistics=double)

    table.time(f"bitsandbytes quantize {label}", moved, quantize, inputs)
    states = [quantize(each) for each in inputs]
    table.time(f"bitsandbytes dequantize {label}", moved, lambda each: functional.dequantize_4bit(*each), states)


def gguf_rows(torch: Any, table: Table, mebibytes: int, tuner: Tuner) -> None:
    for kind, form in gguf_blocks.KINDS.items():
        count = (mebibytes << 20) // 4 // form.values
        raw = torch.zeros(count * form.nbytes, dtype=torch.uint8, device="cuda").random_(0, 32)
        size = count * form.values
        gguf_blocks.dequantize(raw, kind, n_elements=size, tuner=tuner)
        table.time(
            f"{kind} dequantize",
            raw.nbytes + 4 * size,
            lambda each, k=kind, n=size: gguf_blocks.dequantize(each, k, n_elements=n, tuner=tuner),
            copies(torch, raw),
        )


def eager(torch: Any) -> dict[str, Callable[..., Any]]:
    """What one would write without the fused kernels."""
    functional = torch.nn.functional

    def rope(x: Any, cos: Any, sin: Any) -> Any:
        first, second = x.chunk(2, -1)
        cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)

    return {
        "add": torch.add,
        "swiglu": lambda gate, up: functional.silu(gate) * up,
        "softmax": lambda x: x.softmax(-1),
        "layernorm": lambda x, weight, bias: functional.layer_norm(x, weight.shape, weight, bias),
        "rmsnorm": lambda x, weight: functional.rms_norm(x, weight.shape, weight, 1e-6),
        "rope": rope,
    }


def fused_rows(torch: Any, table: Table, mebibytes: int, tuner: Tuner) -> None:
    columns, dtype = 4096, torch.bfloat16
    rows = (mebibytes << 20) // 2 // columns
    vector = torch.randn(columns, device="cuda").to(dtype)
    angle = torch.rand(rows, 64, device="cuda") * 100
    further = {
        "add": 1, "swiglu": 1, "softmax": (), "layernorm": (vector, vector), "rmsnorm": (vector,),
        "rope": (angle.cos(), angle.sin()),
    }  # fmt: skip
    plain = eager(torch)
    for name, more in further.items():
        x = torch.randn(rows, columns, device="cuda").to(dtype)
        x = x.view(rows, 32, 128) if name == "rope" else x
        rest = (x.clone(),) if more == 1 else more
        options = {"style": "halves"} if name == "rope" else {}
        moved = 2 * x.nbytes + sum(each.nbytes for each in rest)
        kernel = fused.get_kernel(name)
        kernel(x, *rest, tuner=tuner, **options)
        inputs = copies(torch, x)
        table.time(
            f"{name} fused", moved, lambda each, k=kernel, r=rest, o=options: k(each, *r, tuner=tuner, **o), inputs
        )
        table.time(f"{name} eager", moved, lambda each, n=name, r=rest: plain[n](each, *r), inputs)
        if name == "rope":
            kernel(x, *rest, tuner=tuner, style="pairs")
            table.time(
                "rope pairs fused", moved, lambda each, r=rest: fused.rope(each, *r, tuner=tuner, style="pairs"), inputs
            )


def product_rows(torch: Any, tuner: Tuner) -> None:
    print("\n| rows | NF4 product, us | dequantize, then product, us | bfloat16 weight, us |\n|--|--|--|--|")
    plain = [torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(COPIES)]
    weights = [nf4.quantize(each) for each in plain]
    for rows in (1, 4, 16):
        x = torch.randn(rows, 8192, device="cuda", dtype=torch.bfloat16)
        nf4.matmul(x, weights[0], tuner=tuner)
        took = [
            milliseconds(torch, [lambda each=each, x=x: nf4.matmul(x, each, tuner=tuner) for each in weights]),
            milliseconds(torch, [lambda each=each, x=x: x @ nf4.dequantize(each).T for each in weights]),
            milliseconds(torch, [lambda each=each, x=x: x @ each.T for each in plain]),
        ]
        print(f"| {rows} | " + " | ".join(f"{each * 1e3:.0f}" for each in took) + " |", flush=True)


def decoder_step(torch: Any, layers: int = 8, width: int = 1024) -> Callable[[Any], Any]:
    """A small decoder's feed-forward and projections for one token of a batch; attention over a fixed cache."""
    make = lambda *size: torch.randn(size, device="cuda", dtype=torch.bfloat16) * 0.02  # noqa: E731
    stack = [(make(width), make(width, 3 * width), make(width, width), make(width, 4 * width), make(2 * width, width))
             for _ in range(layers)]  # fmt: skip
    keys, values = make(8, 16, 256, width // 16), make(8, 16, 256, width // 16)

    def run(x: Any) -> Any:
        for norm, qkv, project, up, down in stack:
            query = (fused.rmsnorm(x, norm) @ qkv)[:, :width].view(8, 16, 1, -1)
            attended = torch.nn.functional.scaled_dot_product_attention(query, keys, values)
            x = fused.add(x, attended.reshape(8, width) @ project)
            gate, wide = (fused.rmsnorm(x, norm) @ up).chunk(2, -1)
            x = fused.add(x, fused.swiglu(gate, wide) @ down)
        return x

    return run


def graph_rows(torch: Any) -> None:
    run = decoder_step(torch)
    x = torch.randn(8, 1024, device="cuda", dtype=torch.bfloat16)
    graphs = GraphPool(run)
    graphs.capture(x)
    took = {}
    for name, call in (("eager", run), ("graph replay", graphs)):
        took[name] = timed(torch, lambda call=call: [call(x) for _ in range(20)]) / 20
    print("\n| decoder step, 8 layers of 1024, batch 8 | us |\n|--|--|")
    for name, each in took.items():
        print(f"| {name} | {each * 1e3:.0f} |")
    print(f"\nreplay is {took['eager'] / took['graph replay']:.1f} times as fast")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.peers.kernels", description=__doc__)
    parser.add_argument("--mebibytes", type=int, nargs="+", default=[64, 256], help="of the plain tensor (64 256)")
    parser.add_argument("--parts", default="nf4,gguf,fused,product,graph", help="which (default: all)")
    parser.add_argument("--cache", type=Path, help="folder of tuned settings (default: a new one)")
    chosen = parser.parse_args()
    import torch

    torch.manual_seed(1)
    by_size = {"nf4": nf4_rows, "gguf": gguf_rows, "fused": fused_rows}
    parts = chosen.parts.split(",")
    versions = f"PyTorch {torch.__version__}, NumPy {np.__version__}, Python {sys.version[:6]}"
    print(f"{torch.cuda.get_device_name()}, {versions}\n")
    print("| size | what | us | GB/s | of copy |\n|--|--|--|--|--|")
    with TemporaryDirectory() as folder:
        tuner = Tuner(chosen.cache or folder)
        for mebibytes in chosen.mebibytes:
            table = Table(torch, mebibytes)
            for part in parts:
                if part in by_size:
                    by_size[part](torch, table, mebibytes, tuner)
                    torch.cuda.empty_cache()
        if "product" in parts:
            product_rows(torch, tuner)
        if "graph" in parts:
            graph_rows(torch)


if __name__ == "__main__":
    main()
