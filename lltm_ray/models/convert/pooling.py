"""How sentence-transformers makes one vector of many, where a checkpoint is one of its."""

from __future__ import annotations

from pathlib import Path

import gguf

from lltm_ray.errors import ConfigError, ModelFormatError, ModelNotFoundError
from lltm_ray.models.convert.checkpoint import Checkpoint

_KINDS = {
    "mean": gguf.PoolingType.MEAN,
    "mean_tokens": gguf.PoolingType.MEAN,
    "cls": gguf.PoolingType.CLS,
    "cls_token": gguf.PoolingType.CLS,
    "lasttoken": gguf.PoolingType.LAST,
}
"""Its words (`pooling_mode`) and its flags without their `pooling_mode_`."""
_MODULES = ("Transformer", "Pooling", "Normalize")
"""llama.cpp computes these; it divides by the length where asked to, so Normalize needs nothing here."""


def find_pooling(checkpoint: Checkpoint) -> gguf.PoolingType | None:
    """What `modules.json` and the pooling's own configuration say; None where there is no pooling.

    Raises:
        ConfigError: modules or modes that llama.cpp does not compute.
        ModelFormatError, ModelNotFoundError: the pooling's configuration is damaged, or not there.
    """
    modules = [
        (str(module["type"]).rpartition(".")[2], module["path"]) for module in checkpoint.json_list("modules.json")
    ]
    if others := [kind for kind, _ in modules if kind not in _MODULES]:
        raise ConfigError("modules.json", others[0][:80], f"cannot be converted; these can: {', '.join(_MODULES)}")
    paths = [path for kind, path in modules if kind == "Pooling"]
    return _read(checkpoint, paths[0]) if paths else None


def _read(checkpoint: Checkpoint, path: str) -> gguf.PoolingType:
    if Path(path).name != path:
        raise ModelFormatError(str(checkpoint.folder / "modules.json"), 0, f"names {path!r}")
    found = checkpoint.json(f"{path}/config.json")
    if found is None:
        raise ModelNotFoundError(str(checkpoint.folder), f"it lacks {path}/config.json")
    flags = [name.removeprefix("pooling_mode_") for name in found if name.startswith("pooling_mode_") and found[name]]
    modes = flags or [str(found.get("pooling_mode"))]
    if len(modes) != 1 or modes[0] not in _KINDS:
        raise ConfigError("pooling_mode", ", ".join(modes)[:80], "must be one of mean, cls, lasttoken")
    return _KINDS[modes[0]]
