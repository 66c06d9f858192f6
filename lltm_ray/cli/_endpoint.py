"""Which gateway a command talks to: the one it is given, else the running fleet's. Imports no Ray."""

from __future__ import annotations

from typing import Annotated

import typer

from lltm_ray.actors.runstate import RunState
from lltm_ray.errors import ConfigError
from lltm_ray.llamacpp.base_url import base_url

UrlOption = Annotated[
    str, typer.Option(help="Base URL of a gateway or of one llama-server.", show_default="the fleet's own")
]
NameOption = Annotated[str, typer.Option(help="The fleet's name; left out: the only one that runs here, if it is one.")]
_DEFAULT = "default"


def fleet_meant(name: str) -> str:
    """The name; where none was given and no fleet has the default one, that of the only fleet that runs here.

    Raises:
        ConfigError: several run here, and none of them has the default name.
    """
    if name != _DEFAULT or RunState.load(name) is not None:
        return name
    others = [state.name for state in RunState.running()]
    if len(others) > 1:
        raise ConfigError("name", name, f"no such fleet runs here; give --name, one of {', '.join(others)}")
    return others[0] if others else name


def endpoint_of(url: str, name: str) -> str:
    """The URL that was given, without OpenAI's `/v1`; else that of the fleet that `lltm-ray up` started here.

    Raises:
        ConfigError: that is no URL; or none was given, and no such fleet runs here, or it has no gateway.
    """
    if url:
        return base_url(url)
    state = RunState.load(name := fleet_meant(name))
    if state is None:
        raise ConfigError("name", name, f"no such fleet runs here; start it (lltm-ray up --name {name}), or give --url")
    if not state.endpoint:
        raise ConfigError("name", name, "this fleet has no gateway; give the --url of another one")
    return state.endpoint
