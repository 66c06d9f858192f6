"""Joins this machine to a Ray cluster of several, with fixed ports and a token: `python join.py --help`.

Every machine must reach every other one under the address that it gives. See the README beside this file.
"""

# ruff: noqa: D103, S105, S607, T201 - a script; TOKEN is a name

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
from collections.abc import Sequence

PORT = 6379
PORTS = {
    "--node-manager-port": 6380,
    "--object-manager-port": 6381,
    "--runtime-env-agent-port": 6382,
    "--dashboard-agent-grpc-port": 6383,
    "--dashboard-agent-listen-port": 6384,
    "--metrics-export-port": 6385,
    "--min-worker-port": 20_000,
    "--max-worker-port": 20_199,
}
"""Of each node; beside them 6379 on the head, and one free port for each llama-server."""
TOKEN = "RAY_AUTH_TOKEN"


def ray_arguments(own_ip: str, head: str | None, extra: Sequence[str] = ()) -> list[str]:
    """`ray start` of the head (no `head` given) or of another machine."""
    role = ["--address", head] if head else ["--head", "--port", str(PORT), "--include-dashboard", "false"]
    ports = [str(word) for pair in PORTS.items() for word in pair]
    return ["start", *role, "--node-ip-address", own_ip, *ports, "--disable-usage-stats", *extra]


def own_address(towards: str) -> str:
    """The address of this machine that it uses towards another one; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((towards, 9))
        return str(probe.getsockname()[0])


def check_own(address: str) -> None:
    """A node of Ray talks to itself under its own address; behind NAT, or a VPN without an interface, it cannot."""
    try:
        with socket.create_server((address, 0)) as server:
            socket.create_connection(server.getsockname(), timeout=5).close()
    except OSError as error:
        sys.exit(f"this machine cannot be reached as {address}, not even by itself ({error}): give --own-ip")


def check_head(head: str) -> None:
    host, _, port = head.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except (OSError, ValueError) as error:
        sys.exit(f"no head answers at {head} ({error}): start it first, and look at its firewall")


def read_token() -> str:
    """From the service's secrets or the environment; without one anybody who reaches the ports could run code here."""
    from lltm_ray.errors import ConfigError
    from lltm_ray.integrations.kaggle import secrets

    try:
        return secrets.get(TOKEN).reveal()
    except ConfigError as error:
        sys.exit(f"{error}\nall machines need the same token: python -c 'import secrets; print(secrets.token_hex(32))'")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--head", help="HOST:PORT of the head; leave it out on the head itself")
    parser.add_argument("--own-ip", help="this machine's address as the others reach it")
    parser.add_argument("rest", nargs="*", help="after --: further options of `ray start`, such as --num-gpus 2")
    given = parser.parse_args(argv)
    if given.head:
        check_head(given.head)
    own_ip = given.own_ip or own_address(given.head.rpartition(":")[0] if given.head else "192.0.2.1")
    check_own(own_ip)
    environment = {"RAY_worker_niceness": "0"} | os.environ | {"RAY_AUTH_MODE": "token", TOKEN: read_token()}
    done = subprocess.run(["ray", *ray_arguments(own_ip, given.head, given.rest)], env=environment, check=False)
    if done.returncode == 0 and not given.head:
        print(f"on the others: python join.py --head {own_ip}:{PORT}")
        print(
            f"then here: RAY_AUTH_MODE=token RAY_ADDRESS={own_ip}:{PORT} lltm-ray up --model tiny --engines 2 --detach"
        )
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
