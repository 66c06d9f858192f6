"""Which requests a web page made: pages may ask an open gateway for answers, but not for what others said."""

from __future__ import annotations

from ipaddress import ip_address

from lltm_ray.errors import ConfigError
from lltm_ray.gateway.headers import find
from lltm_ray.gateway.upstream import Headers

_WHY = "pages may not read or keep sessions; use lltm-ray sessions"


def is_of_page(headers: Headers) -> bool:
    """Whether a browser says that a page made it. Browsers send `Origin` with every POST and every foreign request."""
    return find(headers, b"origin") is not None or find(headers, b"sec-fetch-site") not in (None, b"none")


def refuse_pages(headers: Headers, own_host: str, *, is_open: bool) -> None:
    """Refuse what a web page may have sent.

    Args:
        headers: the request's.
        own_host: the address that the gateway is bound to.
        is_open: no key is asked for. Then a page whose own host's address was turned to this machine's (DNS rebinding)
            is told from a program by the host that it asks for.

    Raises:
        ConfigError: it names the header.
    """
    for name in (b"origin", b"sec-fetch-site"):
        value = find(headers, name)
        if value is not None and is_of_page([(name, value)]):
            raise ConfigError(name.decode("ascii"), value.decode("utf-8", "replace"), _WHY)
    hosts = [value.decode("utf-8", "replace") for name, value in headers if name == b"host"] or [""]
    for host in hosts if is_open else ():
        if not _is_own(_without_port(host), own_host):
            raise ConfigError("host", host, f"{_WHY}; without keys, ask for localhost or {own_host}")


def _without_port(host: str) -> str:
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]


def _is_own(name: str, own_host: str) -> bool:
    if name.lower() in ("localhost", own_host.lower()):
        return True
    try:
        return ip_address(name).is_loopback
    except ValueError:
        return False
