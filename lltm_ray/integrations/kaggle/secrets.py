"""Tokens and keys, one at a time, from where the service keeps them: Kaggle's secrets, Colab's, or the environment.

```python
token = secrets.get("HF_TOKEN")
resolve("owner/gated:model.gguf", cache_dir=cache, token=token.reveal())

with secrets.use("WANDB_API_KEY"):  # for a library that reads only the environment
    wandb.login()
```

Nothing is copied into the environment by itself: every process started later would inherit it.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from lltm_ray import _optional
from lltm_ray.errors import ConfigError, MissingExtraError
from lltm_ray.integrations.kaggle.machine import Service, which_service

_REMEDIES = {
    Service.KAGGLE: "attach it to this notebook (Add-ons > Secrets), with the internet on",
    Service.COLAB: "add it under the key in the left bar and grant this notebook access",
    Service.PLAIN: "set it in the environment",
}
_in_use = threading.RLock()


class Secret:
    """A text that shows itself only through `reveal`; it neither prints nor pickles."""

    __slots__ = ("_text", "name", "source")

    def __init__(self, name: str, text: str, source: str) -> None:
        self.name, self.source, self._text = name, source, text

    def reveal(self) -> str:
        """The text itself, for whoever needs it."""
        return self._text

    def __repr__(self) -> str:
        return f"Secret({self.name!r}, from {self.source})"

    def __reduce__(self) -> str:
        raise ConfigError("secret", self.name, "does not pickle: fetch it in the process that needs it")


def get(name: str, *, environ: Mapping[str, str] | None = None, root: Path = Path("/")) -> Secret:
    """One secret, from the service where it has one of that name, else from the environment.

    Raises:
        ConfigError: it is nowhere; with what the service said.
    """
    env = os.environ if environ is None else environ
    service, _ = which_service(env, root)
    text, why = _ask(service, name)
    if text:
        return Secret(name, text, str(service))
    if env.get(name):
        return Secret(name, env[name], "environment")
    raise ConfigError("secret", name, f"was not found{why}: {_REMEDIES[service]}")


def find(name: str, *, environ: Mapping[str, str] | None = None, root: Path = Path("/")) -> Secret | None:
    """As `get`; None where there is none."""
    try:
        return get(name, environ=environ, root=root)
    except ConfigError:
        return None


@contextmanager
def use(name: str) -> Iterator[None]:
    """The secret in this process's environment while the block runs, and as it was before after that.

    Only for libraries that take it no other way: processes started inside inherit it.

    Raises:
        ConfigError: as `get`.
    """
    with _in_use:
        before = os.environ.get(name)
        os.environ[name] = get(name).reveal()
        try:
            yield
        finally:
            if before is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = before


def _ask(service: Service, name: str) -> tuple[str, str]:
    """The text, or why not; the services' own errors name the secret, never what it holds."""
    reach = {Service.KAGGLE: _of_kaggle, Service.COLAB: _of_colab}.get(service)
    if reach is None:
        return "", ""
    try:
        return reach()(name) or "", ""
    except MissingExtraError as error:
        return "", f" ({error.message})"
    except Exception as error:  # noqa: BLE001 - each service has its own, which cannot be named without it
        return "", f" ({service}: {type(error).__name__})"


def _of_kaggle() -> Callable[[str], str]:
    client = _optional.load("kaggle_secrets:UserSecretsClient", install="part of Kaggle's image")
    fetch: Callable[[str], str] = client().get_secret
    return fetch


def _of_colab() -> Callable[[str], str]:
    fetch: Callable[[str], str] = _optional.load("google.colab.userdata", install="part of Colab's image").get
    return fetch
