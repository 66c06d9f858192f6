"""A LoRA adapter as PEFT saves it: `adapter_config.json` and `adapter_model.safetensors`, read without trusting them.

How much a module's b a counts is PEFT's own rule (peft/tuners/lora/layer.py): lora_alpha / r, or lora_alpha / sqrt(r)
with use_rslora, where `alpha_pattern` and `rank_pattern` replace both for modules whose name ends as the pattern says.
"""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lltm_ray.errors import ConfigError, ModelFormatError, ModelNotFoundError
from lltm_ray.models.convert.checkpoint import StoredTensor, read_header

CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
_JSON_LIMIT_BYTES = 16 * 2**20
_PREFIX = "base_model.model."
_HALF = re.compile(r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<half>[AB])(\.default)?(\.weight)?\Z")
_PLAIN = re.compile(r"([A-Za-z0-9_-]|\\?\.)*\Z")
_LONGEST_KEY, _MOST_PATTERNS = 200, 4096
_REFUSED = {
    "use_dora": "llama.cpp has no magnitudes: train without DoRA, or merge the adapter into its checkpoint with PEFT",
    "modules_to_save": "an adapter holds no whole modules: merge it into its checkpoint with PEFT, and convert that",
    "fan_in_fan_out": "no family that is converted here has transposed matrices",
    "lora_bias": "llama.cpp adds no bias of an adapter; train without",
    "use_qalora": "llama.cpp does not pool an adapter's input; train without",
    "use_bdlora": "llama.cpp has no block-diagonal adapters; train without",
    "layer_replication": "the model would have other layers; merge it with PEFT and convert that",
    "target_parameters": "these are matrices of experts; they cannot be converted here",
    "trainable_token_indices": "llama.cpp's adapters hold no single rows; merge it with PEFT and convert that",
    "alora_invocation_tokens": "adapters that work behind certain tokens only cannot be converted here",
    "invocation_string": "adapters that work behind certain tokens only cannot be converted here",
    "arrow_config": "llama.cpp chooses no adapter by token",
}
_OTHER_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""`init_lora_weights` that change the base, too: the saved factors belong to that other one."""


@dataclass(frozen=True, slots=True)
class PeftPair:
    """The factors of one module; of an embedding a is [rank, rows] and b [width, rank]."""

    a: StoredTensor
    b: StoredTensor
    is_embedding: bool
    scaling: float
    """What b a is multiplied by."""

    @property
    def rank(self) -> int:
        """The size that both have in common."""
        return self.a.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """Of the matrix that it changes: rows, columns."""
        sizes = self.b.shape[0], self.a.shape[1]
        return (sizes[1], sizes[0]) if self.is_embedding else sizes


@dataclass(frozen=True, slots=True)
class PeftAdapter:
    """What the folder holds."""

    alpha: float
    """Divided by its rank it is the scaling of a module that no pattern names."""
    pairs: dict[str, PeftPair]
    """By the module's name in the checkpoint, with `.weight`."""


