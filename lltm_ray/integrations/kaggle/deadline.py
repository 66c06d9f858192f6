"""When the machine is taken back: services end a session after so many hours, whatever runs on it."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from lltm_ray.errors import ConfigError
from lltm_ray.integrations.kaggle.machine import Service, has_tpu, which_service

HOUR_S = 3600.0
LIMITS_S: Mapping[Service, float] = {Service.KAGGLE: 12 * HOUR_S, Service.COLAB: 12 * HOUR_S}
"""Kaggle's documented limit of sessions with CPUs or GPUs; Colab's is an upper bound, sessions may end before."""
KAGGLE_TPU_S = 9 * HOUR_S
ENVIRONMENT = "LLTM_RAY_SESSION_LIMIT_S"
"""Overrides the limits above: services change theirs."""


@dataclass(frozen=True, slots=True)
class Deadline:
    """When a session ends."""

    at_unix_s: float
    reason: str = ""

    @property
    def left_s(self) -> float:
        """Seconds until then; negative once it has passed."""
        return self.at_unix_s - time.time()

    @classmethod
    def after(cls, seconds: float, reason: str = "as it was given") -> Deadline:
        """So many seconds from now."""
        return cls(time.time() + seconds, reason)


def read_deadline(
    limit_s: float | None = None,
    *,
    began_unix_s: float | None = None,
    environ: Mapping[str, str] | None = None,
    root: Path = Path("/"),
) -> Deadline | None:
    """This session's; None where nothing limits it.

    Args:
        limit_s: longest life of the session. None: `LLTM_RAY_SESSION_LIMIT_S`, else the service's documented limit.
        began_unix_s: when it began. None: when the container's first process was started; on a plain machine, when this
            process was.
        environ: None: this process's.
        root: where the service's folders are looked for.

    Raises:
        ConfigError: a limit that is no positive number.
    """
    env = os.environ if environ is None else environ
    service, _ = which_service(env, root)
    documented = KAGGLE_TPU_S if service is Service.KAGGLE and has_tpu(env) else LIMITS_S.get(service)
    given, where = limit_s, "as it was given"
    if given is None and env.get(ENVIRONMENT):
        given, where = _number(env[ENVIRONMENT]), ENVIRONMENT
    if given is not None and not given > 0:
        raise ConfigError("limit_s", given, "must be a positive number of seconds")
    limit = documented if given is None else given
    if limit is None:
        return None
    first = psutil.Process() if service is Service.PLAIN else psutil.Process(1)
    began = first.create_time() if began_unix_s is None else began_unix_s
    reason = f"{limit / HOUR_S:g} h, {where if given is not None else f'the documented limit of {service}'}"
    return Deadline(began + limit, reason)


def time_left_s(limit_s: float | None = None) -> float:
    """Seconds until the session ends; infinity where nothing limits it. See `read_deadline`."""
    found = read_deadline(limit_s)
    return float("inf") if found is None else found.left_s


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ConfigError(ENVIRONMENT, text, "must be a number of seconds") from None
