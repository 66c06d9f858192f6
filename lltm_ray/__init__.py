"""A fleet of llama.cpp servers on Ray: one engine per GPU share, one endpoint, numbers you can believe."""

from __future__ import annotations

__version__ = "0.1.0"
