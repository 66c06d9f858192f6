"""Profiles: the metrics of each version of the GenAI conventions, and the attributes that it calls otherwise.

Sources and their pinned commits: `semconv`. One profile is spoken at a time; `1.41` unless
`OTEL_SEMCONV_STABILITY_OPT_IN` holds `gen_ai_latest_experimental`, which is the conventions' own switch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from lltm_ray.errors import ConfigError
from lltm_ray.telemetry import semconv as names

# --- bucket bounds, as the conventions advise them
DURATION_BOUNDS: Final = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
TTFT_BOUNDS: Final = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1),
    *(0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
)
TPOT_BOUNDS: Final = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
TOKEN_BOUNDS: Final = tuple(float(4**power) for power in range(14))
QUEUE_BOUNDS: Final = (*TTFT_BOUNDS, 30.0, 60.0, 120.0)
"""Ours."""

EXPERIMENTAL: Final = "gen_ai_latest_experimental"
OPT_IN: Final = "OTEL_SEMCONV_STABILITY_OPT_IN"


class Metric(NamedTuple):
    """One instrument."""

    name: str
    kind: str
    """`histogram`, `counter`, `up_down_counter`, `gauge`."""
    unit: str
    description: str
    bounds: tuple[float, ...] = ()
    """Upper bounds of a histogram's buckets."""
    attributes: Mapping[str, str] = {}
    """What every measurement of this quantity carries besides."""


Quantities = Mapping[str, tuple[Metric, ...]]
"""What we measure of an attempt -> the instruments that take it. Quantities: `duration` and `first_chunk` (seconds),
`input_tokens`, `output_tokens`, `cached_tokens`, `written_tokens`."""


@dataclass(frozen=True)
class Profile:
    """How one version of the conventions names what we measure."""

    name: str
    schema_url: str
    client: Mapping[str, Quantities]
    """Operation -> its metrics as a client of llama-server sees them."""
    renamed: Mapping[str, str] = field(default_factory=dict)
    """Attribute of the newest conventions -> its name here, on any span."""

    @property
    def cache_write(self) -> str:
        """Attribute of prompt tokens that were computed and left in the slot's cache."""
        return self.renamed.get(names.USAGE_CACHE_WRITE, names.USAGE_CACHE_WRITE)


def _seconds(name: str, description: str) -> tuple[Metric, ...]:
    return (Metric(name, "histogram", "s", description, DURATION_BOUNDS),)


def _tokens(name: str, description: str, **attributes: str) -> Metric:
    return Metric(name, "histogram", "{token}", description, TOKEN_BOUNDS, attributes)


def _usage(of: str) -> Metric:
    """A sum; llama-server does not tell text from images, so neither do we."""
    name, description = f"gen_ai.client.inference.usage.{of}", f"Sum of {of.replace('.', ' ').replace('_', ' ')}"
    return Metric(name, "counter", "{token}", description, attributes={names.TOKEN_MODALITY: "unknown"})


_DURATION = _seconds("gen_ai.client.operation.duration", "Duration of a request to llama-server")
_USED = "Tokens of a request to llama-server; input holds cached ones"
_OLD: Quantities = {
    "duration": _DURATION,
    "first_chunk": _seconds("gen_ai.client.operation.time_to_first_chunk", "From sending to the first generated text"),
    "input_tokens": (_tokens("gen_ai.client.token.usage", _USED, **{names.TOKEN_TYPE: "input"}),),
    "output_tokens": (_tokens("gen_ai.client.token.usage", _USED, **{names.TOKEN_TYPE: "output"}),),
}
_NEW: Quantities = {
    "duration": _seconds("gen_ai.client.inference.duration", "Duration of a request to llama-server"),
    "first_chunk": _seconds("gen_ai.client.inference.time_to_first_chunk", "From sending to the first generated text"),
    "input_tokens": (
        _usage("input_tokens"),
        _tokens("gen_ai.client.inference.operation.input_tokens", "Input tokens of a request, cached ones included"),
    ),
    "output_tokens": (
        _usage("output_tokens"),
        _tokens("gen_ai.client.inference.operation.output_tokens", "Generated tokens of a request"),
    ),
    "cached_tokens": (_usage("cache_read.input_tokens"),),
    "written_tokens": (_usage("cache_write.input_tokens"),),
}
_NEW_EMBEDDINGS: Quantities = {
    "duration": _seconds("gen_ai.client.embeddings.duration", "Duration of an embeddings request to llama-server"),
    "input_tokens": (
        _tokens("gen_ai.client.embeddings.operation.input_tokens", "Input tokens of an embeddings request"),
    ),
}
_ONLY_INPUT: Quantities = {key: _OLD[key] for key in ("duration", "input_tokens")}

PROFILES: Final[Mapping[str, Profile]] = {
    "1.41": Profile(
        name="1.41",
        schema_url="https://opentelemetry.io/schemas/1.41.0",
        client={names.CHAT: _OLD, names.TEXT: _OLD, names.EMBEDDINGS: _ONLY_INPUT, names.RERANK: _ONLY_INPUT},
        renamed={names.USAGE_CACHE_WRITE: names.USAGE_CACHE_CREATION, names.RETRIEVAL_TOP_K: names.REQUEST_TOP_K},
    ),
    "genai-dev": Profile(
        name="genai-dev",
        schema_url="",  # planned as .../schemas/gen-ai-dev/X.Y.Z-dev; none is published
        client={
            names.CHAT: _NEW,
            names.TEXT: _NEW,
            names.EMBEDDINGS: _NEW_EMBEDDINGS,
            names.RERANK: {"duration": _DURATION},
        },
    ),
}
"""Name -> profile."""


def read_profile(environ: Mapping[str, str], name: str = "") -> Profile:
    """The profile to speak.

    Args:
        environ: of the process; `OTEL_SEMCONV_STABILITY_OPT_IN` is read.
        name: of the configuration; it wins over the environment. Empty: not configured.

    Raises:
        ConfigError: no profile has this name.
    """
    if name and name not in PROFILES:
        raise ConfigError("semconv", name, f"must be one of {', '.join(PROFILES)}")
    opted = {each.strip() for each in environ.get(OPT_IN, "").split(",")}
    return PROFILES[name or ("genai-dev" if EXPERIMENTAL in opted else "1.41")]
