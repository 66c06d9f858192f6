"""Resource: who tells all this; on every span, metric and log record that leaves."""

from __future__ import annotations

import os
import socket
import uuid
from collections.abc import Mapping

from opentelemetry.sdk.resources import OTELResourceDetector, Resource

from lltm_ray import __version__

SERVICE = "lltm_ray"


def make_resource(attributes: Mapping[str, str | int] | None = None) -> Resource:
    """This process' resource: service, host, process and SDK.

    The operator's word wins: `OTEL_SERVICE_NAME`, then `OTEL_RESOURCE_ATTRIBUTES`, then `attributes`, then ours. The
    command line is left out, as it may hold keys.

    Args:
        attributes: more of them, or other values for ours.
    """
    ours: dict[str, str | int] = {
        "service.name": SERVICE,
        "service.version": __version__,
        "service.instance.id": str(uuid.uuid4()),
        "host.name": socket.gethostname(),
        "process.pid": os.getpid(),
    }
    return Resource.create(ours | dict(attributes or {})).merge(OTELResourceDetector().detect())
