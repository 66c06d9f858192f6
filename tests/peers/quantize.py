"""Our quantization beside llama.cpp's own, byte by byte: `python -m tests.peers.quantize BIN [--quick] [--write]`.

BIN is a folder with llama-quantize and llama-imatrix. Whole files are compared for small models of five architectures,
all kinds, with and without an importance matrix, and for one that llama.cpp can load, with a matrix of llama-imatrix;
types alone for deep models (`--dry-run`). `--quick` leaves out the whole files of the kinds that ggml prepares for
seconds; `--write` does so too, and keeps the digests of what llama-quantize wrote for the unit tests.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from lltm_ray.errors import LltmRayError
from lltm_ray.models.quantize.kinds import KINDS
from lltm_ray.models.quantize.plan import Options, make_plan
from lltm_ray.models.random_weights import RandomShape, write_random
from tests.quantized import DEEP, SMALL, digest, make, write_matrix, write_source

DIGESTS = Path(__file__).parents[1] / "unit" / "models" / "quantized.json"
SLOW = tuple(kind for kind in KINDS if kind.startswith(("IQ1", "IQ2")) or kind == "IQ3_XXS")
OPTIONS = (
    ("", {}, []),
    ("pure", {"pure": True}, ["--pure"]),
    ("leave-output", {"leave_output": True}, ["--leave-output-tensor"]),
)
_LINE = re.compile(r"^\[ *\d+/ *\d+\] +(\S+) .*?type = *(\w+), size = .*?(?:\((\w+)\))?$", re.MULTILINE)


def theirs(bin_dir: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """One run of llama-quantize."""
    command = [str(bin_dir / "llama-quantize"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def types_digest(types: dict[str, str]) -> str:
    """Of names and types, in the file's order."""
    return hashlib.sha256("\n".join(f"{name}={kind}" for name, kind in types.items()).encode()).hexdigest()[:12]


def whole_files(bin_dir: Path, kinds: list[str]) -> Iterator[tuple[str, str | None, str | None]]:
    """`(case, their digest, ours)`; None where a side refuses."""
    for name, source in SMALL.items():
        matrix = write_matrix(Path("matrix.gguf"), source)
        for kind in kinds:
            if kind in ("F16", "BF16", "F32") and name == "odd":
                continue
            have = {"F32": "F16", "F16": "BF16"}.get(kind, "F32") if name == "llama" else "BF16"
            path = write_source(Path(f"{name}.gguf"), source, have)
            for label, given, flags in (*OPTIONS, ("imatrix", {"imatrix": str(matrix)}, ["--imatrix", matrix])):
                if label in ("pure", "leave-output") and name != "llama":
                    continue
                yield f"{name} {kind} {label}".strip(), *pair(bin_dir, path, kind, given, flags)
    path = write_source(Path("again.gguf"), SMALL["llama"], "Q8_0")
    given, flags = {"allow_requantize": True}, ["--allow-requantize"]
    yield "llama-q8_0 Q4_K_M requantize", *pair(bin_dir, path, "Q4_K_M", given, flags)
    yield "llama-q8_0 Q4_K_M", *pair(bin_dir, path, "Q4_K_M", {}, [])


def pair(
    bin_dir: Path, path: Path, kind: str, given: dict[str, object], flags: list[object]
) -> tuple[str | None, str | None]:
    """Both sides' digests; they write beside the source."""
    ours, other = path.with_name("ours.gguf"), path.with_name("theirs.gguf")
    done = theirs(bin_dir, *flags, path, other, kind, 2)
    try:
        make(path, ours, kind, threads=2, **given)
    except LltmRayError:
        return digest(other) if done.returncode == 0 else None, None
    return digest(other) if done.returncode == 0 else None, digest(ours)


def real_matrix(bin_dir: Path, kinds: list[str]) -> Iterator[tuple[str, str | None, str | None]]:
    """A model that runs, and what llama-imatrix says of it."""
    path, text, matrix = Path("random.gguf"), Path("text.txt"), Path("real.gguf")
    write_random(path, RandomShape(n_embd=256, n_ff=512, n_layer=2))
    text.write_text("The quick brown fox jumps over the lazy dog. " * 200)
    command = [bin_dir / "llama-imatrix", "-m", path, "-f", text, "-o", matrix, "-c", "128", "--chunks", "8"]
    subprocess.run(command, capture_output=True, check=True)
    for kind in kinds:
        given, flags = {"imatrix": str(matrix)}, ["--imatrix", matrix]
        pairs = pair(bin_dir, path, kind, given, flags)
        yield f"random {kind} llama-imatrix", *pairs


def types_only(bin_dir: Path, kinds: list[str]) -> Iterator[tuple[str, str | None, str | None]]:
    """As `whole_files`, of deep models' types; none is computed, so all kinds are quick."""
    del kinds
    for name, source in DEEP.items():
        path, matrix = write_source(Path("deep.gguf"), source), write_matrix(Path("matrix.gguf"), source)
        for kind in KINDS:
            for label, given in (("", None), ("imatrix", str(matrix))):
                flags = ["--imatrix", matrix] if given else []
                said = theirs(bin_dir, "--dry-run", *flags, path, kind)
                found = {line[1]: (line[3] or line[2]).upper() for line in _LINE.finditer(said.stdout + said.stderr)}
                try:
                    plan = make_plan(path, Options(kind=kind, imatrix=given))
                    mine = types_digest({each.source.name: each.type for each in plan.tensors})
                except LltmRayError:
                    mine = None
                refused = "will require an imatrix" in said.stdout + said.stderr
                yield f"{name} {kind} {label}".strip(), None if refused else types_digest(found), mine


def main() -> None:
    """Compare, and keep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bin_dir", type=Path, metavar="BIN")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--quick", action="store_true", help="without the kinds whose tables ggml computes for seconds")
    given = parser.parse_args()
    kept: dict[str, dict[str, str | None]] = {}
    odd = 0
    kinds = [kind for kind in KINDS if kind not in SLOW or not (given.quick or given.write)]
    with tempfile.TemporaryDirectory() as name, contextlib.chdir(name):  # a file keeps its matrix's path
        for part in (whole_files, types_only, real_matrix):
            results = list(part(given.bin_dir.resolve(), kinds))
            differing = [case for case, other, mine in results if other != mine]
            same = sum(other is not None and other == mine for _, other, mine in results)
            refused = sum(other is mine is None for _, other, mine in results)
            print(
                f"{part.__name__}: {same} the same, {refused} refused by both, {len(differing)} differ: {differing}",
                flush=True,
            )
            odd += len(differing)
            kept[part.__name__] = {case: other for case, other, _ in results}
    if given.write:
        kept.pop("real_matrix")
        DIGESTS.write_text(json.dumps(kept, indent=0, sort_keys=True) + "\n")
    sys.exit(bool(odd))


if __name__ == "__main__":
    main()
