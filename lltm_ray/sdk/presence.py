"""What of a start can be told wrong while something else still runs, and is to be ended for it."""

from __future__ import annotations

from contextlib import suppress
from functools import partial

from lltm_ray.config import FleetConfig, read_environment
from lltm_ray.errors import ModelDownloadError
from lltm_ray.llamacpp.binary import find_server
from lltm_ray.models.gguf import read_model
from lltm_ray.models.resolve import is_local, resolve


def check_models(config: FleetConfig, *, is_here: bool = True) -> None:
    """Refuse models that no engine would find or read.

    Args:
        config: what is to start.
        is_here: engines run on this machine: models are downloaded now. Else nothing is, and only names are looked at,
            which mean the same on every node.

    Raises:
        ModelError, ServerBinaryError, ConfigError: as the start would, when it is too late.
    """
    environment = read_environment()
    find = partial(resolve, cache_dir=environment.cache_dir)
    if is_here:
        find_server(config.llama_server, environment)
    for model in config.served():
        engine = model.engine or config.engine
        for name in filter(None, (model.model, engine.model_draft)):
            if is_here:
                read_model(find(name, offline=environment.hf_offline).path)
            elif not is_local(name):
                with suppress(ModelDownloadError):
                    find(name, offline=True)
