"""`python -m tests.peers.gpu_plans --server llama-server --gpus 2 --out results`: the plan chooser against real GPUs.

Each plan in turn on fresh servers: an engine per GPU, several on each, one over all by layers and by tensors (not by
rows: llama.cpp's CUDA backend has that no more). Tokens/s of one stream and of many stand beside what was predicted.
Then speculative decoding (`gpu_drafts`): what is accepted, and what it brings.

Writes gpu_plans.json and gpu_plans.md after every run. Without --model a random one of `--shape` is made. To see
that it works without a GPU: `--server embedded --gpus 0 --quick`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lltm_ray.cli.plan import here, need_of, shape_of
from lltm_ray.config import EngineConfig, read_environment
from lltm_ray.gpu.host import available_ram_bytes
from lltm_ray.gpu.plan_parts import Machine, Plan, Wish
from lltm_ray.gpu.plans import choose
from lltm_ray.gpu.topology import read_topology
from lltm_ray.llamacpp.command import build_args
from lltm_ray.models.gguf import read_model
from lltm_ray.models.random_weights import RandomShape, _build_tensors, _write_metadata
from lltm_ray.models.resolve import resolve

from . import gpu_drafts
from .processes import StartError, free_port, running
from .report import note

ALL_LAYERS = 99
START_S = 180.0
ANSWER_S = 300.0
SHAPE = "4096,32,8,24,14336"
"""5.3 B parameters in F16: 10 GB, which a T4 holds, and an H200 reads in 2 ms."""
QUICK_SHAPE = "128,4,2,4,256"
QUICK_LAYERS = 24
PROMPT = "Tell me about slots, caches and queues, and then about the weather in the north of the country, please. "


@dataclass(frozen=True, kw_only=True)
class Setup:
    """One way to use the GPUs."""

    title: str
    """As `Plan.title`."""
    servers: tuple[str, ...]
    """CUDA_VISIBLE_DEVICES of each."""
    split_mode: str = "layer"


def setups(gpus: int) -> list[Setup]:
    """For two GPUs: 2 x 1, 4 x 0.5, 1 x 2 by layers and by tensors."""
    if not gpus:
        return [Setup(title="CPU", servers=("",))]
    each, every = tuple(str(gpu) for gpu in range(gpus)), ",".join(str(gpu) for gpu in range(gpus))
    found = [
        Setup(title=f"{gpus} x 1 GPU", servers=each),
        Setup(title=f"{2 * gpus} x 0.5 GPU", servers=each * 2),
    ]
    if gpus > 1:
        modes = ("layer", "tensor")
        found += [Setup(title=f"1 x {gpus} GPUs ({mode})", servers=(every,), split_mode=mode) for mode in modes]
    return found


def write_f16(path: Path, shape: RandomShape) -> Path:
    """A random model with F16 matrices, in seconds: their numbers are repeated."""
    import gguf

    names = _build_tensors(RandomShape(n_embd=64, n_head=4, n_head_kv=2, n_layer=shape.n_layer, n_ff=128))
    n_vocab = names["token_embd.weight"].shape[0]
    n_kv = shape.n_embd // shape.n_head * shape.n_head_kv
    sizes = {
        "attn_q": (shape.n_embd, shape.n_embd),
        "attn_k": (n_kv, shape.n_embd),
        "attn_v": (n_kv, shape.n_embd),
        "attn_output": (shape.n_embd, shape.n_embd),
        "ffn_gate": (shape.n_ff, shape.n_embd),
        "ffn_up": (shape.n_ff, shape.n_embd),
        "ffn_down": (shape.n_embd, shape.n_ff),
    }
    pool = (np.random.default_rng(shape.seed).standard_normal(1 << 20) * 0.02).astype(np.float16)
    writer = gguf.GGUFWriter(path, shape.architecture)
    _write_metadata(writer, shape)
    for name in names:
        part = name.split(".")[-2]
        if "norm" in part:
            writer.add_tensor(name, np.ones(shape.n_embd, np.float32))
        else:
            writer.add_tensor(name, np.resize(pool, sizes.get(part, (n_vocab, shape.n_embd))))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


class Bench:
    """Runs every setup, and keeps what was measured.

    Args:
        chosen: the command line.
        folder: for the model and the logs.
    """

    def __init__(self, chosen: argparse.Namespace, folder: Path) -> None:
        self.chosen, self.folder = chosen, folder
        self.model = chosen.model or write_f16(folder / "random.gguf", read_shape(chosen.shape))
        self.info = read_model(self.model)
        self.rows: list[dict[str, Any]] = []
        self.drafts: list[dict[str, Any]] = []
        topology = read_topology()
        machine = here(topology)
        self.machine = Machine(
            gpus=machine.gpus[: chosen.gpus],
            link_bytes_s=machine.link_bytes_s,
            is_nvlink=machine.is_nvlink,
            ram_bytes=available_ram_bytes(),
        )
        self.links = [pair.word for pair in topology.pairs]

    def play(self) -> None:
        """All setups at all numbers of streams; one that fails leaves its reason."""
        for setup in setups(self.chosen.gpus):
            for streams in self.chosen.streams:
                row: dict[str, Any] = {"plan": setup.title, "streams": streams} | self.predict(setup, streams)
                try:
                    row |= self.measure(setup, streams)
                except (StartError, OSError, ValueError) as error:
                    row["failed"] = f"{type(error).__name__}: {error}"[:600]
                self.rows.append(row)
                note(f"  {setup.title}, {streams} streams: {row.get('tokens_s') or row.get('failed')}")
                self.write()
        target = gpu_drafts.write_deep(self.folder / "deep.gguf", built_in("tiny"), self.chosen.layers)
        for draft, most in gpu_drafts.DRAFTS:
            row = {"draft": draft, "most": most}
            try:
                row |= self.speculate(target, draft, most)
            except (StartError, OSError, ValueError) as error:
                row["failed"] = f"{type(error).__name__}: {error}"[:600]
            self.drafts.append(row)
            note(f"  draft {draft or 'none'}, at most {most}: {row.get('tokens_s') or row.get('failed')}")
            self.write()

    def predict(self, setup: Setup, streams: int) -> dict[str, Any]:
        """What the chooser says of this setup."""
        plan = next((each for each in self.plans(streams) if each.title == setup.title), None)
        if plan is None:
            return {}
        return {"predicted": plan.tokens_s, "fits": plan.fits, "need_bytes": plan.need_bytes, "why": plan.why}

    def plans(self, streams: int) -> tuple[Plan, ...]:
        """Ranked."""
        config = EngineConfig()
        wish = Wish(streams=streams, slot_tokens=self.chosen.slot_tokens)
        need = need_of(self.info, config, wish.slot_tokens)
        return choose(shape_of(self.info, config), self.machine, wish, need)

    def measure(self, setup: Setup, streams: int) -> dict[str, Any]:
        """Tokens/s of so many streams, dealt out over the servers; the median of the rounds after a first."""
        slots = -(-streams // len(setup.servers))
        config = EngineConfig(
            n_parallel=slots, n_ctx=slots * self.chosen.slot_tokens, split_mode=setup.split_mode, cache_ram_mib=0
        )
        with contextlib.ExitStack() as stack:
            ports = [
                stack.enter_context(self.server(config, self.model, devices, f"{setup.title}-{streams}-{at}"))
                for at, devices in enumerate(setup.servers)
            ]
            with ThreadPoolExecutor(streams) as pool:
                legs = [self.leg(pool, ports, streams) for _ in range(self.chosen.rounds + 1)][1:]
        return {"tokens_s": statistics.median(legs), "legs": legs}

    def leg(self, pool: ThreadPoolExecutor, ports: Sequence[int], streams: int) -> float:
        """All at once, each of `--tokens`: tokens a second by the wall clock, prefill of a short prompt included."""
        began = time.monotonic()
        asked = [
            pool.submit(ask, ports[at % len(ports)], f"{at} {PROMPT}", self.chosen.tokens) for at in range(streams)
        ]
        made = sum(each.result()["tokens_predicted"] for each in asked)
        return float(made) / (time.monotonic() - began)

    def speculate(self, target: Path, draft: str, most: int) -> dict[str, Any]:
        """One stream, greedy; without a draft where it has no name."""
        drafting: dict[str, Any] = {"model_draft": str(built_in(draft)), "draft_max": most} if draft else {}
        config = EngineConfig(n_parallel=1, n_ctx=2048, cache_ram_mib=0, **drafting)
        devices = "0" if self.chosen.gpus else ""
        with self.server(config, target, devices, f"draft-{draft}-{most}") as port:
            return gpu_drafts.measure(port)

    @contextlib.contextmanager
    def server(self, config: EngineConfig, model: Path, devices: str, name: str) -> Iterator[int]:
        """A llama-server that answers; its port."""
        port = free_port()
        program = [self.chosen.server]
        if self.chosen.server == "embedded":
            program = [sys.executable, "-m", "lltm_ray.llamacpp.embedded"]
        args = build_args(
            config,
            model_path=str(model),
            host="127.0.0.1",
            port=port,
            alias="bench",
            api_key_file=None,
            n_gpu_layers=ALL_LAYERS if devices else 0,
        )
        log = self.folder / f"{name.replace(' ', '-')}.log"
        env = {"CUDA_VISIBLE_DEVICES": devices} if devices else {}
        with running([*program, *args], log, env) as process:
            deadline = time.monotonic() + START_S
            while not answers(port):
                if process.process.poll() is not None or time.monotonic() > deadline:
                    raise StartError(f"{name} did not start: {process.tail()}")
                time.sleep(0.1)
            yield port

    def write(self) -> None:
        """What is known now."""
        self.chosen.out.mkdir(parents=True, exist_ok=True)
        results = {
            "model": self.info.name,
            "file_bytes": self.info.file_bytes,
            "gpus": [[gpu.total_bytes, gpu.bytes_s, gpu.flops] for gpu in self.machine.gpus],
            "links": self.links,
            "link_bytes_s": self.machine.link_bytes_s,
            "ranked": {str(each): [plan.title for plan in self.plans(each)] for each in self.chosen.streams},
            "rows": self.rows,
            "speculative": self.drafts,
        }
        (self.chosen.out / "gpu_plans.json").write_text(json.dumps(results, indent=1))
        (self.chosen.out / "gpu_plans.md").write_text(markdown(self.rows, self.drafts))


def built_in(name: str) -> Path:
    """The file of a model that comes with the package."""
    return resolve(name, cache_dir=read_environment().cache_dir, offline=True).path


def ask(port: int, prompt: str, tokens: int) -> dict[str, Any]:
    """One whole answer of that many tokens."""
    body = {"prompt": prompt, "n_predict": tokens, "ignore_eos": True, "temperature": 0, "cache_prompt": False}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/completion", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=ANSWER_S) as answer:
        told: dict[str, Any] = json.load(answer)
    return told


def answers(port: int) -> bool:
    """Whether a server is ready there."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5.0) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def markdown(rows: Sequence[dict[str, Any]], drafts: Sequence[dict[str, Any]]) -> str:
    """Two tables; ratios are to the first plan of the same number of streams."""
    lines = [
        "| streams | plan | tokens/s | predicted | measured ratio | predicted ratio |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        first = next(each for each in rows if each["streams"] == row["streams"])
        shown = [number(row.get(name)) for name in ("tokens_s", "predicted")]
        shown[0] = row.get("failed", shown[0]).replace("|", "/").replace("\n", " ")
        ratios = [ratio(row.get(name), first.get(name)) for name in ("tokens_s", "predicted")]
        lines.append(f"| {row['streams']} | {row['plan']} | {' | '.join([*shown, *ratios])} |")
    return "\n".join([*lines, "", *gpu_drafts.markdown(drafts)]) + "\n"


def number(value: float | None) -> str:
    """With thousands, or a dash."""
    return "-" if value is None else f"{value:,.0f}"


def ratio(value: float | None, base: float | None) -> str:
    """To two digits, or a dash."""
    return f"{value / base:.2f}" if value is not None and base else "-"


def read_shape(text: str) -> RandomShape:
    """`N_EMBD,N_HEAD,N_KV,N_LAYER,N_FF`."""
    n_embd, n_head, n_kv, n_layer, n_ff = map(int, text.split(","))
    return RandomShape(n_embd=n_embd, n_head=n_head, n_head_kv=n_kv, n_layer=n_layer, n_ff=n_ff, n_ctx=32_768)


def main(argv: Sequence[str]) -> int:
    """Run and show; 1 when a setup failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.peers.gpu_plans", description=__doc__)
    parser.add_argument("--server", required=True, help="path of a CUDA llama-server, or `embedded`")
    parser.add_argument("--model", type=Path, help="GGUF (default: a random one)")
    parser.add_argument("--shape", default=SHAPE, help=f"N_EMBD,N_HEAD,N_KV,N_LAYER,N_FF of it (default {SHAPE})")
    parser.add_argument("--gpus", type=int, default=2, help="0: no GPU (default 2)")
    parser.add_argument("--streams", type=lambda text: [int(each) for each in text.split(",")], default=[1, 16])
    parser.add_argument("--tokens", type=int, default=128, help="of each answer (default 128)")
    parser.add_argument("--slot-tokens", type=int, default=1024, help="context of a slot (default 1024)")
    parser.add_argument("--rounds", type=int, default=3, help="after a first that warms up (default 3)")
    parser.add_argument(
        "--layers", type=int, default=gpu_drafts.LAYERS, help=f"of the model that is drafted for ({gpu_drafts.LAYERS})"
    )
    parser.add_argument("--quick", action="store_true", help="tiny settings, to see that it works")
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu_plans.json and gpu_plans.md")
    chosen = parser.parse_args(argv)
    if chosen.quick:
        chosen.shape, chosen.tokens, chosen.rounds, chosen.streams = QUICK_SHAPE, 16, 1, [1, 4]
        chosen.layers = QUICK_LAYERS
    with tempfile.TemporaryDirectory(prefix="gpu-plans-") as folder:
        bench = Bench(chosen, Path(folder))
        bench.play()
    sys.stdout.write((chosen.out / "gpu_plans.md").read_text())
    return int(any("failed" in row for row in (*bench.rows, *bench.drafts)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
