from __future__ import annotations

import json
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

import pandas as pd
import pyarrow as pa
import pytest

from lltm_ray._prefix import hash_prefixes
from lltm_ray.analytics import graph as dependencies
from lltm_ray.analytics import prefix
from lltm_ray.analytics.frames import choose_engine
from lltm_ray.analytics.ingest import build_trace
from lltm_ray.analytics.trace import Trace
from lltm_ray.errors import ConfigError
from lltm_ray.integrations.graphistry import (
    Account,
    dependency_graph,
    graph,
    is_graph,
    knowledge_graph,
    layout,
    prefix_graph,
    query,
    span_graph,
    upload,
)
from lltm_ray.knowledge.graph import Entity, KnowledgeGraph, Mention, Relation
from tests.fleet_rows import Plan, fleet_rows

PANDAS = choose_engine("pandas")
SECRET = "correct horse battery staple"


@pytest.fixture(scope="module")
def trace() -> Trace:
    """A fleet one of whose engines dies: attempts fail and are tried elsewhere."""
    return build_trace(fleet_rows(Plan(seed=3, seconds=20, rate=10, cascade="engine-1", cascade_s=5)), PANDAS)


@pytest.fixture(scope="module")
def spans(trace: Trace) -> Any:
    return span_graph(trace)


