"""`lltm-ray extract`: entities and relations of text files, read by a running fleet's model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lltm_ray.cli._output import ERR, OUT, JsonFlag, errors_end_the_command, print_json, print_table
from lltm_ray.errors import ConfigError

_Files = Annotated[list[Path], typer.Argument(help="Text files in UTF-8.")]
_Name = Annotated[str, typer.Option(help="The fleet's name.")]
_Model = Annotated[str, typer.Option(help="Which of its models.", show_default="the first")]


@errors_end_the_command()
def extract(files: _Files, *, name: _Name = "default", model: _Model = "", as_json: JsonFlag = False) -> None:
    """Read who and what text files name, and what they say of it, as a graph."""
    texts = [_read(path) for path in files]
    from lltm_ray.driver import Cluster  # Ray takes a second to import
    from lltm_ray.sdk.extraction import KnowledgeExtractor

    with Cluster.connect(name) as cluster, ERR.status("reading …"):
        found = KnowledgeExtractor(cluster, model=model).extract(texts)
    if as_json:
        print_json(found.to_dict())
        return
    places = {number: path.name for number, path in enumerate(files)}
    print_table(
        ("entity", "type", "mentions", "in"),
        [
            (each.name, each.type, len(each.mentions), ", ".join(sorted({places[at.text] for at in each.mentions})))
            for each in found.entities
        ],
    )
    OUT.print("")
    rows: list[tuple[Any, ...]] = [(each.source, each.relation, each.target) for each in found.relations]
    print_table(("source", "relation", "target"), rows)
    if not found.entities:
        ERR.print(
            "The model named nothing that the texts hold; a small one may be unable to.", style="dim", markup=False
        )
    if found.left_out:
        ERR.print(f"Left out, for the texts do not name them: {', '.join(found.left_out)}", markup=False)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        raise ConfigError("files", str(path), f"cannot be read as UTF-8 text: {error}") from error
