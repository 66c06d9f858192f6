"""Paged attention, the batcher and `models diff` on one GPU, each beside its plain alternative.

`python -m tests.peers.attention [attention sweep batcher diff] [--folder /tmp]`; all but `sweep` by default. Times are
medians of CUDA events after a warm-up.

attention: one decoding step of one layer, 32 heads over 8 KV heads of 128, bfloat16, blocks of 16. The peer is
PyTorch's `scaled_dot_product_attention` on a cache padded to the longest sequence, the fastest of three calls: grouped
heads with a mask, repeated heads with a mask (the copies count, as they do in use), and, where no mask is needed,
grouped heads alone. GB/s counts, over the time in a graph, the keys and values that the sequences have, without
padding; "of copy" is that over what `copy_` reads and writes a second on the same device. "Times" compares the calls as
they are.

batcher: a Llama of 1.1 B random weights, bfloat16, eager; 64 requests that come at once. One by one is the same batcher
with `max_running=1` on the first 6 of them.

diff: an F16 file of 1.36 B normal random numbers and one of Q4_K and Q6_K blocks of the same numbers, rounded by
`tests.peers.kquants` (not llama.cpp's search for scales). Both are in the page cache. The CPU compares one layer; the
figures are held against those of the same layer decoded by package `gguf`.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import torch

from lltm_ray.cli.models_diff import choose_decoder
from lltm_ray.kernels import _paged_triton
from lltm_ray.kernels.batcher import Batcher
from lltm_ray.kernels.paged_attention import paged_attention
from lltm_ray.kernels.paged_cache import CacheShape, PagedBatch, PagedCache
from lltm_ray.kernels.reference_llama import LlamaShape, ReferenceLlama
from lltm_ray.models.diff import diff_models
from tests.peers.kquants import quantize_q4_k, quantize_q6_k

HEADS, KV_HEADS, SIZE, BLOCK = 32, 8, 128, 16
GIB = 1 << 30


def mixes() -> dict[str, list[int]]:
    """Lengths of sequences that decode together."""
    source = random.Random(0)
    chat = [min(8192, int(source.lognormvariate(math.log(900), 0.9)) + 1) for _ in range(64)]
    return {
        "64 chats, 0.1 to 8 k": chat,
        "64 of 2 k": [2048] * 64,
        "256 short, 50 to 1000": [source.randrange(50, 1000) for _ in range(256)],
        "one of 32 k": [32_768],
        "one of 32 k, 31 of 500": [32_768] + [500] * 31,
        "8 of 16 k": [16_384] * 8,
        "one of 500": [500],
    }


def measure_ms(run: Callable[[], object], repeat: int = 20) -> float:
    """Median time on the device."""
    for _ in range(3):
        run()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(2 * repeat)]
    for begin, end in zip(marks[::2], marks[1::2], strict=True):
        begin.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in zip(marks[::2], marks[1::2], strict=True))


def graphed(run: Callable[[], object]) -> Callable[[], object]:
    """The same launches without Python's share: what a captured step would take."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def copy_gbs() -> float:
    """What `copy_` of 2 GiB moves a second, reading and writing."""
    source = torch.empty(2 * GIB, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 4 * GIB / measure_ms(lambda: target.copy_(source)) / 1e6


def pools(lengths: list[int]) -> tuple[Any, Any, PagedBatch]:
    """Random keys and values in strewn blocks, and the table of who has which."""
    used = [-(-length // BLOCK) for length in lengths]
    keys, values = (
        torch.randn(sum(used), KV_HEADS, BLOCK, SIZE, device="cuda", dtype=torch.bfloat16) for _ in range(2)
    )
    order = torch.randperm(sum(used), dtype=torch.int32)
    tables, at = torch.zeros(len(lengths), max(used), dtype=torch.int32), 0
    for row, count in enumerate(used):
        tables[row, :count] = order[at : at + count]
        at += count
    sent = torch.tensor(lengths, dtype=torch.int32, device="cuda")
    return keys, values, PagedBatch(tables=tables.cuda(), lengths=sent, longest=max(lengths), total=sum(lengths))


def padded_calls(query: Any, keys: Any, values: Any, batch: PagedBatch) -> dict[str, Callable[[], Any]]:
    """PyTorch's attention on the same numbers in a padded cache."""
    n, used = len(query), -(-batch.longest // BLOCK)
    shape = n, KV_HEADS, used * BLOCK, SIZE
    key, value = (
        pool[batch.tables.long()].transpose(1, 2).reshape(shape)[:, :, : batch.longest].contiguous()
        for pool in (keys, values)
    )
    inside = (torch.arange(batch.longest, device="cuda") < batch.lengths[:, None])[:, None, None]
    attention, rows = torch.nn.functional.scaled_dot_product_attention, query[:, :, None]
    times = HEADS // KV_HEADS
    calls = {
        "grouped, mask": lambda: attention(rows, key, value, attn_mask=inside, enable_gqa=True),
        "repeated, mask": lambda: attention(
            rows, key.repeat_interleave(times, 1), value.repeat_interleave(times, 1), attn_mask=inside
        ),
    }
    if batch.total == n * batch.longest:
        calls["grouped, no mask"] = lambda: attention(rows, key, value, enable_gqa=True)
    return calls


def bench_attention() -> Iterator[str]:
    """Rows of the table."""
    copy = copy_gbs()
    yield f"`copy_`: {copy:,.0f} GB/s\n"
    yield "| sequences | paged, us | in a graph, us | GB/s | of copy | SDPA, us | which | times | difference |"
    yield "|---|--:|--:|--:|--:|--:|---|--:|--:|"
    for name, lengths in mixes().items():
        keys, values, batch = pools(lengths)
        query = torch.randn(len(lengths), HEADS, SIZE, device="cuda", dtype=torch.bfloat16)
        run = partial(paged_attention, query, keys, values, batch)
        ours, alone = measure_ms(run), measure_ms(graphed(run))
        calls = padded_calls(query, keys, values, batch)
        peers = {which: measure_ms(call, 5) for which, call in calls.items()}
        best = min(peers, key=peers.__getitem__)
        off = (run().float() - calls[best]()[:, :, 0].float()).abs().max().item()
        gbs = 2 * batch.total * KV_HEADS * SIZE * 2 / alone / 1e6
        yield (
            f"| {name} | {ours * 1e3:,.0f} | {alone * 1e3:,.0f} | {gbs:,.0f} | {gbs / copy:.2f} | "
            f"{peers[best] * 1e3:,.0f} | {best} | {peers[best] / ours:.1f} | {off:.1g} |"
        )


def bench_sweep() -> Iterator[str]:
    """The kernel's settings, in a graph: which tile, warps and stages would be best for each mix."""
    known, chosen = _paged_triton.tiles, {}

    def tiles(*given: Any) -> dict[str, int]:
        return known(*given) | chosen

    _paged_triton.tiles = tiles
    yield "| sequences | " + " | ".join(["tile, warps, stages: us, best first"]) + " |\n|---|---|"
    for name, lengths in mixes().items():
        keys, values, batch = pools(lengths)
        query = torch.randn(len(lengths), HEADS, SIZE, device="cuda", dtype=torch.bfloat16)
        times = {}
        for setting in (
            (64, 4, 3),
            (64, 4, 2),
            (64, 4, 5),
            (64, 2, 5),
            (64, 8, 5),
            (32, 4, 5),
            (128, 4, 3),
            (128, 8, 5),
        ):
            chosen.update(zip(("tile", "num_warps", "num_stages"), setting, strict=True))
            run = partial(paged_attention, query, keys, values, batch)
            times[setting] = measure_ms(graphed(run)) * 1e3
        best = sorted(times.items(), key=lambda item: item[1])
        yield f"| {name} | " + ", ".join(f"{setting}: {us:.0f}" for setting, us in best) + " |"
    _paged_triton.tiles = known


def bench_batcher() -> Iterator[str]:
    """Rows of the table."""
    shape = LlamaShape(n_vocab=32_000, n_embd=2048, n_layers=22, n_heads=32, n_kv_heads=4, n_ff=5632)
    model = ReferenceLlama(shape, device="cuda", dtype=torch.bfloat16)
    source = random.Random(0)
    asked = [
        ([source.randrange(32_000) for _ in range(source.randrange(32, 512))], source.randrange(32, 128))
        for _ in range(64)
    ]
    cache = CacheShape(n_layers=22, n_kv_heads=4, head_dim=64, n_blocks=4096)

    def run(requests: list[tuple[list[int], int]], max_running: int) -> tuple[float, Batcher, list[list[int]]]:
        pool = PagedCache(cache, device="cuda", dtype=torch.bfloat16)
        batcher = Batcher(model, pool, max_running=max_running, chunk_tokens=1024)
        torch.cuda.synchronize()
        began = time.perf_counter()
        streams = [batcher.submit(prompt, max_tokens=count) for prompt, count in requests]
        batcher.run()
        torch.cuda.synchronize()
        return time.perf_counter() - began, batcher, [stream.tokens for stream in streams]

    run(asked[:8], 8)
    yield "| requests | at once | seconds | steps | tokens answered | tokens/s |\n|--:|--:|--:|--:|--:|--:|"
    rates, answers = {}, {}
    for requests, max_running in ((asked[:6], 1), (asked, 8), (asked, 64)):
        seconds, batcher, answers[max_running] = run(requests, max_running)
        done = batcher.figures
        rates[max_running] = done.generated_tokens / seconds
        yield (
            f"| {len(requests)} | {max_running} | {seconds:.2f} | {done.steps} | {done.generated_tokens} | "
            f"{rates[max_running]:,.0f} |"
        )
    pairs = [(a, b) for one, two in zip(answers[1], answers[64], strict=False) for a, b in zip(one, two, strict=True)]
    same = sum(a == b for a, b in pairs) / len(pairs)
    yield f"\n64 at once: {rates[64] / rates[1]:.1f} times one by one. bfloat16 rounds differently in products of"
    yield f"different sizes: {same:.0%} of the first 6 answers' tokens are equal (float32: all, which tests hold)."


def write_pair(folder: Path) -> tuple[Path, Path]:
    """The two files, unless they are there."""
    paths = folder / "diff-f16.gguf", folder / "diff-q4k.gguf"
    if all(path.exists() for path in paths):
        return paths
    torch.manual_seed(0)
    writers = [gguf.GGUFWriter(path, "llama") for path in paths]
    widths = {"attn_q": (2048, 2048), "attn_k": (2048, 2048), "attn_v": (2048, 2048), "attn_output": (2048, 2048)}
    widths |= {"ffn_gate": (5632, 2048), "ffn_up": (5632, 2048), "ffn_down": (2048, 5632)}
    names = {"token_embd.weight": (32_000, 2048), "output.weight": (32_000, 2048)}
    names |= {f"blk.{layer}.{name}.weight": shape for layer in range(24) for name, shape in widths.items()}
    for name, shape in names.items():
        values = torch.randn(shape, device="cuda") * 0.02
        fine = any(part in name for part in ("output.weight", "attn_v", "ffn_down"))
        quantized = (quantize_q6_k if fine else quantize_q4_k)(values.half().float())
        kind = gguf.GGMLQuantizationType.Q6_K if fine else gguf.GGMLQuantizationType.Q4_K
        writers[0].add_tensor(name, values.half().cpu().numpy())
        writers[1].add_tensor(name, quantized.cpu().numpy().reshape(shape[0], -1), raw_dtype=kind)
    for writer in writers:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return paths


def bench_diff(folder: Path) -> Iterator[str]:
    """Rows of the table."""
    paths = write_pair(folder)
    decode, where = choose_decoder("cuda")
    size = sum(path.stat().st_size for path in paths)
    seconds = []
    for _ in range(4):  # the first one compiles and fills the page cache
        began = time.perf_counter()
        found = diff_models(*paths, dequantize=decode)
        seconds.append(time.perf_counter() - began)
    began = time.perf_counter()
    diff_models(*paths, only="blk.0.*", dequantize=choose_decoder("cpu")[0])
    cpu = time.perf_counter() - began
    sample = diff_models(*paths, only="blk.0.*")
    elements, part = (sum(each.n_elements for each in one.tensors) for one in (found, sample))
    known = {each.name: each for each in found.tensors}
    off = max(
        abs(getattr(each, name) / getattr(known[each.name], name) - 1)
        for each in sample.tensors
        for name in ("max_abs", "rmse", "relative", "cosine")
    )
    yield "| on | elements | seconds | file GB/s | elements/s |\n|---|--:|--:|--:|--:|"
    best = min(seconds[1:])
    yield f"| {where} | {elements:,} | {best:.2f} | {size / best / 1e9:.2f} | {elements / best:.2g} |"
    yield f"| CPU, one layer | {part:,} | {cpu:.2f} | {size * part / elements / cpu / 1e9:.2f} | {part / cpu:.2g} |"
    yield f"\nFirst run {seconds[0]:.2f} s. Largest relative difference of a figure from that with gguf: {off:.1g}."
    for kind in ("Q4_K", "Q6_K"):
        errors = [each.relative for each in found.tensors if each.kind_b == kind]
        yield f"{kind}: relative error {min(errors):.4f} to {max(errors):.4f} over {len(errors)} tensors."


def main() -> int:
    """Print what was asked for."""
    parser = argparse.ArgumentParser(prog="python -m tests.peers.attention", description=__doc__)
    parser.add_argument("what", nargs="*", default=["attention", "batcher", "diff"])
    parser.add_argument("--folder", type=Path, default=Path("/tmp"))
    chosen = parser.parse_args()
    parts = {
        "attention": bench_attention,
        "sweep": bench_sweep,
        "batcher": bench_batcher,
        "diff": lambda: bench_diff(chosen.folder),
    }
    unknown = set(chosen.what) - set(parts)
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; choose of {', '.join(parts)}")
    print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, Triton {_paged_triton.triton.__version__}")
    for name in chosen.what:
        print(f"\n## {name}\n")
        with torch.inference_mode():
            for line in parts[name]():
                print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
