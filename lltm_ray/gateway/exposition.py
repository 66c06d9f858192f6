"""Prometheus text of several servers as one. Pure."""

from __future__ import annotations

from collections.abc import Iterable


def merge_metrics(texts: Iterable[tuple[str, str]], silent: Iterable[str] = ()) -> str:
    """Join expositions: each sample gets `engine="name"`, each family its HELP and TYPE once and its samples together.

    Args:
        texts: engine name and its text, in the format
            https://prometheus.io/docs/instrumenting/exposition_formats/ (version 0.0.4).
        silent: names of engines that gave no text; each gets a comment at the end.
    """
    heads: dict[str, dict[str, str]] = {}
    samples: dict[str, list[str]] = {}
    for engine, text in texts:
        family = ""
        for line in text.splitlines():
            words = line.split(None, 3)
            if line.startswith("#"):
                if len(words) >= 3 and words[1] in ("HELP", "TYPE"):
                    family = words[2]
                    heads.setdefault(family, {}).setdefault(words[1], line)
            elif words:
                name = words[0].partition("{")[0]
                owner = family if family and name.startswith(family) else name
                samples.setdefault(owner, []).append(label_sample(line, "engine", engine))
    lines: list[str] = []
    for family, found in samples.items():
        lines += [*heads.get(family, {}).values(), *found]
    lines += [f"# engine {' '.join(engine.split())} did not answer" for engine in silent]
    return "\n".join(lines) + "\n" if lines else ""


def label_sample(line: str, label: str, value: str) -> str:
    """One sample line with a label put before its own."""
    escaped = value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
    brace, space = line.find("{"), line.find(" ")
    if 0 <= brace < space or (brace >= 0 and space < 0):
        rest = line[brace + 1 :]
        comma = "" if rest.lstrip().startswith("}") else ","
        return f'{line[:brace]}{{{label}="{escaped}"{comma}{rest}'
    return f'{line[:space]}{{{label}="{escaped}"}}{line[space:]}'
