"""Text of users and models as HTML that can do nothing but be read."""

from __future__ import annotations

import html

_SHOWN = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"} | {127: "\u2421"}
_SHOWN |= {code: f"\\u{code:04x}" for code in (*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x200E, 0x200F)}
"""Control characters get their pictures; those that turn the direction of writing, their names."""
PRE = "white-space:pre-wrap;overflow-wrap:anywhere;margin:0;font-family:inherit"


def show(text: str) -> str:
    """Escaped for an element or an attribute; what would be invisible or move other text is written out."""
    return html.escape(text.translate(_SHOWN))


def paragraph(text: str, note: str = "") -> str:
    """A text as it stands, and a small note below it."""
    below = f'<div style="opacity:.7;font-size:.85em">{show(note)}</div>' if note else ""
    return f'<div><pre style="{PRE}">{show(text)}</pre>{below}</div>'
