"""What can be told wrong before Ray is started. Apart from `launch`: it needs the gateway's parts, engines do not."""

from __future__ import annotations

from pathlib import Path

from lltm_ray.config import FleetConfig, read_environment
from lltm_ray.gateway.auth import ApiKeys
from lltm_ray.gateway.server import bind
from lltm_ray.llamacpp.binary import find_server
from lltm_ray.models.gguf import read_model
from lltm_ray.models.resolve import check_exists, naming_the_draft, resolve


def check_here(config: FleetConfig) -> None:
    """Refuse what cannot work when everything will run on this machine. Downloads nothing.

    Raises:
        ModelError, ServerBinaryError, ConfigError: as the fleet would, some seconds later.
    """
    environment = read_environment()
    find_server(config.llama_server, environment)
    if config.engine.model_draft is not None:
        with naming_the_draft(config.engine.model_draft):
            check_exists(config.engine.model_draft)
    check_exists(config.model)
    if Path(config.model).suffix == ".gguf" and ":" not in config.model:
        read_model(resolve(config.model, cache_dir=environment.cache_dir).path)
    if config.gateway is not None:
        if config.gateway.api_key_file is not None:
            ApiKeys.from_file(config.gateway.api_key_file)
        bind(config.gateway).close()
