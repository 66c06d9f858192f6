"""`random`: a random-weight Llama of about 0.5 MB, made on first use; llama.cpp serves it on any machine.

Its text means nothing. It is there to measure and test the fleet, not the model: it never ends a generation by itself,
so token counts follow `max_tokens`. `tiny` is the model to talk to.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lltm_ray.errors import ConfigError, ModelFormatError
from lltm_ray.models.gguf import read_gguf

if TYPE_CHECKING:
    import numpy as np

RANDOM_VERSION = 1
"""Part of the file's name; raise it whenever `write_random` writes other bytes for the same shape."""
_SPECIALS = (b"<unk>", b"<s>", b"</s>")
_BYTES = tuple(f"<0x{value:02X}>".encode() for value in range(256))
_PRINTABLE = (*(chr(code).encode() for code in range(33, 127)), "\u2581".encode())
_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_MADE_UNIX_S = 1_700_000_000
"""Time of change of the file, whoever makes it: seals of slots tell files apart by it, and all of these are one."""
_TOKEN_UNKNOWN, _TOKEN_NORMAL, _TOKEN_CONTROL, _TOKEN_BYTE = 2, 1, 3, 6
"""SentencePiece's token types, as llama.cpp numbers them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomShape:
    """Sizes of a generated model; the default is what `random` serves."""

    architecture: str = "llama"
    """`llama`, or `cohere2`: the same tensors with sliding-window layers (three of four)."""
    n_embd: int = 64
    n_head: int = 4
    n_head_kv: int = 2
    n_layer: int = 2
    n_ff: int = 128
    n_ctx: int = 8192
    """Trained context in tokens."""
    sliding_window: int = 0
    """Window in tokens of `cohere2`'s sliding-window layers."""
    seed: int = 0

    def __post_init__(self) -> None:
        _require(self.architecture in ("llama", "cohere2"), "architecture", self.architecture, "llama or cohere2")
        _require(self.n_embd % (2 * self.n_head) == 0, "n_embd", self.n_embd, "must be an even multiple of n_head")
        _require(self.n_head % self.n_head_kv == 0, "n_head", self.n_head, "must be a multiple of n_head_kv")
        windowed = self.architecture == "cohere2"
        _require(windowed == (self.sliding_window > 0), "sliding_window", self.sliding_window, "for cohere2 alone")


def _require(ok: bool, field: str, value: Any, why: str) -> None:
    if not ok:
        raise ConfigError(field, value, why)


