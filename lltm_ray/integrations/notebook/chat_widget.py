"""`ChatWidget`: a `Chat` with a face in a notebook.

Its page (`static/chat.js`) gets what to show as the traits `state` and `draft`, and sends `send`, `stop` and `clear`.
It makes elements and sets their text; no text of anybody ever becomes HTML there.
"""

from __future__ import annotations

import importlib.resources
from typing import Any

from lltm_ray._optional import load
from lltm_ray.errors import LltmRayError
from lltm_ray.integrations.notebook._html import paragraph
from lltm_ray.integrations.notebook.chat import Chat

_FEATURE = {"extra": "jupyter", "feature": "a chat in a notebook"}


class ChatWidget(Chat):
    """A chat to type into; arguments and methods as `Chat`. Show it by naming it last in a cell.

    Raises:
        MissingExtraError: anywidget is not installed.
    """

    def __init__(self, cluster: Any, **settings: Any) -> None:
        self.view = _view_class()()
        """What the page is tied to."""
        super().__init__(cluster, **settings)
        self.view.on_msg(self._hear)
        self.on_change()

    def transcript(self) -> str:
        """What was said, as text."""
        return "\n\n".join(f"{message['role']}: {message['content']}" for message in self.history)

    def on_change(self) -> None:
        """Show it."""
        settings = {"system": self.system, "temperature": self.temperature, "max_tokens": self.max_tokens}
        told = {"asked": self.asked, "note": self.note, "failed": self.failed, "busy": self.is_busy}
        with self.view.hold_sync():
            self.view.draft = self.draft
            self.view.state = {"history": self.history, "settings": settings, **told}

    def on_draft(self) -> None:
        """Show it."""
        self.view.draft = self.draft

    def _hear(self, _: Any, told: Any, __: Any) -> None:
        """A message of the page; whatever is wrong with it is shown there."""
        try:
            match told:
                case {"kind": "send", "text": str(text), "settings": dict(settings)}:
                    self.set(**{name: settings.get(name) for name in ("system", "temperature", "max_tokens")})
                    self.send(text)
                case {"kind": "stop"}:
                    self.stop()
                case {"kind": "clear"}:
                    self.clear()
        except LltmRayError as error:
            self.note, self.failed = str(error), True
            self.on_change()

    def _repr_mimebundle_(self, **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """The live view; where none can be, as in a saved notebook, what was said so far."""
        data, metadata = self.view._repr_mimebundle_(**options)
        said = "".join(paragraph(message["content"], message["role"]) for message in self.history)
        return {**data, "text/plain": self.transcript() or "ChatWidget", "text/html": said}, metadata


def _view_class() -> Any:
    """Made when it is needed: the package works without anywidget."""
    traits = load("traitlets", **_FEATURE)
    body = {
        "_esm": _read("chat.js"),
        "_css": _read("chat.css"),
        "state": traits.Dict().tag(sync=True),
        "draft": traits.Unicode().tag(sync=True),
    }
    return type("ChatView", (load("anywidget:AnyWidget", **_FEATURE),), body)


def _read(name: str) -> str:
    return (importlib.resources.files("lltm_ray.integrations.notebook") / "static" / name).read_text(encoding="utf-8")
