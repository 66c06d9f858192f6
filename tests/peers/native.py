"""The native module beside PyTorch on a GPU: `python -m tests.peers.native [--quick]`.

The first run compiles csrc/ (`python -m tests.native_build --cuda` does that alone). Products go through the Python
call of each, on the same memory and stream: blocks of calls take turns, each block ends with a wait for the device, and
the median of the blocks counts. `tuned` is `matmul(..., tune=True)`.
"""

from __future__ import annotations

import argparse
import statistics
import time

from tests import native_build

SIZES = (256, 1024, 4096, 8192)
KINDS = ("float16", "bfloat16", "float32", "tf32")
ROUNDS, BLOCK_S, LONGEST_BLOCK = 25, 0.012, 500
HOST_CALLS, HOST_ROUNDS = 200, 30
COPY_SIDE = 16384


def seconds_of_block(torch, call, calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        call()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / calls


def interleaved(torch, calls: dict, rounds: int) -> dict[str, float]:
    """Median seconds of one call of each, from blocks that take turns."""
    for call in calls.values():
        for _ in range(5):
            call()
    torch.cuda.synchronize()
    first = next(iter(calls.values()))
    block = max(1, min(LONGEST_BLOCK, int(BLOCK_S / seconds_of_block(torch, first, 5))))
    times = {name: [] for name in calls}
    for turn in range(rounds):
        names = list(calls)[:: 1 if turn % 2 else -1]
        for name in names:
            times[name].append(seconds_of_block(torch, calls[name], block))
    return {name: statistics.median(values) for name, values in times.items()}


def host_seconds(torch, call) -> float:
    """Median time until a call comes back, while the device does not hold it up."""
    times = []
    for _ in range(HOST_ROUNDS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(HOST_CALLS):
            call()
        times.append((time.perf_counter() - start) / HOST_CALLS)
    torch.cuda.synchronize()
    return statistics.median(times)


def compare_products(torch, tensors, rounds: int) -> None:
    print("| product | ours us | tuned us | torch us | ours TFLOP/s | torch / ours | torch / tuned |")
    print("|---|---|---|---|---|---|---|")
    for kind in KINDS:
        tf32 = kind == "tf32"
        torch.backends.cuda.matmul.allow_tf32 = tf32
        for size in SIZES:
            dtype = torch.float32 if tf32 else getattr(torch, kind)
            a, b = (torch.randn(size, size, device="cuda", dtype=dtype) for _ in range(2))
            ours, other = tensors.from_dlpack(a), tensors.from_dlpack(b)
            found = interleaved(
                torch,
                {
                    "ours": lambda ours=ours, other=other, tf32=tf32: tensors.matmul(ours, other, tf32=tf32),
                    "tuned": lambda ours=ours, other=other, tf32=tf32: tensors.matmul(
                        ours, other, tf32=tf32, tune=True
                    ),
                    "torch": lambda a=a, b=b: torch.matmul(a, b),
                },
                rounds,
            )
            us = {name: 1e6 * value for name, value in found.items()}
            print(
                f"| {kind} {size}^3 | {us['ours']:.1f} | {us['tuned']:.1f} | {us['torch']:.1f} "
                f"| {2 * size**3 / found['ours'] / 1e12:.1f} | {found['torch'] / found['ours']:.3f} "
                f"| {found['torch'] / found['tuned']:.3f} |",
                flush=True,
            )


def compare_calls(torch, tensors) -> None:
    a, b = (torch.randn(16, 16, device="cuda", dtype=torch.float16) for _ in range(2))
    ours, other = tensors.from_dlpack(a), tensors.from_dlpack(b)
    out, their_out = tensors.empty((16, 16), "float16", "cuda"), torch.empty_like(a)
    calls = {
        "matmul": (lambda: tensors.matmul(ours, other), lambda: torch.matmul(a, b)),
        "matmul into out": (
            lambda: tensors.matmul(ours, other, out=out),
            lambda: torch.matmul(a, b, out=their_out),
        ),
        "empty": (lambda: tensors.empty((16, 16), "float16", "cuda"), lambda: torch.empty_like(a)),
        "slice": (lambda: ours[2:7, ::3], lambda: a[2:7, ::3]),
        "from_dlpack": (lambda: tensors.from_dlpack(a), lambda: torch.from_dlpack(ours)),
    }
    print("\n| call of 16 x 16 float16 | ours us | torch us |\n|---|---|---|")
    for name, (mine, theirs) in calls.items():
        print(f"| {name} | {1e6 * host_seconds(torch, mine):.2f} | {1e6 * host_seconds(torch, theirs):.2f} |")


def compare_copies(torch, tensors, rounds: int) -> None:
    source = torch.randn(COPY_SIDE, COPY_SIDE, device="cuda")
    target, half = torch.empty_like(source), torch.empty_like(source, dtype=torch.float16)
    brain = torch.empty_like(source, dtype=torch.bfloat16)
    ours, to, to_half, to_brain = (tensors.from_dlpack(each) for each in (source, target, half, brain))
    side, size = COPY_SIDE, source.numel()
    calls = {
        "whole": (2 * 4 * size, lambda: to.copy_from(ours), lambda: target.copy_(source)),
        "left half of rows": (
            4 * size,
            lambda: to[:, : side // 2].copy_from(ours[:, side // 2 :]),
            lambda: target[:, : side // 2].copy_(source[:, side // 2 :]),
        ),
        "every other column": (
            4 * size,
            lambda: to[:, ::2].copy_from(ours[:, 1::2]),
            lambda: target[:, ::2].copy_(source[:, 1::2]),
        ),
        "to float16": (6 * size, lambda: to_half.copy_from(ours), lambda: half.copy_(source)),
        "from float16": (6 * size, lambda: to.copy_from(to_half), lambda: target.copy_(half)),
        "to bfloat16": (6 * size, lambda: to_brain.copy_from(ours), lambda: brain.copy_(source)),
        "from bfloat16": (6 * size, lambda: to.copy_from(to_brain), lambda: target.copy_(brain)),
        "transposed": (2 * 4 * size, lambda: to.copy_from(ours.T), lambda: target.copy_(source.T)),
        "fill": (4 * size, lambda: to.fill(1.5), lambda: target.fill_(1.5)),
    }
    print("\n| copy on the device | ours GB/s | torch GB/s |\n|---|---|---|")
    for name, (moved, mine, theirs) in calls.items():
        found = interleaved(torch, {"ours": mine, "torch": theirs}, max(5, rounds // 2))
        print(f"| {name} | {moved / found['ours'] / 1e9:.0f} | {moved / found['torch'] / 1e9:.0f} |", flush=True)
    array = source[:2048].cpu()
    moved, numpy_array = array.numel() * 4, array.numpy()
    found = interleaved(
        torch,
        {
            "in": lambda: tensors.from_numpy(numpy_array, "cuda"),
            "torch in": lambda: array.to("cuda"),
            "out": ours[:2048].to_numpy,
            "torch out": source[:2048].cpu,
        },
        max(5, rounds // 2),
    )
    print("\n| between host and device | ours GB/s | torch GB/s |\n|---|---|---|")
    for name in ("in", "out"):
        print(f"| {name} | {moved / found[name] / 1e9:.1f} | {moved / found[f'torch {name}'] / 1e9:.1f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a third of the rounds")
    rounds = ROUNDS // 3 if parser.parse_args().quick else ROUNDS
    native_build.load(cuda=True)
    import torch

    from lltm_ray.kernels import tensors

    print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, median of {rounds} blocks\n")
    compare_products(torch, tensors, rounds)
    compare_calls(torch, tensors)
    compare_copies(torch, tensors, rounds)


if __name__ == "__main__":
    main()
