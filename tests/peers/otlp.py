"""One run of mixed requests, exported at once by gRPC and by HTTP to two collectors, and every span compared.

`python -m tests.peers.otlp [--requests 500] [--mockotlpserver PATH]`. A fleet on Ray serves two engines for text, one
for embeddings, one for reranking, and one of two slots; its telemetry goes to @elastic/mockotlpserver and to
`tests/otlp_sink.py`. Prints a table; exit 1 where something is amiss.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import statistics
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import lltm_ray
from lltm_ray.config import EngineConfig, FleetConfig, GatewayConfig, ModelConfig, TelemetryConfig
from lltm_ray.telemetry import semconv as names
from lltm_ray.telemetry.context import new_span_id, new_trace_id

from .receivers import Receiver, Seen, receivers

SERVER, CLIENT = 2, 3
GAP_S = 0.002
"""What phases and their sums may be apart."""


@dataclass
class Sent:
    """One request as its client saw it."""

    kind: str
    path: str
    body: bytes
    id: str
    trace_id: str
    parent: str
    stop_after: int = 0
    """Events after which the client leaves; 0: it stays."""
    status: int = 0
    events: int = 0
    usage: tuple[int, int] | None = None
    """Tokens of prompt and answer, where the answer told them."""


def chat(**more: Any) -> bytes:
    """A prompt of its own and a few tokens."""
    words = " ".join(random.choice(["river", "stone", "cloud", "ember", "violet", "north"]) for _ in range(12))
    body = {"model": "text", "messages": [{"role": "user", "content": words}], "max_tokens": 12, "temperature": 0.5}
    return json.dumps(body | more).encode()


CHAT = "/v1/chat/completions"
LONG = "too long"
KINDS: Mapping[str, tuple[int, str, Callable[[], bytes], int]] = {
    "chat, whole": (150, CHAT, chat, 0),
    "chat, streamed": (110, CHAT, lambda: chat(stream=True, stream_options={"include_usage": True}), 0),
    "chat, left": (50, CHAT, lambda: chat(stream=True, max_tokens=2000, ignore_eos=True), 4),
    "/completion": (30, "/completion", lambda: b'{"model":"text","prompt":"Once upon","n_predict":9}', 0),
    "/v1/completions": (
        30,
        "/v1/completions",
        lambda: b'{"model":"text","prompt":"A tale of","max_tokens":9,"stream":true}',
        0,
    ),
    "/v1/messages": (
        20,
        "/v1/messages",
        lambda: b'{"model":"text","messages":[{"role":"user","content":"hi"}],"max_tokens":8}',
        0,
    ),
    "embeddings": (40, "/v1/embeddings", lambda: b'{"model":"embed","input":["one","two words"]}', 0),
    "rerank": (20, "/v1/rerank", lambda: b'{"model":"rank","query":"q","documents":["one","two","three"]}', 0),
    "bad body": (15, CHAT, lambda: b'{"model":"text","messages":"none"}', 0),
    "no JSON": (10, CHAT, lambda: b'{"model":', 0),
    "unknown model": (15, CHAT, lambda: chat(model="nobody"), 0),
    LONG: (10, CHAT, lambda: chat(messages=[{"role": "user", "content": "long " * 60_000}]), 0),
}
"""Kind -> its share of 500, route, body, events after which the client leaves."""


def plan(requests: int) -> list[Sent]:
    """So many, mixed."""
    random.seed(1)
    kinds = [kind for kind, (share, *_) in KINDS.items() for _ in range(max(1, round(share * requests / 500)))]
    random.shuffle(kinds)
    made = []
    for number, kind in enumerate(kinds[:requests]):
        _, path, body, stop_after = KINDS[kind]
        made.append(Sent(kind, path, body(), f"otlp-{number}", new_trace_id(), new_span_id(), stop_after))
    return made


def send(url: str, sent: Sent) -> None:
    """Send one and read its answer, or leave."""
    place = urlsplit(url)
    connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=120)
    headers = {
        "content-type": "application/json",
        "x-request-id": sent.id,
        "traceparent": f"00-{sent.trace_id}-{sent.parent}-03",
    }
    try:
        connection.request("POST", sent.path, sent.body, headers)
        answer = connection.getresponse()
        sent.status = answer.status
        if "event-stream" in (answer.getheader("content-type") or ""):
            _read_events(answer, sent)
        else:
            sent.usage = _usage(json.loads(answer.read()))
    finally:
        connection.close()


def _read_events(answer: http.client.HTTPResponse, sent: Sent) -> None:
    for line in answer:
        if not line.startswith(b"data: {"):
            continue
        sent.events += 1
        sent.usage = _usage(json.loads(line[6:])) or sent.usage
        if sent.stop_after and sent.events >= sent.stop_after:
            return


def _usage(told: dict[str, Any]) -> tuple[int, int] | None:
    usage = told.get("usage") or {}
    prompt = usage.get("prompt_tokens", usage.get("input_tokens"))
    if prompt is None:
        return (told["tokens_evaluated"], told["tokens_predicted"]) if told.get("stop") is True else None
    cached = usage.get("cache_read_input_tokens", 0)  # Anthropic's input tokens are without them
    return prompt + cached, usage.get("completion_tokens", usage.get("output_tokens", 0))


def fleet(exporters: tuple[str, ...]) -> FleetConfig:
    """Two engines for text, one of two slots, one that embeds, one that ranks."""
    models = (
        ModelConfig(model="random", served_name="text", engines=2),
        ModelConfig(model="random", served_name="narrow", engine=EngineConfig(n_parallel=2)),
        ModelConfig(model="random", served_name="embed", engine=EngineConfig(embeddings=True, pooling="mean")),
        ModelConfig(model="random", served_name="rank", engine=EngineConfig(reranking=True, pooling="rank")),
    )
    return FleetConfig(
        models=models,
        name="otlp",
        gpu_share=0.0,
        cpu_share=0.1,
        gateway=GatewayConfig(port=0),
        telemetry=TelemetryConfig(exporters=exporters),
        drain_timeout_s=1.0,
    )


@dataclass
class Findings:
    """What was looked at."""

    rows: list[tuple[bool, str, str]] = field(default_factory=list)

    def add(self, what: str, misses: Sequence[Any], seen: str) -> None:
        """One line; misses make it a failure."""
        self.rows.append((not misses, what, f"{seen}; e.g. {misses[:3]}" if misses else seen))

    def show(self) -> bool:
        """Print the table; whether all held."""
        for held, what, seen in self.rows:
            print(f"{'ok  ' if held else 'MISS'}  {what:58} {seen}")
        return all(held for held, _, _ in self.rows)


class Run:
    """Spans of one run, by request."""

    def __init__(self, spans: Sequence[Seen], sent: Sequence[Sent]) -> None:
        self.sent = sent
        self.children = defaultdict(list)
        self.servers = defaultdict(list)
        for span in spans:
            self.children[span.parent_span_id].append(span)
            if span.kind == SERVER:
                self.servers[span.attributes[names.REQUEST_ID]].append(span)

    def server(self, sent: Sent) -> Seen:
        """Its SERVER span."""
        return self.servers[sent.id][0]

    def check(self, into: Findings) -> None:
        """One SERVER span each, its caller's child, with the tokens that the client was told and a whole tree below."""
        wrong = [(each.kind, len(self.servers[each.id])) for each in self.sent if len(self.servers[each.id]) != 1]
        into.add("every request has exactly one SERVER span", wrong, f"{len(self.sent)} requests")
        known = [each for each in self.sent if len(self.servers[each.id]) == 1]
        lost = [each.kind for each in known if self._ids(each) != (each.trace_id, each.parent)]
        into.add("it is in its caller's trace, the caller's child", lost, f"{len(known)} with traceparent")
        self._check_tokens(known, into)
        self._check_errors(known, into)
        self._check_phases(known, into)

    def _ids(self, sent: Sent) -> tuple[str, str]:
        span = self.server(sent)
        return span.trace_id, span.parent_span_id

    def _check_tokens(self, known: Sequence[Sent], into: Findings) -> None:
        told = [(each, self._tokens(each)) for each in known if each.usage is not None and not each.stop_after]
        wrong = [(each.kind, each.usage, seen) for each, seen in told if each.usage != seen]
        into.add("tokens are those that the client was told", wrong, f"{len(told)} answers with usage")
        left = [(each, self._tokens(each)) for each in known if each.stop_after and each.status == 200]
        short = [(each.events, seen) for each, seen in left if not each.events - 1 <= seen[1] < 2000]
        into.add("a client that left: at least what it had seen", short, f"{len(left)} answers")

    def _tokens(self, sent: Sent) -> tuple[int, int]:
        told = self.server(sent).attributes
        return told.get(names.USAGE_INPUT_TOKENS, 0), told.get(names.USAGE_OUTPUT_TOKENS, 0)

    def _check_errors(self, known: Sequence[Sent], into: Findings) -> None:
        kinds: dict[str, Counter[str]] = defaultdict(Counter)
        wrong = []
        for each in known:
            span = self.server(each)
            kinds[each.kind][str(span.attributes.get(names.ERROR_TYPE, "ok"))] += 1
            if span.is_error != (each.status >= 400 or bool(each.stop_after)):
                wrong.append((each.kind, each.status, span.attributes.get(names.ERROR_TYPE)))
        into.add("errors are spans in error, others are not", wrong, "")
        for kind, counts in sorted(kinds.items()):
            into.add(f"  {kind}", [], ", ".join(f"{count} {name}" for name, count in counts.items()))

    def _check_phases(self, known: Sequence[Sent], into: Findings) -> None:
        """Of a CLIENT span queue, prefill and decode; of a SERVER span route, CLIENT and the gateway's own time."""
        inside, around = [], defaultdict(list)
        for each in known:
            server = self.server(each)
            own = self.children[server.span_id]
            clients = [span for span in own if span.kind == CLIENT]
            for client in clients:
                phases = self.children[client.span_id]
                if phases:
                    inside.append(abs(client.took_s - sum(span.took_s for span in phases)))
            if clients:
                own_s = server.attributes[names.TIME_IN_GATEWAY]
                around[each.kind].append(abs(server.took_s - own_s - sum(span.took_s for span in own)))
        into.add("queue + prefill + decode = the attempt", [gap for gap in inside if gap > GAP_S], _gaps(inside))
        for kind, gaps in sorted(around.items()):
            misses = [gap for gap in gaps if gap > GAP_S]
            into.add(f"route + attempts + gateway = the request: {kind}", misses, _gaps(gaps))


