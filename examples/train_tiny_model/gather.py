"""Step 1: gather technical English that lies on this machine: documentation strings, READMEs, manual pages.

    python gather.py --out build                 # text.jsonl.gz and sources.json; five minutes of CPU

Only prose is kept: paragraphs that look like English sentences, each once. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import ast
import gzip
import hashlib
import json
import re
import shutil
import subprocess
import sys
import sysconfig
import textwrap
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

MANUALS = Path("/usr/share/man")
SECTIONS = ("man1", "man2", "man5", "man7", "man8")
COMMON = frozenset(
    {"the", "a", "an", "of", "to", "and", "is", "in", "for", "that", "this", "be", "are", "with", "or", "as", "if"}
    | {"by", "on", "it", "not", "from", "can", "which", "when"}
)
"""English prose is full of these; code, tables and other languages are not."""
PARAGRAPH_CHARS = range(60, 2_000)
DOCUMENT_CHARS = 200
"""Documents that keep less than this are left out."""


@dataclass(frozen=True, slots=True)
class Source:
    """One project whose text is read."""

    name: str
    licence: str
    files: tuple[Path, ...] = field(repr=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build"))
    out = parser.parse_args().out
    if any(MANUALS.glob("man*/*.gz")) and not shutil.which("groff"):
        parser.error(
            "groff, which renders the manual pages, is missing; on Debian and Ubuntu: apt-get install groff-base"
        )
    out.mkdir(parents=True, exist_ok=True)
    seen: set[bytes] = set()
    chars: Counter[str] = Counter()
    licences: dict[str, str] = {}
    with gzip.open(out / "text.jsonl.gz", "wt", encoding="ascii") as file, ProcessPoolExecutor() as pool:
        for source in list_sources():
            licences[source.name] = source.licence
            for text in pool.map(read_prose, source.files, chunksize=32):
                if len(kept := drop_repeats(text, seen)) >= DOCUMENT_CHARS:
                    chars[source.name] += len(kept)
                    file.write(json.dumps({"source": source.name, "text": kept}) + "\n")
            print(f"{source.name}: {chars[source.name]:,} characters", flush=True)
    table = [{"name": name, "licence": licences[name], "chars": count} for name, count in chars.most_common()]
    (out / "sources.json").write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    print(f"{sum(chars.values()):,} characters of {len(table)} sources in {out / 'text.jsonl.gz'}")


def list_sources() -> Iterator[Source]:
    """The standard library, every installed package, the manual; in an order that does not change."""
    library = Path(sysconfig.get_path("stdlib"))
    files = (path for path in library.rglob("*.py") if not {"site-packages", "test", "tests"} & set(path.parts))
    yield Source(
        f"Python {sys.version_info.major}.{sys.version_info.minor} standard library", "PSF-2.0", in_order(files)
    )
    installed = {package.metadata["Name"].lower(): package for package in metadata.distributions()}
    for name in sorted(installed):
        package = installed[name]
        listed = (Path(str(path.locate())) for path in package.files or () if path.suffix in {".py", ".md", ".rst"})
        described = [found for found in (package.files or ()) if found.name == "METADATA"]
        own = (Path(str(path.locate())) for path in described)
        files = (path for path in (*listed, *own) if "tests" not in path.parts)
        yield Source(name, licence_of(package), in_order(files))
    pages = (page for section in SECTIONS for page in (MANUALS / section).glob("*.gz"))
    yield Source("Debian manual pages", "various free licences, see /usr/share/doc/*/copyright", in_order(pages))


def in_order(files: Iterable[Path]) -> tuple[Path, ...]:
    return tuple(sorted({path.resolve() for path in files if path.is_file()}))


def licence_of(package: metadata.Distribution) -> str:
    """The licence that a package's metadata names, in one line."""
    about = package.metadata
    classes = [each.rpartition(" :: ")[2] for each in about.get_all("Classifier") or () if each.startswith("License")]
    named = about.get("License-Expression") or " / ".join(classes) or about.get("License") or "not stated"
    return named.strip().splitlines()[0][:80]


def read_prose(path: Path) -> str:
    """The prose of one file, paragraphs parted by blank lines; empty if it cannot be read."""
    try:
        if path.suffix == ".gz":
            return keep_prose(render_manual(path))
        text = path.read_text(encoding="utf-8")
        return keep_prose("\n\n".join(doc_strings(text)) if path.suffix == ".py" else body_of(path, text))
    except (OSError, EOFError, ValueError, SyntaxError, RecursionError, zlib.error, subprocess.SubprocessError):
        return ""  # a file that is no Python, no text or no manual page has no prose for us


def doc_strings(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""


def body_of(path: Path, text: str) -> str:
    """A METADATA file's description, or the whole of another file, without fenced code."""
    body = text.partition("\n\n")[2] if path.name == "METADATA" else text
    return re.sub(r"```.*?```", "", body, flags=re.DOTALL)


def render_manual(path: Path) -> str:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        page = file.read(400_000)
    if page.startswith(".so "):  # an alias of another page
        return ""
    command = ["groff", "-mandoc", "-Tascii", "-P-c", "-P-b", "-P-u", "-rLL=500n", "-rHY=0", "-dAD=l"]
    done = subprocess.run(command, input=page.encode(), capture_output=True, timeout=20, check=True)
    return textwrap.dedent(done.stdout.decode("ascii", "ignore"))


def keep_prose(text: str) -> str:
    found = (" ".join(block.split()) for block in re.split(r"\n\s*\n", text))
    return "\n".join(paragraph for paragraph in found if is_prose(paragraph))


def is_prose(paragraph: str) -> bool:
    """Whether a paragraph is ASCII, neither a crumb nor a flood, mostly letters, and has many common words."""
    if len(paragraph) not in PARAGRAPH_CHARS or not paragraph.isascii() or not paragraph.isprintable():
        return False
    letters = sum(map(str.isalpha, paragraph)) + paragraph.count(" ")
    words = re.findall(r"[A-Za-z']+", paragraph.lower())
    plain = sum(word in COMMON for word in words)
    return letters > 0.85 * len(paragraph) and plain > 0.2 * len(words) and paragraph[-1] in ".!?:"


def drop_repeats(text: str, seen: set[bytes]) -> str:
    """The paragraphs that no document before had; compared by their letters alone."""
    kept = []
    for paragraph in text.splitlines():
        key = hashlib.blake2b("".join(filter(str.isalpha, paragraph.lower())).encode(), digest_size=12).digest()
        if key not in seen:
            seen.add(key)
            kept.append(paragraph)
    return "\n".join(kept)


if __name__ == "__main__":
    main()
