"""A report as one HTML file that needs nothing else: it opens from a disk, on a phone, on paper, and without a network.

Flow: an analysis' tables -> `charts`, the list of Plotly figures that `costs`, `loads`, `pairs`, `graphs` and `times`
make of them -> `page`, which puts findings, evidence (`flame`) and a comparison (`compared`) around them -> `static/`:
the template, its style, and the script that draws. Names in a report come from clients, so all text is escaped, and the
page runs no script but its own.
"""

from __future__ import annotations

from lltm_ray.analytics.html.page import to_html

__all__ = ["to_html"]
