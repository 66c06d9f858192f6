"""The tokenizer of a checkpoint as llama.cpp wants it, from `tokenizer.json` alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import gguf

from lltm_ray.errors import ConfigError, ModelFormatError
from lltm_ray.models.convert.checkpoint import Checkpoint
from lltm_ray.models.convert.families import number

_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SUFFIXES = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
PRE_TOKENIZERS: Mapping[str, str] = {
    rf"{_SUFFIXES}|{_LETTERS}|\p{{N}}{{1,3}}|{_TAIL}": "llama-bpe",
    rf"{_SUFFIXES}|{_LETTERS}|\p{{N}}|{_TAIL}": "qwen2",
}
"""The regular expression that splits text before merges -> llama.cpp's name of it (src/llama-vocab.cpp)."""
_LOWERCASE, _STRIP_ACCENTS = "tokenizer.ggml.normalizer.lowercase", "tokenizer.ggml.normalizer.strip_accents"
_SPACE = "\u2581"


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Tokens by id with their types, and what the kind of tokenizer needs beside them."""

    model: str
    """`gpt2|llama|bert`, llama.cpp's name of the kind."""
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float] | None = None
    flags: Mapping[str, bool] = field(default_factory=dict)
    """GGUF key -> what is done to text before it is cut."""


def read_vocabulary(checkpoint: Checkpoint, *, pre: str | None = None) -> Vocabulary:
    """Read a checkpoint's tokenizer.

    Args:
        checkpoint: whose.
        pre: llama.cpp's name of the pre-tokenizer, where it cannot be told from the file.

    Raises:
        ModelFormatError: no tokenizer.json, or a damaged one.
        ConfigError: a kind that cannot be converted here.
    """
    path = str(checkpoint.folder / "tokenizer.json")
    found = checkpoint.json("tokenizer.json")
    if found is None:
        raise ModelFormatError(path, 0, "is missing; save the tokenizer in its fast form (transformers' AutoTokenizer)")
    try:
        size = number(checkpoint.config, "vocab_size") if "vocab_size" in checkpoint.config else None
        return _read(found, size, pre)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ModelFormatError(path, 0, f"is no tokenizer: {error!r}") from error


def _read(found: dict[str, Any], size: int | None, pre: str | None) -> Vocabulary:
    model, kind = found["model"], found["model"]["type"]
    tokens, types = _tokens(found, size)
    if kind == "WordPiece":
        normal = zip(tokens, types, strict=True)
        words = [_phantom(token, of) for token, of in normal]
        return Vocabulary("bert", pre or "bert-bge", words, types, flags=_case(found))
    if kind != "BPE":
        raise ConfigError("tokenizer", kind, "cannot be converted; these can: BPE, WordPiece")
    if not isinstance(model["merges"], list):
        raise TypeError("merges must be a list")
    if model.get("byte_fallback"):
        flags = {gguf.Keys.Tokenizer.ADD_PREFIX: _adds_prefix(found)}
        types, scores = _with_bytes(tokens, types, model), _scores(tokens, model)
        return Vocabulary("llama", pre or "default", tokens, types, scores, flags)
    return Vocabulary("gpt2", pre or _find_pre(found.get("pre_tokenizer")), tokens, types)


def _tokens(found: dict[str, Any], size: int | None) -> tuple[list[str], list[int]]:
    """As many as the embedding has rows: added tokens beyond it have no vector, and no model was taught them."""
    ids: dict[int, str] = {place: token for token, place in found["model"]["vocab"].items()}
    added = {each["id"]: each for each in found.get("added_tokens") or ()}
    last = max(ids.keys() - added.keys(), default=0)
    if size is not None and last >= size:
        raise ConfigError("vocab_size", size, f"the tokenizer has id {last}; is it another checkpoint's?")
    ids |= {place: each["content"] for place, each in added.items()}
    count = size or max(ids) + 1
    if count > 2**24 or min(ids) < 0:
        raise ValueError(f"ids from {min(ids)} to {max(ids)}")
    tokens, types = [], []
    for place in range(count):
        kind = _type_of(added.get(place), is_known=place in ids)
        token = ids.get(place, f"[PAD{place}]")
        # llama.cpp looks for these in the text as it was written.
        tokens.append(token.replace(_SPACE, " ") if kind == gguf.TokenType.USER_DEFINED else token)
        types.append(kind)
    return tokens, types