def ensure_random(cache_dir: Path) -> Path:
    """The random model's file, made if it is not there yet; any number of makers may run at once.

    Args:
        cache_dir: our cache folder; the file lies in its `models`.

    Returns:
        Path of the GGUF; version and shape are part of its name, so an old file is never taken for a new one.
    """
    shape = RandomShape()
    digest = hashlib.sha256(repr(astuple(shape)).encode()).hexdigest()[:8]
    path = cache_dir / "models" / f"random-v{RANDOM_VERSION}-{digest}.gguf"
    if not _is_whole(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _replace(path, shape)
    return path


def _is_whole(path: Path) -> bool:
    """Whether the file is there and complete; a damaged one is made anew."""
    try:
        return path.exists() and bool(read_gguf(path).tensors)
    except ModelFormatError:
        return False


def _replace(path: Path, shape: RandomShape) -> None:
    handle, scratch = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    try:
        write_random(Path(scratch), shape)
        Path(scratch).chmod(0o644)  # mkstemp's 0600 would shut out other users of a shared cache
        os.utime(scratch, (_MADE_UNIX_S, _MADE_UNIX_S))
        Path(scratch).replace(path)
    finally:
        Path(scratch).unlink(missing_ok=True)


def write_random(path: Path, shape: RandomShape | None = None) -> None:
    """Write a model of the given shape; the same shape gives the same bytes.

    The vocabulary is three specials, 256 byte tokens (so any text tokenizes) and printable ASCII. Output rows of
    all but printable tokens are zero, hence generated text is printable and never ends by itself.

    Args:
        path: where to write; overwritten if there. Not atomic: see `ensure_random`.
        shape: the sizes; `RandomShape()` if not given.
    """
    import gguf  # takes 0.4 s to import, and is needed only here

    shape = shape or RandomShape()
    writer = gguf.GGUFWriter(path, shape.architecture)
    _write_metadata(writer, shape)
    for name, values in _build_tensors(shape).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_metadata(writer: Any, shape: RandomShape) -> None:
    tokens = [*_SPECIALS, *_BYTES, *_PRINTABLE]
    writer.add_name("random")
    writer.add_description("random weights: to try and measure a fleet, its answers mean nothing")
    writer.add_file_type(0)
    writer.add_context_length(shape.n_ctx)
    writer.add_embedding_length(shape.n_embd)
    writer.add_block_count(shape.n_layer)
    writer.add_feed_forward_length(shape.n_ff)
    writer.add_head_count(shape.n_head)
    writer.add_head_count_kv(shape.n_head_kv)
    writer.add_rope_dimension_count(shape.n_embd // shape.n_head)
    writer.add_vocab_size(len(tokens))
    if shape.architecture == "cohere2":
        writer.add_sliding_window(shape.sliding_window)
        writer.add_layer_norm_eps(1e-5)
        writer.add_logit_scale(1.0)
    else:
        writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * (len(tokens) - len(_PRINTABLE)) + [-float(i) for i in range(len(_PRINTABLE))])
    kinds = [_TOKEN_UNKNOWN, _TOKEN_CONTROL, _TOKEN_CONTROL]
    writer.add_token_types([*kinds, *[_TOKEN_BYTE] * 256, *[_TOKEN_NORMAL] * len(_PRINTABLE)])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(_TEMPLATE)


def _build_tensors(shape: RandomShape) -> dict[str, np.ndarray[Any, Any]]:
    """Tensors by GGUF name, float32, rows first (n_out, n_in)."""
    import numpy as np

    random = np.random.default_rng(shape.seed)

    def draw(rows: int, columns: int, scale: float) -> np.ndarray[Any, Any]:
        return (random.standard_normal((rows, columns)) * scale).astype(np.float32)

    n_vocab = len(_SPECIALS) + len(_BYTES) + len(_PRINTABLE)
    n_kv = shape.n_embd // shape.n_head * shape.n_head_kv
    ones = np.ones(shape.n_embd, np.float32)
    tensors = {"token_embd.weight": draw(n_vocab, shape.n_embd, 1.0), "output_norm.weight": ones}
    for block in (f"blk.{index}." for index in range(shape.n_layer)):
        tensors[block + "attn_norm.weight"] = ones
        tensors[block + "attn_q.weight"] = draw(shape.n_embd, shape.n_embd, 0.3)
        tensors[block + "attn_k.weight"] = draw(n_kv, shape.n_embd, 0.3)
        tensors[block + "attn_v.weight"] = draw(n_kv, shape.n_embd, 0.3)
        tensors[block + "attn_output.weight"] = draw(shape.n_embd, shape.n_embd, 0.3)
        tensors[block + "ffn_gate.weight"] = draw(shape.n_ff, shape.n_embd, 0.3)
        tensors[block + "ffn_up.weight"] = draw(shape.n_ff, shape.n_embd, 0.3)
        tensors[block + "ffn_down.weight"] = draw(shape.n_embd, shape.n_ff, 0.3)
        if shape.architecture == "llama":
            tensors[block + "ffn_norm.weight"] = ones
    if shape.architecture == "llama":  # cohere2 ties its output to the embeddings
        output = draw(n_vocab, shape.n_embd, 0.5)
        output[: -len(_PRINTABLE)] = 0.0
        tensors["output.weight"] = output
    return tensors
