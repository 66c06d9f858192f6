"""Tokens to look at: `view_tokens` cuts a text as the model does, `view_answer` shows how sure it was of each token."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lltm_ray._optional import load
from lltm_ray.integrations.notebook._html import show
from lltm_ray.integrations.notebook._source import Prompt, Source, to_messages
from lltm_ray.records import TokenLogprob

_HUES = (210, 35, 150, 290, 0, 95)
_UNSURE_HUE, _SURE_HUE = 0, 130


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """One token. Its bytes need not be UTF-8: a character may be cut into several tokens."""

    id: int | None
    piece: bytes
    whole: str = ""
    """The character or characters that it is a part of, where it is no text by itself; empty where it is."""
    probability: float | None = None
    """Of this token at its place, 0..1; None where the model did not write it."""
    others: tuple[tuple[str, float], ...] = ()
    """What else could have stood here, and how likely that was."""

    @property
    def text(self) -> str:
        """Its text, or its bytes in hexadecimal where they are none by themselves: `<E2 82>`."""
        text = _decoded(self.piece)
        return f"<{self.piece.hex(' ').upper()}>" if text is None else text

    @property
    def hint(self) -> str:
        """What hovering over it says."""
        said = [f"id {'?' if self.id is None else self.id}"]
        if _decoded(self.piece) is None:
            said.append(f"part of {self.whole!r}" if self.whole else "no UTF-8")
        if self.probability is not None:
            said.append(f"p {self.probability:.3f}")
        said += [f"{text!r} {probability:.3f}" for text, probability in self.others]
        return "; ".join(said)


@dataclass(frozen=True, slots=True)
class TokenView:
    """Tokens in their order. A notebook colours them: one colour a token, or from green to red as they were likely."""

    tokens: tuple[Token, ...]

    @property
    def text(self) -> str:
        """All of them together; bytes that are no UTF-8 as U+FFFD."""
        return b"".join(token.piece for token in self.tokens).decode("utf-8", "replace")

    def records(self) -> list[dict[str, Any]]:
        """One for each token: `id`, `piece` (bytes), `text`, `probability`."""
        names = ("id", "piece", "text", "probability")
        return [{name: getattr(token, name) for name in names} for token in self.tokens]

    def frame(self) -> Any:
        """The same as a DataFrame.

        Raises:
            MissingExtraError: pandas is not installed.
        """
        return load("pandas", extra="pandas", feature="tokens as a DataFrame").DataFrame(self.records())

    def __len__(self) -> int:
        return len(self.tokens)

    def __repr__(self) -> str:
        return f"{len(self)} tokens: " + " ".join(repr(token.text) for token in self.tokens)

    def _repr_html_(self) -> str:
        spans = "".join(_span(place, token) for place, token in enumerate(self.tokens))
        line = f"<div>{len(self)} tokens</div>"
        return f'<div style="line-height:1.9;white-space:pre-wrap;overflow-wrap:anywhere">{spans}</div>{line}'


def view_tokens(cluster: Any, text: str, *, api_key: str = "", model: str = "", add_special: bool = False) -> TokenView:
    """A text as the model's tokenizer cuts it; takes no slot.

    Args:
        cluster: a `Cluster`, an `InferenceEngine`, or a gateway's base URL.
        text: any; a special token's name in it counts as that token.
        api_key: of the gateway.
        model: served name; empty takes the first one.
        add_special: with the marks that the model puts around a prompt.

    Raises:
        ConfigError: a fleet without a gateway.
        LltmRayError: the gateway's error, or none reached.
    """
    source = Source.of(cluster, api_key=api_key, model=model)
    with source.client() as client:
        pieces = source.tokenize(client, text, add_special=add_special)
    return TokenView(_named([Token(id=each.id, piece=each.piece) for each in pieces]))


def view_answer(
    cluster: Any, prompt: Prompt, *, api_key: str = "", top: int = 3, max_tokens: int = 64, **params: Any
) -> TokenView:
    """An answer, token by token, with its probabilities and the likeliest others.

    Args:
        cluster: a `Cluster`, an `InferenceEngine`, or a gateway's base URL.
        prompt: a text, or a list of chat messages; the model's chat template is applied.
        api_key: of the gateway.
        top: how many others to show for each token.
        max_tokens: longest answer.
        params: others of /v1/chat/completions: `temperature`, `seed`, `model`, ...

    Raises:
        ConfigError: a fleet without a gateway, or a wrong parameter.
        LltmRayError: the gateway's error, or none reached.
    """
    source = Source.of(cluster, api_key=api_key, model=params.pop("model", ""))
    asked = source.params(max_tokens=max_tokens, logprobs=True, top_logprobs=top + 1, **params)
    with source.client() as client:
        done = client.chat(to_messages(prompt), **asked)
    return TokenView(_named([_told(each, top) for each in done.logprobs]))


def _told(each: TokenLogprob, top: int) -> Token:
    others = [(other.token, math.exp(other.logprob)) for other in each.top if other.id != each.id]
    piece = bytes(each.bytes) or each.token.encode()
    return Token(id=each.id, piece=piece, probability=math.exp(each.logprob), others=tuple(others[:top]))


def _named(tokens: Sequence[Token]) -> tuple[Token, ...]:
    """Tokens that cut a character know which one, as far as those beside them complete it."""
    found: list[Token] = []
    place = 0
    while place < len(tokens):
        size, whole = _run(token.piece for token in tokens[place : place + 8])
        found += [replace(token, whole=whole) for token in tokens[place : place + size]]
        place += size
    return tuple(found)


def _run(pieces: Iterable[bytes]) -> tuple[int, str]:
    """How many of the first pieces it takes to have text, and that text; (1, "") where one does or none ever has."""
    joined = b""
    for size, piece in enumerate(pieces, 1):
        joined += piece
        if (text := _decoded(joined)) is not None:
            return size, text if size > 1 else ""
    return 1, ""


def _decoded(piece: bytes) -> str | None:
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return None


def _span(place: int, token: Token) -> str:
    """Half transparent, so that it reads on light and dark pages; an outline tells tokens apart without colour."""
    hue = _HUES[place % len(_HUES)]
    if token.probability is not None:
        hue = round(_UNSURE_HUE + (_SURE_HUE - _UNSURE_HUE) * token.probability)
    style = f"background-color:hsla({hue},80%,50%,.28);border-radius:3px;border:1px solid hsla({hue},60%,50%,.6)"
    shown = show(token.text).replace("\n", "\u21b5\n").replace("\t", "\u21e5\t") or "\u2205"
    return f'<bdi style="{style}" title="{show(token.hint)}">{shown}</bdi>'
