"""All nearest neighbours beside cuVS and cuML: `python -m tests.peers.neighbours [--sizes 4096,32768] [--who ...]`.

On a GPU, with PyTorch and `cuvs-cu13`, `cuml-cu13` (what is not installed is said and left out; `native` compiles csrc/
at its first run). Each gets float32 unit vectors on the device and gives each vector's `k` nearest by cosine to the
host: `ours` is `TorchScorer`, tile by tile as `VectorIndex` uses it; `native` multiplies with csrc/ and selects with
PyTorch; cuVS and cuML search by brute force, their index made before. Calls take turns; the median counts. Answers are
held against float64 for 64 of the vectors. `numpy` is the CPU's form, and alone what runs without a GPU.

Then the pairs of blocks that analytics compares (`sections.alike_pairs`): NumPy beside CuPy, which must
find the same.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np

from lltm_ray.analytics.frames import choose_engine
from lltm_ray.analytics.sections import MOST_BLOCKS, MOST_PROMPTS, alike_pairs
from lltm_ray.knowledge.scores import NumpyScorer, Scorer

TILE_SCORES = 2**24
"""As `VectorIndex` holds at once."""
ROUNDS, CHECKED, WITHIN = 7, 64, 1e-5
NEEDS = {
    "numpy": (),
    "ours": ("torch",),
    "native": ("torch",),
    "cuvs": ("torch", "cuvs"),
    "cuml": ("torch", "cupy", "cuml"),
}
Search = Callable[[], Any]
"""Indices [n, k] on the host, in any order within a row."""


def in_tiles(scorer: Scorer, vectors: Any, k: int) -> Search:
    step = max(1, TILE_SCORES // len(vectors))

    def search() -> Any:
        return np.concatenate(
            [scorer.top(vectors[at : at + step], vectors, k)[0] for at in range(0, len(vectors), step)]
        )

    return search


def with_numpy(vectors: Any, k: int) -> Search:
    return in_tiles(NumpyScorer(), vectors, k)


def with_ours(vectors: Any, k: int) -> Search:
    from lltm_ray.kernels.similarity import TorchScorer

    return in_tiles(TorchScorer("cuda"), vectors, k)


def with_native(vectors: Any, k: int) -> Search:
    import torch

    from tests import native_build

    native_build.load(cuda=True)
    from lltm_ray.kernels import tensors

    resident = tensors.from_numpy(vectors, "cuda")
    step = max(1, TILE_SCORES // len(vectors))

    def search() -> Any:
        found = []
        for at in range(0, len(vectors), step):
            scores = tensors.matmul(resident[at : at + step], resident, transpose_b=True)
            best = torch.from_dlpack(scores).topk(k, dim=1, sorted=False).indices
            found.append(best.cpu().numpy())
        return np.concatenate(found)

    return search


def with_cuvs(vectors: Any, k: int) -> Search:
    import torch
    from cuvs.neighbors import brute_force

    resident = torch.from_numpy(vectors).cuda()
    index = brute_force.build(resident, metric="inner_product")

    def search() -> Any:
        _, best = brute_force.search(index, resident, k)
        return torch.as_tensor(best, device="cuda").cpu().numpy()

    return search


def with_cuml(vectors: Any, k: int) -> Search:
    import cupy
    from cuml.neighbors import NearestNeighbors

    resident = cupy.asarray(vectors)
    index = NearestNeighbors(n_neighbors=k, algorithm="brute", metric="cosine", output_type="cupy").fit(resident)
    return lambda: cupy.asnumpy(index.kneighbors(resident, return_distance=False))


MAKERS = {name: globals()[f"with_{name}"] for name in NEEDS}


def why_not(name: str) -> str:
    """Empty where it can run."""
    missing = [each for each in NEEDS[name] if find_spec(each) is None]
    if missing:
        return f"{', '.join(missing)} not installed"
    if NEEDS[name]:
        import torch

        return "" if torch.cuda.is_available() else "no GPU"
    return ""


def unit_vectors(count: int, length: int) -> Any:
    """In clusters of some twenty, as texts' vectors are; float32."""
    dice = np.random.default_rng(count)
    centers = dice.normal(size=(max(count // 20, 1), length)).astype(np.float32)
    points = centers[dice.integers(0, len(centers), count)] + dice.normal(size=(count, length)).astype(np.float32)
    return (points / np.linalg.norm(points, axis=1, keepdims=True)).astype(np.float32)


def is_right(vectors: Any, best: Any, k: int) -> bool:
    """Whether the neighbours of some vectors score as the best do, in float64."""
    rows = np.linspace(0, len(vectors) - 1, min(CHECKED, len(vectors))).astype(int)
    scores = vectors[rows].astype(np.float64) @ vectors.T.astype(np.float64)
    wanted = -np.sort(-scores, axis=1)[:, :k]
    found = -np.sort(-np.take_along_axis(scores, best[rows].astype(np.int64), 1), axis=1)
    return best.shape == (len(vectors), k) and bool(np.abs(found - wanted).max() <= WITHIN)


def in_turns(calls: dict[str, Search], rounds: int) -> dict[str, float]:
    """Median milliseconds of each; every call ends with its answer on the host."""
    took: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds):
        for name in list(calls)[:: 1 if turn % 2 else -1]:
            began = time.perf_counter()
            calls[name]()
            took[name].append((time.perf_counter() - began) * 1e3)
    return {name: statistics.median(each) for name, each in took.items()}


def compare_neighbours(names: list[str], sizes: list[int], length: int, k: int, rounds: int) -> bool:
    print(
        f"| vectors of {length}, {k} nearest of each | {' | '.join(f'{name} ms' for name in names)} | theirs / first |"
    )
    print(f"|---|{'---|' * len(names)}---|")
    are_right = True
    for count in sizes:
        vectors = unit_vectors(count, length)
        calls = {name: MAKERS[name](vectors, k) for name in names}
        wrong = [name for name, call in calls.items() if not is_right(vectors, call(), k)]
        are_right &= not wrong
        found = in_turns(calls, rounds)
        ratios = ", ".join(f"{name} {found[name] / found[names[0]]:.2f}" for name in names[1:])
        cells = " | ".join(f"{found[name]:.1f}{' WRONG' if name in wrong else ''}" for name in names)
        print(f"| {count:,} | {cells} | {ratios} |", flush=True)
    return are_right


def compare_pairs(rounds: int) -> bool:
    dice = np.random.default_rng(5)
    groups = dice.random((100, MOST_PROMPTS)) < 0.05
    flips = dice.random((MOST_BLOCKS, MOST_PROMPTS)) < 0.001
    has = (groups[dice.integers(0, 100, MOST_BLOCKS)] ^ flips).astype(np.float32)
    engine = choose_engine("auto")
    forms = {"numpy": (np, has)} | ({} if engine.xp is np else {"cupy": (engine.xp, engine.xp.asarray(has))})
    calls = {
        name: lambda xp=xp, rows=rows: [each.tolist() for each in alike_pairs(xp, rows)]
        for name, (xp, rows) in forms.items()
    }
    pairs = {name: sorted(zip(*call(), strict=True)) for name, call in calls.items()}
    found = in_turns(calls, rounds)
    print(f"\npairs of {len(has):,} blocks of {MOST_PROMPTS:,} prompts, {len(pairs['numpy']):,} alike; {engine.reason}")
    for name, ms in found.items():
        print(f"  {name}: {ms:.1f} ms{'' if pairs[name] == pairs['numpy'] else ' WRONG'}")
    return all(each == pairs["numpy"] for each in pairs.values())


def main() -> int:
    """0: all that ran gave right answers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="4096,32768,131072")
    parser.add_argument("--length", type=int, default=384)
    parser.add_argument("-k", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--who", default="ours,native,cuvs,cuml", help=f"of {', '.join(NEEDS)}")
    chosen = parser.parse_args()
    asked = chosen.who.split(",")
    if wrong := [name for name in asked if name not in NEEDS]:
        parser.error(f"unknown: {', '.join(wrong)}; known are {', '.join(NEEDS)}")
    reasons = {name: why_not(name) for name in asked}
    for name, why in reasons.items():
        if why:
            print(f"{name} is left out: {why}")
    names = [name for name, why in reasons.items() if not why]
    sizes = [int(each) for each in chosen.sizes.split(",")]
    is_good = not names or compare_neighbours(names, sizes, chosen.length, chosen.k, chosen.rounds)
    return 0 if compare_pairs(chosen.rounds) and is_good and names else 1


if __name__ == "__main__":
    sys.exit(main())
