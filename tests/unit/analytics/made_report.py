"""A report as a fleet of four engines might get, put together by hand; its numbers are made up, its shape is not."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from lltm_ray.analytics.answer import Answer, Finding, table
from lltm_ray.analytics.report import Report, Result

START = 1_795_266_000_000_000_000
LENGTH_S = 3600.0
HOSTILE = "<script>alert(1)</script><img src=x onerror='alert(2)'>\"'&lt;]]>--></title>\u2028\x1b[31m\u202eabc"
ANALYSES = (
    *("self time", "critical path", "dependencies", "bottlenecks", "workload classes", "anomalies", "prefixes"),
    *("failures", "interference", "GPU and energy", "queueing", "conversations"),
)


def trace_id(number: int) -> str:
    return f"{number * 0x9E3779B97F4A7C15F39CC0605CEDC835 % 2**128:032x}"


def made_report(*, tenant: str = "batch", engines: int = 4, slots: int = 4, points: int = 60) -> Report:
    """One with five planted faults.

    Args:
        tenant: a name that a client chose.
        engines: how many.
        slots: of each.
        points: of each track.
    """
    made = _Made(tenant, engines, slots, points)
    answers = {name: getattr(made, name.lower().replace(" ", "_"))() for name in ANALYSES}
    found = made.findings()
    results = {
        name: Result(
            analysis=name,
            answer=answer,
            findings=found.get(name, ()),
            engine="pandas",
            reason="asked for",
            rows=152_000,
            ms=20.0 + 7.3 * len(name),
        )
        for name, answer in answers.items()
    }
    timelines = {trace: made.timeline(n) for n, trace in enumerate(dict.fromkeys(made.cited(found)))}
    return Report(
        fleet="prod",
        start_unix_nano=START,
        end_unix_nano=START + int(LENGTH_S * 1e9),
        requests=25_310,
        rows={"requests": 25_310, "attempts": 26_104, "spans": 152_000, "gpus": 7_200},
        engine="pandas",
        reason="cuDF is not usable here: no CUDA-capable device",
        ms=1834.5,
        results=results,
        timelines=timelines,
    )


def empty_report(*, error: str = "") -> Report:
    """One of a window in which nothing happened."""
    results = {
        name: Result(
            analysis=name,
            answer=None if error else Answer({}),
            engine="pandas",
            reason="asked for",
            rows=0,
            ms=0.1,
            error=error,
        )
        for name in ANALYSES
    }
    return Report(
        start_unix_nano=START,
        end_unix_nano=START + 60_000_000_000,
        requests=0,
        rows={},
        engine="pandas",
        reason="asked for",
        ms=1.0,
        results=results,
    )


class _Made:
    def __init__(self, tenant: str, engines: int, slots: int, points: int) -> None:
        self.rng = np.random.default_rng(7)
        self.tenant = tenant
        self.engines = [f"engine-{n}" for n in range(engines)]
        self.slots, self.points = slots, points
        self.gpus = ["GPU-5c1f2e0a-77aa", "GPU-9b3d6f41-02ce"]
        self.tenants = [tenant, "search", "support", "internal"]
        self.slow, self.failing = self.engines[-1], self.engines[1 % engines]

    def at(self, share: float) -> int:
        return START + int(share * LENGTH_S * 1e9)

    def self_time(self) -> Answer:
        spans = ["request", "route", "attempt", "queue", "prefill", "decode"]
        total = np.array([48_900.0, 1_402, 47_100, 6_120, 11_870, 29_110])
        own = np.array([398.0, 1_402, 310, 6_120, 11_870, 29_110])
        told = {
            "span": spans,
            "count": [25_310, 26_104, 26_104, 26_104, 26_104, 25_900],
            "total_s": total,
            "self_s": own,
            "self_share": own / own.sum(),
            "p50_s": total / 31_000,
            "p95_s": total / 9_000,
        }
        calls = [(None, "request"), *(("request", each) for each in spans[1:3]), *(("attempt", e) for e in spans[3:])]
        times = {
            "parent": [one or "" for one, _ in calls],
            "child": [other for _, other in calls],
            "count": told["count"],
            "total_s": total,
            "p95_s": total / 9_000,
        }
        return Answer({"self_time": table(told), "calls": table(times), "timeline": self._timeline()})

    def _timeline(self) -> Any:
        rows = []
        for bucket in range(self.points):
            share = bucket / self.points
            for engine in self.engines:
                if engine == self.failing and 0.62 < share < 0.7:
                    continue
                slow = 1.9 if engine == self.slow and share > 0.4 else 1.0
                p50 = slow * (1.4 + 0.5 * math.sin(share * 7)) * self.rng.lognormal(0, 0.08)
                errors = int(self.rng.poisson(9)) if engine == self.failing and 0.55 < share < 0.62 else 0
                rows.append(
                    (
                        share * LENGTH_S,
                        self.at(share),
                        engine,
                        int(self.rng.poisson(100)),
                        errors,
                        p50,
                        p50 * 2.6,
                        p50 * 0.6,
                        21_000.0,
                    )
                )
        names = ("at_s", "at_unix_nano", "engine", "requests", "errors", "p50_s", "p95_s", "ttft_p95_s", "generated")
        return table(dict(zip(names, zip(*rows, strict=True), strict=True)))

    def critical_path(self) -> Answer:
        phases = ["route", "queue", "prefill", "decode", "request"]
        seconds = np.array([1_402.0, 5_980, 11_640, 28_820, 402])
        told = {
            "phase": phases,
            "seconds": seconds,
            "share": seconds / seconds.sum(),
            "p50_s": seconds / 25_310 * 0.8,
            "p95_s": seconds / 25_310 * 2.9,
            "requests": [25_310] * 5,
        }
        pairs = [
            (e, p, 300.0 * (n + 1) * (2 if e == self.slow else 1))
            for e in self.engines
            for n, p in enumerate(phases[1:4])
        ]
        by_engine = dict(zip(("engine", "phase", "seconds"), zip(*pairs, strict=True), strict=True))
        slack = {"phase": phases, "p50_s": [0.0] * 5, "p95_s": [0.1, 0.4, 0.2, 0.0, 0.0]}
        return Answer({"phases": table(told), "engines": table(by_engine), "slack": table(slack)})

    def _edges(self) -> list[tuple[str, str, str, str]]:
        """Source, its kind, target, its kind."""
        found = [("client", "client", "gateway-0", "gateway"), ("client", "client", "gateway-1", "gateway")]
        for number, engine in enumerate(self.engines):
            found += [(f"gateway-{each}", "gateway", engine, "engine") for each in range(2)]
            for slot in range(self.slots):
                name = f"{engine}/{slot}"
                found += [(engine, "engine", name, "slot"), (name, "slot", self.gpus[number % 2], "gpu")]
        return found

    def dependencies(self) -> Answer:
        pairs = self._edges()
        kinds = {name: kind for one in pairs for name, kind in (one[:2], one[2:])}
        seconds = [float(self.rng.lognormal(6, 0.7)) for _ in pairs]
        bad = [0.09 if self.failing in (source, target) else 0.0 for source, _, target, _ in pairs]
        edges = {
            "source": [p[0] for p in pairs],
            "target": [p[2] for p in pairs],
            "calls": [900] * len(pairs),
            "errors": [int(900 * each) for each in bad],
            "error_ratio": bad,
            "p50_s": [1.2] * len(pairs),
            "p95_s": [3.9] * len(pairs),
            "seconds": seconds,
        }
        nodes = {
            "node": list(kinds),
            "kind": list(kinds.values()),
            "requests": [900] * len(kinds),
            "errors": [81 if name == self.failing else 0 for name in kinds],
        }
        return Answer({"nodes": table(nodes), "edges": table(edges)})

    def bottlenecks(self) -> Answer:
        names = {name: kind for one in self._edges() for name, kind in (one[:2], one[2:])}
        weight = np.sort(self.rng.dirichlet(np.full(len(names), 0.6)))[::-1]
        nodes = {
            "node": list(names),
            "kind": list(names.values()),
            "critical_s": weight * 48_000,
            "critical_share": weight,
            "pagerank": weight[::-1] * 0.7,
            "betweenness": weight * 0.9,
        }
        pairs = self._edges()
        edges = {
            "source": [p[0] for p in pairs],
            "target": [p[2] for p in pairs],
            "score": [0.1] * len(pairs),
            "critical_s": [40.0] * len(pairs),
        }
        return Answer({"nodes": table(nodes), "edges": table(edges)})

    def workload_classes(self) -> Answer:
        told = {
            "name": ["short chat", "long documents", "agents with tools", "embeddings of pages", "summaries"],
            "requests": [11_200, 2_900, 6_100, 3_000, 2_110],
            "share": [0.44, 0.12, 0.24, 0.12, 0.08],
            "prompt_p50": [310.0, 14_200, 5_900, 800, 7_400],
            "cached_share": [0.62, 0.08, 0.88, 0.0, 0.21],
            "generated_p50": [180.0, 420, 95, 0, 260],
            "ttft_p50_s": [0.21, 4.8, 0.4, 0.3, 2.4],
            "p50_s": [2.4, 9.6, 1.7, 0.3, 5.6],
            "p95_s": [5.2, 22.0, 4.1, 0.8, 11.0],
            "tenants": [self.tenants[2], self.tenant, self.tenants[3], "search", "search, support"],
            "engines": [4] * 5,
        }
        return Answer({"classes": table(told)}, {"modularity": 0.61})

    def anomalies(self) -> Answer:
        decode = [11.4 + 0.4 * n for n in range(len(self.engines) - 1)] + [21.0]
        ratio = [each / 11.7 for each in decode]
        engines = {
            "engine": self.engines,
            "model": ["llama-8b"] * len(decode),
            "requests": [6_300] * len(decode),
            "decode_ms_token": decode,
            "peers_ms_token": [11.7] * len(decode),
            "ratio": ratio,
            "z": [(each - 1) * 9 for each in ratio],
            "residual_ratio": ratio,
            "since_unix_nano": [0] * (len(decode) - 1) + [self.at(0.4)],
            "lost_s": [0.0] * (len(decode) - 1) + [4_210.0],
            "evidence": [()] * (len(decode) - 1) + [tuple(trace_id(n) for n in range(1, 4))],
        }
        expected = self.rng.lognormal(0.8, 0.5, 20)
        requests = {
            "trace_id": [trace_id(n) for n in range(1, 21)],
            "request_id": [f"req-{n:04x}" for n in range(1, 21)],
            "engine": [self.slow if n % 3 else self.engines[0] for n in range(20)],
            "seconds": expected * self.rng.lognormal(1.2, 0.3, 20),
            "expected_s": expected,
            "z": [9.0] * 20,
            "why": ["decode slower than its peers"] * 20,
        }
        model = {
            "term": ["a token to prefill", "a token to decode", "a busy slot"],
            "seconds_per_unit": [0.00031, 0.0117, 0.11],
        }
        return Answer({"engines": table(engines), "requests": table(requests), "model": table(model)})

    def prefixes(self) -> Answer:
        names = [f"{n * 0x9E3779B1 % 2**32:08x}" for n in range(1, 15)]
        parents = [-1, 0, 0, 0, 1, 1, 2, 4, -1, 8, 8, 9, -1, 12]
        depth: list[int] = []
        for parent in parents:
            depth.append(128 if parent < 0 else depth[parent] * 2 + 64)
        requests = [9_000 // (1 + each // 128) + 40 * n for n, each in enumerate(depth)]
        prompt = np.array(requests) * np.array(depth) * 1.6
        wasted = prompt * np.array([0.02, 0.03, 0.5, 0.05, 0.02, 0.0, 0.34, 0.1, 0.01, 0.2, 0.0, 0.03, 0.04, 0.02])
        families = {
            "family": names,
            "depth_tokens": depth,
            "requests": requests,
            "prompt_tokens": prompt,
            "shared_tokens": prompt * 0.7,
            "cached_tokens": prompt * 0.6,
            "reusable_tokens": prompt * 0.6 + wasted,
            "wasted_tokens": wasted,
            "wasted_s": wasted * 0.0003,
            "best_engine": [self.engines[0]] * 14,
            "engines": [3] * 14,
            "evidence": [()] * 14,
        }
        linked = [
            (names[parent], name, n) for name, parent, n in zip(names, parents, requests, strict=True) if parent >= 0
        ]
        links = dict(zip(("parent", "child", "requests"), zip(*linked, strict=True), strict=True))
        figures = {
            "reusable_ratio": 0.71,
            "reused_ratio": 0.58,
            "wasted_tokens": float(wasted.sum()),
            "wasted_s": 812.0,
        }
        return Answer({"families": table(families), "links": table(links)}, figures)

    def failures(self) -> Answer:
        origins = {
            "span": ["attempt", "attempt", "request"],
            "engine": [self.failing, self.failing, ""],
            "error": ["upstream lost", "timeout", f"bad request of {self.tenant}"],
            "errors": [312, 40, 12],
            "requests": [300, 40, 12],
            "failed_requests": [22, 9, 12],
            "lost_s": [402.0, 120.0, 0.0],
            "first_unix_nano": [self.at(0.55)] * 3,
            "last_unix_nano": [self.at(0.62)] * 3,
            "evidence": [(trace_id(31), trace_id(32)), (), ()],
        }
        ratio = [0.053 if each == self.failing else 0.0 for each in self.engines]
        engines = {
            "engine": self.engines,
            "attempts": [6_500] * len(ratio),
            "failed": [int(6_500 * r) for r in ratio],
            "ratio": ratio,
        }
        return Answer({"origins": table(origins), "engines": table(engines)}, {"error_ratio": 0.0017})

    def interference(self) -> Answer:
        share = [0.19, 0.07, 0.03, 0.05, *[0.02] * len(self.engines)][: len(self.engines)]
        engines = {
            "engine": self.engines,
            "gpu": [self.gpus[n % 2] for n in range(len(share))],
            "stalled_s": [each * 7_200 for each in share],
            "decode_s": [7_200.0] * len(share),
            "share": share,
        }
        aggressors = {
            "trace_id": [trace_id(n) for n in range(41, 53)],
            "request_id": [f"req-{n:04x}" for n in range(41, 53)],
            "tenant": [self.tenant] * 8 + self.tenants[1:] + [self.tenant],
            "engine": [self.engines[n % min(3, len(self.engines))] for n in range(12)],
            "prefill_tokens": [14_000 - 900 * n for n in range(12)],
            "prefill_s": [4.9 - 0.3 * n for n in range(12)],
            "victims": [3] * 12,
            "stalled_s": [14.1 - 0.9 * n for n in range(12)],
            "evidence": [()] * 12,
        }
        tenants = {
            "tenant": self.tenants,
            "stalled_s": [2_010.0, 160.0, 90.0, 20.0],
            "requests": [900, 9_000, 8_000, 7_400],
        }
        return Answer({"engines": table(engines), "aggressors": table(aggressors), "tenants": table(tenants)})

    def gpu_and_energy(self) -> Answer:
        slowed = [0.0, 612.0]
        gpus = {
            "gpu": self.gpus,
            "node": ["node-a", "node-a"],
            "engines": [2, 2],
            "joules": [1.9e6, 2.3e6],
            "generated": [1.31e6, 1.11e6],
            "joules_per_token": [1.9 / 1.31, 2.3 / 1.11],
            "utilization_prefill": [0.93, 0.95],
            "utilization_decode": [0.71, 0.77],
            "throttled_s": slowed,
            "throttled_share": [each / LENGTH_S for each in slowed],
            "reasons": ["", "power cap"],
            "slowed_ratio": [math.nan, 1.42],
            "lost_s": [0.0, 240.0],
            "evidence": [(), (trace_id(1),)],
        }
        rows = []
        for number, gpu in enumerate(self.gpus):
            for point in range(self.points):
                share = point / self.points
                hot = number == 1 and 0.4 < share < 0.57
                busy = min(0.6 + 0.25 * math.sin(share * 9 + number) + self.rng.normal(0, 0.04), 1.0)
                rows.append(
                    (
                        share * LENGTH_S,
                        self.at(share),
                        gpu,
                        280 + 380 * busy,
                        busy,
                        46 + 30 * busy + 9 * hot,
                        61e9 + 4e9 * share,
                        4 if hot else 0,
                        900 * busy * (0.6 if hot else 1.0),
                    )
                )
        names = (
            "at_s",
            "at_unix_nano",
            "gpu",
            "power_w",
            "utilization",
            "temperature_c",
            "memory_used_bytes",
            "throttle",
            "tokens_per_s",
        )
        track = dict(zip(names, zip(*rows, strict=True), strict=True))
        return Answer({"gpus": table(gpus), "track": table(track)})

    def queueing(self) -> Answer:
        use = [0.58, 0.61, 0.55, 0.86, *[0.5] * len(self.engines)][: len(self.engines)]
        engines = {
            "engine": self.engines,
            "model": ["llama-8b"] * len(use),
            "slots": [4] * len(use),
            "arrivals_per_s": [1.75] * len(use),
            "service_s": [each * 4 / 1.75 for each in use],
            "utilization": use,
            "in_system": [each * 4.3 for each in use],
            "little_in_system": [each * 4.3 for each in use],
            "little_error": [0.01] * len(use),
            "wait_s": [each**6 for each in use],
            "expected_wait_s": [each**6.3 for each in use],
        }
        models = {
            "model": ["llama-8b", "qwen-32b"],
            "slots": [16, 4],
            "arrivals_per_s": [6.1, 0.2],
            "busiest_per_s": [7.03, 0.4],
            "busiest_low_per_s": [5.9, 0.31],
            "busiest_high_per_s": [8.2, 0.47],
            "busiest_s": [14.2, 250.0],
            "busiest_wait_s": [0.12, 0.01],
            "service_s": [0.2, 3.5],
            "requests": [21_960, 720],
            "capacity_per_s": [10.6, 1.1],
            "utilization": [0.66, 0.36],
            "knee_per_s": [8.5, 0.9],
            "knee_low_per_s": [7.9, 0.8],
            "knee_high_per_s": [9.1, 1.0],
            "seen_per_s": [6.4, 0.3],
            "headroom_ratio": [0.21, 1.25],
            "headroom_low_ratio": [0.04, 0.9],
            "headroom_high_ratio": [0.44, 1.9],
            "wait_p95_s": [0.61, 0.02],
            "rejected": [0, 0],
        }
        return Answer({"engines": table(engines), "models": table(models)})

    def conversations(self) -> Answer:
        told = {
            "conversation": [f"c{n:06x}" for n in range(77, 87)],
            "turns": list(range(24, 14, -1)),
            "moves": [9, 8, 8, 7, 5, 5, 4, 2, 1, 1],
            "lost_tokens": [41_000 - 3_900 * n for n in range(10)],
            "lost_s": [12.0 - n for n in range(10)],
            "evidence": [()] * 10,
        }
        pairs = [(one, other) for one in self.engines for other in self.engines if one != other]
        moves = {
            "from_engine": [one for one, _ in pairs],
            "to_engine": [other for _, other in pairs],
            "turns": [int(self.rng.poisson(24)) for _ in pairs],
            "lost_tokens": [30_000] * len(pairs),
            "lost_s": [9.0] * len(pairs),
        }
        figures = {"turns": 9_100.0, "moved_ratio": 0.09, "lost_tokens": 3.1e5, "lost_s": 96.0}
        return Answer({"conversations": table(told), "moves": table(moves)}, figures)

    def findings(self) -> dict[str, tuple[Finding, ...]]:
        slow, share = self.slow, "request-seconds"
        return {
            "anomalies": (
                Finding(
                    kind="straggler",
                    subject=slow,
                    impact_s=4_210.0,
                    evidence=tuple(trace_id(n) for n in range(1, 6)),
                    text=f"{slow} decodes 1.8x slower than its peers (21 ms a token against 11.7) since 13:24:00.",
                    advice=f"Drain it with `lltm-ray drain {slow}` and look at its GPU.",
                    figures={"ratio": 1.79, "decode_ms_token": 21.0, "peers_ms_token": 11.7, "z": 7.2},
                ),
            ),
            "interference": (
                Finding(
                    kind="interference",
                    subject=self.tenant,
                    impact_s=2_010.0,
                    evidence=(trace_id(41), trace_id(42)),
                    text=f"Long prefills of {self.tenant} held up others' decoding for 33 minutes of {share}.",
                    advice="Set `n_ubatch = 256` on the engines, so that a prefill lets others decode in between.",
                    figures={"stalled_s": 2_010.0, "victims": 3},
                ),
            ),
            "prefixes": (
                Finding(
                    kind="wasted prefill",
                    subject="3c6ef362",
                    impact_s=812.0,
                    evidence=(trace_id(21),),
                    text="Family 3c6ef362 (320 shared tokens) was prefilled on 3 engines; half was held.",
                    advice='Use `gateway.policy = "residency"`.',
                    figures={"wasted_share": 0.5},
                ),
            ),
            "failures": (
                Finding(
                    kind="error cascade",
                    subject=self.failing,
                    impact_s=522.0,
                    evidence=(trace_id(31), trace_id(32)),
                    text=f"352 attempts failed on {self.failing} from 13:33:00 to 13:37:12; 31 requests failed for it.",
                    advice=f"Drain it with `lltm-ray drain {self.failing}` and read its log.",
                    figures={"failed_requests": 31, "errors": 352},
                ),
            ),
            "GPU and energy": (
                Finding(
                    kind="throttled GPU",
                    subject=self.gpus[1],
                    impact_s=240.0,
                    evidence=(trace_id(1),),
                    text=f"{self.gpus[1]} ran into its power cap for 10 min 12 s; its engines decoded 1.4x slower.",
                    advice="Raise its power limit (nvidia-smi -pl) or move an engine to another GPU.",
                    figures={"throttled_share": 0.17, "slowed_ratio": 1.42},
                ),
            ),
        }

    def cited(self, found: dict[str, tuple[Finding, ...]]) -> list[str]:
        return [trace for findings in found.values() for each in findings for trace in each.evidence]

    def timeline(self, number: int) -> Any:
        queue, prefill = 0.1 + 0.05 * number, 0.6 + 0.2 * number
        total, engine = 5.2 + 0.4 * number, self.slow if number < 5 else self.failing
        is_retried = number == 8
        spans = [("request", 0, 0.0, total, "", ""), ("route", 1, 0.0, 0.01, "", "")]
        start = 0.01
        if is_retried:
            spans += [("attempt", 1, start, 0.9, engine, "upstream lost"), ("route", 1, 0.9, 0.94, "", "")]
            start = 0.94
        spans += [
            ("attempt", 1, start, total, engine, ""),
            ("queue", 2, start, start + queue, engine, ""),
            ("prefill", 2, start + queue, start + queue + prefill, engine, ""),
            ("decode", 2, start + queue + prefill, total, engine, ""),
        ]
        names = ("span", "depth", "start_s", "end_s", "engine", "error")
        return table(dict(zip(names, zip(*spans, strict=True), strict=True)))
