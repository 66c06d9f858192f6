"""Base URLs of servers, as people give them."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

from lltm_ray.errors import ConfigError


def base_url(url: str) -> str:
    """What routes are put behind: without slashes at its end, and without the `/v1` that OpenAI's clients want there.

    One `/v1` is left out and no more: the base of a llama-server with `--api-prefix /v1` is `http://HOST/v1/v1`.

    Raises:
        ConfigError: it is no URL of a server.
    """
    if not isinstance(url, str) or not _is_base(url):
        raise ConfigError("url", url, "must be the base URL of a llama-server, such as http://127.0.0.1:8080")
    return re.sub(r"(?<!/)/v1\Z", "", url.rstrip("/"))


def _is_base(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # brackets that do not match, or a port out of range
        return False