def read_peft(folder: str | os.PathLike[str]) -> PeftAdapter:
    """Read a folder; the factors themselves are read later.

    Raises:
        ModelNotFoundError: something of it is missing.
        ModelFormatError: something of it is damaged.
        ConfigError: an adapter of a kind that llama.cpp does not compute.
    """
    path = Path(folder)
    if not (path / WEIGHTS).is_file():
        why = f"it has no {WEIGHTS}"
        if (path / PICKLED).exists():
            why += (
                f", and {PICKLED} is a pickle, which may run code: save it again (save_pretrained of PEFT 0.5 or later)"
            )
        raise ModelNotFoundError(str(folder), why)
    config = read_json(path / CONFIG)
    if config is None:
        raise ModelNotFoundError(str(folder), f"it has no {CONFIG}; give the folder that PEFT's save_pretrained made")
    _refuse(config)
    rules = _Scaling(config)
    pairs = {
        f"{module}.weight": PeftPair(found["A"], found["B"], is_embedding, rules.of(module, found["A"].shape[0]))
        for (module, is_embedding), found in _halves(path / WEIGHTS).items()
    }
    if not pairs:
        raise ModelFormatError(str(path / WEIGHTS), 0, "changes nothing: it has no tensors")
    return PeftAdapter(rules.written_alpha, pairs)


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object; None where there is no such file.

    Raises:
        ModelFormatError: it is something else, or too large.
    """
    try:
        if path.stat().st_size > _JSON_LIMIT_BYTES:
            raise ModelFormatError(str(path), 0, f"is larger than {_JSON_LIMIT_BYTES} bytes")
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelFormatError(str(path), 0, f"cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise ModelFormatError(str(path), 0, "must hold a JSON object")
    return found


def _refuse(config: dict[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ConfigError("peft_type", kind, "must be LORA; others cannot be expressed in llama.cpp")
    if config.get("bias", "none") != "none":
        raise ConfigError("bias", config["bias"], "must be none: llama.cpp's adapters hold no biases")
    for name, why in _REFUSED.items():
        if config.get(name):
            raise ConfigError(name, str(config[name])[:80], why)
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_OTHER_BASE):
        why = "its factors belong to a changed base: save it with path_initial_model_for_weight_conversion"
        raise ConfigError("init_lora_weights", start[:80], why)


class _Scaling:
    """By module, as the configuration has it."""

    def __init__(self, config: dict[str, Any]) -> None:
        self._is_rslora = config.get("use_rslora") is True
        self._alpha = _number(config, "lora_alpha", config.get("lora_alpha"))
        self._rank = _number(config, "r", config.get("r"))
        self._alphas, self._ranks = _patterns(config, "alpha_pattern"), _patterns(config, "rank_pattern")
        self.written_alpha = self._alpha * (math.sqrt(self._rank) if self._is_rslora else 1.0)

    def of(self, module: str, rank: int) -> float:
        wanted, alpha = _match(self._ranks, module, self._rank), _match(self._alphas, module, self._alpha)
        if wanted != rank:
            raise ConfigError("r", wanted, f"{module[:80]} has rank {rank}; is {CONFIG} another adapter's?")
        return alpha / (math.sqrt(rank) if self._is_rslora else rank)


def _number(config: dict[str, Any], name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
        raise ConfigError(name, str(value)[:80], f"{CONFIG} must have a number above 0 there")
    return float(value)


class _Pattern:
    r"""PEFT's `re.match(r"(.*\.)?(KEY)$", module)`, for keys of plain names, dots and `.*`, in linear time.

    Keys come from a stranger, and re tries all ways to divide a name; between two `.*` there is one way here.
    """

    def __init__(self, key: str) -> None:
        pieces = key.removeprefix("^").removesuffix("$").split(".*")
        if len(key) > _LONGEST_KEY or not all(map(_PLAIN.match, pieces)):
            raise ValueError(key)
        pieces[0] = (r"\A\." if key.startswith("^") else r"\.") + pieces[0]
        pieces[-1] += r"\Z"
        self._pieces = [re.compile(each) for each in pieces]

    def fits(self, module: str) -> bool:
        """Whether it names the module, or its end after a dot."""
        name, at = f".{module}", 0
        for piece in self._pieces:
            found = piece.search(name, at)
            if found is None:
                return False
            at = found.end()
        return True


def _patterns(config: dict[str, Any], name: str) -> list[tuple[_Pattern, float]]:
    given = config.get(name) or {}
    if not isinstance(given, dict) or len(given) > _MOST_PATTERNS:
        raise ConfigError(name, str(given)[:80], f"must be an object of at most {_MOST_PATTERNS} names and numbers")
    found = []
    for key, value in given.items():
        try:
            found.append((_Pattern(key), _number(config, name, value)))
        except ValueError as error:
            raise ConfigError(name, key[:80], "must be a module's name or its end; `.*` may stand in it") from error
    return found


def _match(patterns: list[tuple[_Pattern, float]], module: str, otherwise: float) -> float:
    """The first one that fits, as PEFT looks for it."""
    return next((value for pattern, value in patterns if pattern.fits(module)), otherwise)


def _halves(path: Path) -> dict[tuple[str, bool], dict[str, StoredTensor]]:
    found: dict[tuple[str, bool], dict[str, StoredTensor]] = {}
    for each in read_header(path):
        name = each.name.removeprefix(_PREFIX)
        match = _HALF.match(name)
        if match is None:
            if name.endswith(
                ".base_layer.weight"
            ):  # PEFT repeats an embedding that has an adapter: it is the base's own
                continue
            why = f"{name[:80]!r} is no factor of a matrix: merge the adapter into its checkpoint, and convert that"
            raise ConfigError("adapter", str(path), why)
        halves = found.setdefault((match["module"], bool(match["embedding"])), {})
        if match["half"] in halves or len(each.shape) != 2:
            raise ModelFormatError(str(path), each.offset_bytes, f"{name[:80]!r} is there twice, or is no matrix")
        halves[match["half"]] = each
    for (module, _), halves in found.items():
        if halves.keys() != {"A", "B"} or halves["A"].shape[0] != halves["B"].shape[1] or 0 in halves["A"].shape:
            raise ModelFormatError(str(path), 0, f"{module[:80]!r} has not two factors of one rank")
    return found
