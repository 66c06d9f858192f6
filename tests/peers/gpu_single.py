"""One engine on one GPU with every slot busy: what the gateway takes from its speed."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import statistics
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from .engines import Server
from .figures import Row, percentiles
from .gpu_fleet import router, servers
from .gpu_run import CHAT, Run, filler
from .processes import cpu_s, running


def single(run: Run) -> None:
    """Direct and through the gateway in turns: rows `direct` and `gateway`, one for each leg."""
    scale = run.scale
    config = run.host.config(scale.streams, max(512, 2 * sum(scale.ask_tokens)), 0)
    folder = run.folder / "single"
    with servers(run.host, config, 1, folder) as behind, router("residency", run.host, config, behind, folder) as front:
        server = behind[0]
        rng = random.Random(f"single {run.seed}")
        ways = {"direct": int(server.url.rpartition(":")[2]), "gateway": front.port}
        for port in ways.values():
            _leg(run, port, server, rng, scale.warm_up)
        for _ in range(scale.pairs):
            for name, port in ways.items():
                spent = cpu_s(front.process.pid)
                row = _leg(run, port, server, rng, scale.requests)
                spent = cpu_s(front.process.pid) - spent
                row["gateway_us_per_token"] = spent / row["output_tokens"] * 1e6 if row["output_tokens"] else None
                row["gateway_busy"] = spent / row["wall_s"] if row["wall_s"] else None
                run.save(name, row)


def _leg(run: Run, port: int, server: Server, rng: random.Random, count: int) -> Row:
    """So many requests from all clients at once."""
    prompt, output = run.scale.ask_tokens
    bodies = [_body(filler(rng, server, prompt), output) for _ in range(count)]
    clients = run.scale.clients
    with contextlib.ExitStack() as stack:
        players = []
        for number in range(clients):
            job = run.folder / f"job-{number}.json"
            mine = {"port": port, "bodies": bodies[number::clients], "streams": run.scale.streams // clients}
            job.write_text(json.dumps(mine))
            argv = [sys.executable, "-m", "tests.peers.gpu_load", str(job)]
            players.append(stack.enter_context(running(argv, job.with_suffix(".log"), talks=True)))
        for player in players:
            player.first_line()  # ready
        for player in players:
            assert player.process.stdin is not None
            player.process.stdin.write("go\n")
            player.process.stdin.flush()
        stack.enter_context(_cut(run.left_s, [player.pid for player in players]))
        answers = [answer for player in players for answer in json.loads(player.first_line())]
    return _single_row(answers, output)


@contextlib.contextmanager
def _cut(after_s: float, pids: Sequence[int]) -> Iterator[None]:
    """Kill these processes if it takes longer, so that nobody waits for their word."""
    loop = signal.getsignal(signal.SIGALRM)

    def kill(*_: object) -> None:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    signal.signal(signal.SIGALRM, kill)
    signal.setitimer(signal.ITIMER_REAL, after_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, loop)


def _body(text: str, tokens: int) -> dict[str, Any]:
    return {
        "model": "bench",
        "messages": [{"role": "user", "content": text}],
        "max_tokens": tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
        **CHAT,
    }


def _single_row(answers: list[dict[str, Any]], wanted: int) -> Row:
    good = [each for each in answers if not each["error"]]
    wall_s = max(each["ended_s"] for each in answers) - min(each["sent_s"] for each in answers)
    tokens = sum(each["output_tokens"] for each in good)
    return {
        "requests": len(answers),
        "ok": len(good),
        "errors": sorted({each["error"] for each in answers if each["error"]})[:3],
        "wrong_length": sum(each["output_tokens"] != wanted for each in good),
        "tokens_per_s": tokens / wall_s,
        "output_tokens": tokens,
        "events": sum(each["events"] for each in good),
        "mean_prompt_tokens": statistics.fmean(each["prompt_tokens"] for each in good) if good else None,
        "ttft_ms": percentiles(each["first_s"] - each["sent_s"] for each in good if each["first_s"]),
        "wall_s": wall_s,
    }