def _type_of(added: dict[str, Any] | None, *, is_known: bool) -> int:
    if added is None:
        return gguf.TokenType.NORMAL if is_known else gguf.TokenType.UNUSED
    return (
        gguf.TokenType.CONTROL if added["special"] or _looks_special(added["content"]) else gguf.TokenType.USER_DEFINED
    )


def _looks_special(token: str) -> bool:
    """Marks that some checkpoints forget to call special: llama.cpp's own list."""
    return (
        token in ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
        or (token.startswith("<|") and token.endswith("|>"))
        or (token.startswith("<unused") and token.endswith(">"))
    )


def _phantom(token: str, kind: int) -> str:
    """WordPiece marks what goes on in a word, llama.cpp what begins one."""
    if kind == gguf.TokenType.CONTROL:
        return token
    return token[2:] if token.startswith("##") else _SPACE + token


def _with_bytes(tokens: list[str], types: list[int], model: dict[str, Any]) -> list[int]:
    def kind(token: str, now: int) -> int:
        if token == model.get("unk_token"):
            return gguf.TokenType.UNKNOWN
        return gguf.TokenType.BYTE if len(token) == 6 and token.startswith("<0x") and token[-1] == ">" else now

    return [kind(token, now) for token, now in zip(tokens, types, strict=True)]


def _scores(tokens: list[str], model: dict[str, Any]) -> list[float]:
    """SentencePiece merges the pair of the highest score first: the earlier a merge, the higher."""
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(_pairs(model["merges"])):
        ranks.setdefault(left + right, rank)
    return [-float(ranks.get(token, len(ranks))) for token in tokens]


def _pairs(merges: list[Any]) -> Iterator[tuple[str, str]]:
    for merge in merges:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        yield left, right


def _steps(step: dict[str, Any] | None, inner: str) -> list[dict[str, Any]]:
    """A normalizer or pre-tokenizer as the list of its steps; `inner` is what a Sequence calls them."""
    if step is None:
        return []
    if step.get("type") != "Sequence":
        return [step]
    return [each for below in step[inner] for each in _steps(below, inner)]


def _adds_prefix(found: dict[str, Any]) -> bool:
    """Whether a text begins with a space that nobody wrote."""
    if any(step.get("type") == "Prepend" for step in _steps(found.get("normalizer"), "normalizers")):
        return True
    spaces = [step for step in _steps(found.get("pre_tokenizer"), "pretokenizers") if step.get("type") == "Metaspace"]
    older = ["always" if step.get("add_prefix_space", True) else "never" for step in spaces]
    return any(step.get("prepend_scheme", old) != "never" for step, old in zip(spaces, older, strict=True))


def _case(found: dict[str, Any]) -> dict[str, bool]:
    """Whether case and accents count; llama.cpp drops accents with the case where nothing else is said."""
    steps = {step.get("type"): step for step in _steps(found.get("normalizer"), "normalizers")}
    bert = steps.get("BertNormalizer")
    if bert is None:
        return {_LOWERCASE: "Lowercase" in steps, _STRIP_ACCENTS: "StripAccents" in steps}
    accents = {} if bert.get("strip_accents") is None else {_STRIP_ACCENTS: bool(bert["strip_accents"])}
    return {_LOWERCASE: bool(bert.get("lowercase", True)), **accents}


def _find_pre(pre_tokenizer: dict[str, Any] | None) -> str:
    steps = _steps(pre_tokenizer, "pretokenizers")
    kinds = [str(step.get("type")) for step in steps]
    patterns = [step["pattern"].get("Regex") for step in steps if step.get("type") == "Split"]
    name = None
    if patterns and None not in patterns and set(kinds) <= {"Split", "ByteLevel"}:
        name = PRE_TOKENIZERS.get("".join(patterns))
    elif kinds == ["ByteLevel"] and steps[0].get("use_regex") is not False:
        name = "gpt-2"
    if name is None:
        why = "is not known here; give llama.cpp's name of it (`pre`, see its llama-vocab.cpp)"
        raise ConfigError("pre_tokenizer", str([kinds, patterns])[:160], why)
    return name