def _gaps(gaps: Sequence[float]) -> str:
    if not gaps:
        return "none"
    ordered = sorted(gap * 1e3 for gap in gaps)
    p99 = ordered[len(ordered) * 99 // 100]
    return f"{len(gaps)}: p50 {statistics.median(ordered):.3f}, p99 {p99:.3f}, most {ordered[-1]:.3f} ms apart"


def compare(found: Mapping[str, Sequence[Seen]], into: Findings) -> None:
    """The same spans everywhere: ids, parents, names, times, tokens."""
    tables = {name: {span.span_id: span for span in spans} for name, spans in found.items()}
    first, *others = tables
    into.add(
        "span ids are unique", [n for n, t in tables.items() if len(t) != len(found[n])], f"{len(tables[first])} spans"
    )
    for name in others:
        differ = [
            (span_id, field_name)
            for span_id in tables[first].keys() | tables[name].keys()
            for field_name in _difference(tables[first].get(span_id), tables[name].get(span_id))
        ]
        into.add(f"the same spans in {first} and {name}", differ, f"{len(tables[name])} spans")


def _difference(one: Seen | None, other: Seen | None) -> list[str]:
    if one is None or other is None:
        return ["missing"]
    fields = ("trace_id", "parent_span_id", "name", "kind", "start_unix_nano", "end_unix_nano", "is_error")
    tokens = [name for name in one.attributes.keys() | other.attributes.keys() if "token" in name]
    differ = [name for name in fields if getattr(one, name) != getattr(other, name)]
    return differ + [name for name in tokens if one.attributes.get(name) != other.attributes.get(name)]


def check_queue(run: Run, into: Findings) -> None:
    """Five requests at once on two slots: two wait for nothing, each other one until a slot is free."""
    servers = sorted((run.server(each) for each in run.sent), key=_started)
    waits = [span.attributes[names.LATENCY_QUEUE] for span in servers]
    ends = sorted(span.end_unix_nano for span in servers)
    noise_s = 0.1 * statistics.mean(span.took_s - wait for span, wait in zip(servers, waits, strict=True))
    lags = [(_started(span) - end) / 1e9 for span, end in zip(servers[2:], ends, strict=False)]
    told = ", ".join(f"{wait:.2f}" for wait in waits)
    into.add("5 on 2 slots: two do not wait", [wait for wait in waits[:2] if wait > noise_s], f"{told} s")
    shown = ", ".join(f"{lag * 1e3:.0f}" for lag in lags)
    into.add(
        "5 on 2 slots: three wait until a slot is free",
        [lag for lag in lags if abs(lag) > noise_s],
        f"{shown} ms after",
    )


def _started(span: Seen) -> int:
    """When its slot began."""
    waited_s: float = span.attributes[names.LATENCY_QUEUE]
    return span.start_unix_nano + round(waited_s * 1e9)


def narrow() -> list[Sent]:
    """Five long answers."""
    body = {"model": "narrow", "max_tokens": 2000, "ignore_eos": True, "stream": True}
    return [
        Sent("narrow", CHAT, chat(**body), f"narrow-{number}", new_trace_id(), new_span_id()) for number in range(5)
    ]


def play(url: str, sent: Sequence[Sent], at_once: int) -> None:
    """All of them."""
    with ThreadPoolExecutor(at_once) as pool:
        list(pool.map(lambda each: send(url, each), sent))


def wait_for(collectors: Sequence[Receiver], requests: int, timeout_s: float = 60.0) -> dict[str, list[Seen]]:
    """Until each has so many SERVER spans and nothing more comes; what they have."""
    deadline, before = time.monotonic() + timeout_s, -1
    while time.monotonic() < deadline:
        found = {each.name: each.spans() for each in collectors}
        total = sum(map(len, found.values()))
        if total == before and all(sum(s.kind == SERVER for s in spans) >= requests for spans in found.values()):
            break
        before = total
        time.sleep(2.0)
    return found


def main() -> int:
    """0: all held."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--mockotlpserver", metavar="PATH", help="its program; else PATH's, else npm installs it")
    chosen = parser.parse_args()
    mixed, queued, findings = plan(chosen.requests), narrow(), Findings()
    with tempfile.TemporaryDirectory() as name, receivers(Path(name), chosen.mockotlpserver) as collectors:
        config = fleet(tuple(each.exporter for each in collectors))
        with lltm_ray.Cluster.start(config) as cluster:
            url = cluster.endpoint
            send(url, Sent("warm", CHAT, chat(model="narrow"), "warm", new_trace_id(), new_span_id()))
            play(url, queued, 5)
            began = time.monotonic()
            play(url, mixed, 8)
            print(
                f"{len(mixed)} requests in {time.monotonic() - began:.1f} s: {Counter(each.status for each in mixed)}"
            )
            found = wait_for(collectors, len(mixed) + len(queued) + 1)
    compare(found, findings)
    spans = found[collectors[0].name]
    Run(spans, mixed).check(findings)
    check_queue(Run(spans, queued), findings)
    return 0 if findings.show() else 1


if __name__ == "__main__":
    sys.exit(main())