@pytest.fixture
def connections(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What wanted to connect, or to look a host up; nothing can."""
    tried: list[Any] = []

    def refuse(*given: Any, **_: Any) -> None:
        tried.append(given)
        raise OSError("blocked")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return tried


def rows(found: Any) -> list[dict[str, Any]]:
    return found._nodes.to_dict("records")


def spans_by_hand(trace: Trace) -> list[dict[str, Any]]:
    """Each span as names, one after the other."""
    made = []
    for each in trace.spans.itertuples():
        names = {kind: trace.names.of(kind, getattr(each, kind)) for kind in ("engine", "error")}
        ms = (each.end_s - each.start_s) * 1e3
        trace_id = trace.trace_ids[each.trace].as_py()
        span = {"node": each.s, "name": trace.names.of("span", each.name), "ms": ms, "trace_id": trace_id}
        made.append(span | names | {"parent": each.parent, "r": each.r})
    return made


def test_every_span_has_its_names_and_an_edge_from_its_parent(trace: Trace, spans: Any) -> None:
    by_hand = spans_by_hand(trace)
    assert len(by_hand) > 500
    for found, made in zip(rows(spans), by_hand, strict=True):
        assert {name: found[name] for name in ("node", "name", "engine", "error", "trace_id")} == {
            name: made[name] for name in ("node", "name", "engine", "error", "trace_id")
        }
        assert found["ms"] == pytest.approx(made["ms"])
        request = made["r"]
        assert found["request_id"] == (trace.request_ids[request].as_py() if request >= 0 else "")
        tenant = trace.names.of("tenant", trace.requests["tenant"][request]) if request >= 0 else ""
        assert found["tenant"] == tenant
    edges = set(zip(spans._edges["source"], spans._edges["target"], strict=True))
    assert edges == {(made["parent"], made["node"]) for made in by_hand if made["parent"] >= 0}


def test_cypher_finds_the_slow_spans_of_an_engine(trace: Trace, spans: Any) -> None:
    text = "MATCH (n) WHERE n.engine = 'engine-2' AND n.name = 'decode' AND n.ms > 600 RETURN n.node ORDER BY n.node"
    found = [row["n.node"] for row in rows(query(spans, text))]
    slow = [
        made["node"]
        for made in spans_by_hand(trace)
        if made["engine"] == "engine-2" and made["name"] == "decode" and made["ms"] > 600
    ]
    assert found == slow
    assert len(slow) > 3
    counted = query(spans, "MATCH (n) WHERE n.ms > 600 RETURN n.engine AS engine, count(*) AS spans")
    expected = Counter(made["engine"] for made in spans_by_hand(trace) if made["ms"] > 600)
    assert {row["engine"]: row["spans"] for row in rows(counted)} == expected


def test_errors_reach_the_requests_above_them(trace: Trace, spans: Any) -> None:
    by_hand = spans_by_hand(trace)
    parents = {made["node"]: made["parent"] for made in by_hand}
    names = {made["node"]: made["name"] for made in by_hand}
    reached = set()
    for made in by_hand:
        if made["error"] and made["name"] == "attempt":
            above = made["parent"]
            while above >= 0:
                reached |= {above} if names[above] == "request" else set()
                above = parents[above]
    assert len(reached) > 3
    cypher = (
        "MATCH (r)-[*]->(a) WHERE r.name = 'request' AND a.name = 'attempt' AND a.error <> '' RETURN DISTINCT r.node"
    )
    assert {row["r.node"] for row in rows(query(spans, cypher))} == reached
    steps = [
        {"type": "Node", "filter_dict": {"name": "attempt", "error": {"type": "NE", "val": ""}}},
        {"type": "Edge", "direction": "reverse", "to_fixed_point": True},
        {"type": "Node", "filter_dict": {"name": "request"}},
    ]
    found = query(spans, json.dumps(steps))
    assert {row["node"] for row in rows(found) if row["name"] == "request"} == reached
    assert is_graph(found, spans)
    assert not is_graph(query(spans, cypher), spans)


def test_spans_of_some_traces_only(trace: Trace) -> None:
    wanted = [trace.trace_ids[5].as_py(), trace.trace_ids[9].as_py()]
    found = span_graph(trace, wanted)
    assert set(found._nodes["trace_id"]) == set(wanted)
    expected = [made["node"] for made in spans_by_hand(trace) if made["trace_id"] in wanted]
    assert found._nodes["node"].tolist() == expected
    assert set(found._edges["target"]) < set(expected)
    with pytest.raises(ConfigError, match="trace_ids='nowhere': is not in this window"):
        span_graph(trace, ["nowhere"])


def test_dependencies_are_the_tables_of_the_analysis(trace: Trace) -> None:
    tables = dependencies.analyze(trace).tables
    found = dependency_graph(trace)
    pd.testing.assert_frame_equal(found._nodes, tables["nodes"])
    asked = query(
        found, "MATCH (a)-[e]->(b) WHERE b.kind = 'engine' AND e.errors > 0 RETURN b.node AS engine, e.errors AS errors"
    )
    edges = tables["edges"]
    failing = edges[edges["target"].str.startswith("engine ") & (edges["errors"] > 0)]
    assert {row["engine"]: row["errors"] for row in rows(asked)} == dict(
        zip(failing["target"], failing["errors"], strict=True)
    )
    assert "engine engine-1" in set(failing["target"])


def nested_prompts() -> Trace:
    """Two thirds of the requests go on alike, in two ways, after what all begin with."""
    tables = fleet_rows(Plan(seed=3, seconds=20))
    requests = tables["requests"]
    prompts = [b"all" * 1000 + (b"", b"one", b"other")[i % 3] * 1000 + b"%06d" % i * 1000 for i in range(len(requests))]
    for name, values in (
        ("prefix", pa.array([hash_prefixes(prompt, b"salt") for prompt in prompts], pa.binary())),
        ("prompt_bytes", pa.array([len(prompt) for prompt in prompts])),
    ):
        requests = requests.set_column(requests.column_names.index(name), name, values)
    return build_trace(tables | {"requests": requests}, PANDAS)


def test_prefix_families_are_linked_to_the_longer_ones() -> None:
    trace = nested_prompts()
    tables = prefix.analyze(trace).tables
    found = prefix_graph(trace)
    assert found._nodes["node"].tolist() == tables["families"]["family"].tolist()
    links = tables["links"]
    assert len(links) == 2
    parent = links["parent"][0]
    asked = query(found, f"MATCH (a {{node: '{parent}'}})-[e]->(b) RETURN b.node, e.requests ORDER BY b.node")
    below = links[links["parent"] == parent].sort_values("child")
    assert [(row["b.node"], row["e.requests"]) for row in rows(asked)] == list(
        zip(below["child"], below["requests"], strict=True)
    )


def test_an_empty_window_has_empty_graphs() -> None:
    empty = build_trace({}, PANDAS)
    for make in (span_graph, dependency_graph, prefix_graph):
        made = layout(make(empty))
        assert len(made._nodes) == len(made._edges) == 0
        assert rows(query(made, "MATCH (n) RETURN n.node")) == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("SELECT * FROM spans", "Invalid Cypher"),
        ("", "non-empty"),
        ("MATCH (n) DELETE n", "Invalid Cypher"),
        ("MATCH (n) WHERE n.colour = 'red' RETURN n", '"colour" does not exist'),
        ("MATCH (n) RETURN n.colour", '"n.colour" does not exist'),
        ('[{"type": "Node", "filter_dict": {"colour": "red"}}]', '"colour" does not exist'),
        ('[{"type": "Node"', "is no JSON"),
        ('["Node"]', "type must be one of Node, Edge, Call, not Node"),
        (
            '[{"type": "RemoteGraph", "dataset_id": "d"}]',
            "type must be one of Node, Edge, Call, not {'type': 'RemoteGraph'",
        ),
        ('[{"type": "Edge", "direction": "sideways"}]', "sideways"),
    ],
)
def test_a_bad_query_is_named_with_what_would_do(spans: Any, text: str, words: str) -> None:
    with pytest.raises(ConfigError) as raised:
        query(spans, text)
    assert raised.value.field == "query"
    assert raised.value.value == text
    assert words in str(raised.value)
    if "colour" in text:
        assert "nodes have node, name, engine, slot, ms" in str(raised.value)


def test_nothing_connects_but_an_upload(trace: Trace, connections: list[Any]) -> None:
    for make in (span_graph, dependency_graph, prefix_graph):
        placed = layout(make(trace))
        query(placed, "MATCH (n) RETURN n")
        query(placed, '[{"type": "Node"}, {"type": "Call", "function": "get_degrees", "params": {}}]')
    assert connections == []
    with pytest.raises(ConfigError, match=r"server='graphistry\.example'"):
        upload(placed, Account(username="u", password=SECRET, server="graphistry.example"))
    assert connections != []


def test_layers_go_from_left_to_right_and_nobody_shares_a_place(trace: Trace) -> None:
    placed = layout(dependency_graph(trace))
    of = {row["node"]: row for row in rows(placed)}
    for edge in placed._edges.itertuples():
        assert of[edge.source]["x"] < of[edge.target]["x"]
    assert len({(row["x"], row["y"]) for row in of.values()}) == len(of)
    assert (placed._point_x, placed._point_y) == ("x", "y")
    engines = [row["x"] for row in of.values() if row["kind"] == "engine"]
    assert set(engines) == {2.0}


def test_children_lie_in_the_order_of_their_parents_also_beside_a_cycle() -> None:
    nodes = pd.DataFrame({"node": ["r", "a", "b", "b1", "a1", "a2", "alone", "p", "q"]})
    ends = [("r", "a"), ("r", "b"), ("b", "b1"), ("a", "a1"), ("a", "a2"), ("p", "q"), ("q", "p"), ("q", "unknown")]
    edges = pd.DataFrame(ends, columns=["source", "target"])
    at = {row["node"]: (row["x"], row["y"]) for row in rows(layout(graph(nodes, edges)))}
    assert at["a"][1] < at["b"][1]
    assert at["a1"][1] < at["a2"][1] < at["b1"][1]
    assert at["alone"][0] == 0
    assert at["p"][0] != at["q"][0]
    assert len(set(at.values())) == len(at)


def test_a_graph_needs_its_columns_and_frames_of_one_kind() -> None:
    nodes, edges = pd.DataFrame({"node": ["a"]}), pd.DataFrame({"source": ["a"], "target": ["a"]})
    with pytest.raises(ConfigError, match=r"edges=.*must have the column target"):
        graph(nodes, edges[["source"]])
    with pytest.raises(ConfigError, match="must have the column node"):
        graph(edges, edges)


def test_an_account_comes_from_the_environment_and_shows_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="set GRAPHISTRY_USERNAME and GRAPHISTRY_PASSWORD, or"):
        Account.of({}).login()
    with pytest.raises(ConfigError) as raised:
        Account.of({"GRAPHISTRY_PASSWORD": SECRET}).login()
    assert SECRET not in str(raised.value)
    told = Account.of({"GRAPHISTRY_PERSONAL_KEY_ID": "i", "GRAPHISTRY_PERSONAL_KEY_SECRET": SECRET})
    assert told.login() == {
        "personal_key_id": "i", "personal_key_secret": SECRET, "protocol": "https", "server": "hub.graphistry.com"
    }  # fmt: skip
    assert SECRET not in repr(told)
    for name in ("USERNAME", "PASSWORD", "PERSONAL_KEY_ID", "PERSONAL_KEY_SECRET", "SERVER"):
        monkeypatch.delenv(f"GRAPHISTRY_{name}", raising=False)
    nodes, edges = pd.DataFrame({"node": ["a"]}), pd.DataFrame({"source": ["a"], "target": ["a"]})
    with pytest.raises(ConfigError, match="account="):
        upload(graph(nodes, edges))


class Server(BaseHTTPRequestHandler):
    """As much of a Graphistry server as an upload meets; it tells the password back, as bad ones do."""

    seen: ClassVar[list[str]]
    answers: ClassVar[dict[str, tuple[int, Any]]]

    def do_POST(self) -> None:
        asked = self.rfile.read(int(self.headers["Content-Length"]))
        self.seen.append(self.path)
        status, value = self.answers[self.path.partition("?")[0]]
        body = json.dumps(value).encode() if value is not None else asked
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Quiet."""


@pytest.fixture
def account() -> Iterator[Account]:
    Server.seen = []
    Server.answers = {
        "/api-token-auth/": (200, {"token": "t"}),
        "/api/v2/auth/token/refresh": (200, {"token": "t"}),
        "/api-token-refresh/": (200, {"token": "t"}),
        "/api/v2/files/": (200, {"file_id": "f"}),
        "/api/v2/upload/files/f": (200, {"is_valid": True, "is_uploaded": True}),
        "/api/v2/upload/datasets/": (200, {"success": True, "data": {"dataset_id": "d-1"}}),
    }
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield Account(username="u", password=SECRET, server=f"http://127.0.0.1:{server.server_port}")
        server.shutdown()
        thread.join()


def test_an_upload_gives_the_url_of_the_picture(trace: Trace, account: Account) -> None:
    shown = dependency_graph(trace)
    assert "dataset=d-1" in upload(shown, account)
    assert Server.seen[0] == "/api-token-auth/"
    assert "/api/v2/upload/datasets/" in Server.seen
    assert SECRET not in repr(shown)
    assert shown.session.api_token is None


@pytest.mark.parametrize("refusal", [(401, None), (200, None), (200, {"token": ""}), (500, {"why": "none"})])
def test_a_login_that_fails_is_an_error_without_the_secret(
    trace: Trace, account: Account, refusal: tuple[int, Any], caplog: pytest.LogCaptureFixture
) -> None:
    Server.answers["/api-token-auth/"] = refusal
    with pytest.raises(ConfigError, match="did not take the account or the graph") as raised:
        upload(dependency_graph(trace), account)
    assert set(Server.seen) == {"/api-token-auth/"}
    assert SECRET not in str(raised.value) + caplog.text


def test_a_dataset_that_is_refused_is_an_error(trace: Trace, account: Account) -> None:
    Server.answers["/api/v2/upload/datasets/"] = (200, {"success": False})
    with pytest.raises(ConfigError, match="did not take the account or the graph"):
        upload(dependency_graph(trace), account)


def test_a_server_that_never_answers_is_waited_for_so_long_and_no_longer(trace: Trace) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        account = Account(username="u", password=SECRET, server=f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(ConfigError, match=r"has not taken the graph within 0\.3 s") as raised:
            upload(dependency_graph(trace), account, timeout_s=0.3)
    assert SECRET not in str(raised.value)


def test_knowledge_is_a_graph_of_entities():
    here = (Mention(0, 0, 3),)
    found = KnowledgeGraph(
        (Entity("Ada", "person", here), Entity("London", "location", here)),
        (Relation("Ada", "located in", "London", here),),
    )
    drawn = knowledge_graph(found)
    assert drawn._nodes["node"].tolist() == ["Ada", "London"]
    assert drawn._edges[["source", "target", "relation"]].to_numpy().tolist() == [["Ada", "London", "located in"]]
