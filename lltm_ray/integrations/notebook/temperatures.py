"""`compare_temperatures`: one prompt, several temperatures, at the same time and side by side."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from lltm_ray._optional import load
from lltm_ray.errors import ConfigError
from lltm_ray.integrations.notebook._html import paragraph, show
from lltm_ray.integrations.notebook._source import Answer, Prompt, Source, to_answer, to_messages


@dataclass(frozen=True, slots=True)
class Temperatures:
    """Answers to one prompt; a notebook shows them as columns."""

    prompt: str
    answers: tuple[tuple[float, Answer], ...]
    """Temperature and answer, in the order in which they were asked for."""

    def records(self) -> list[dict[str, Any]]:
        """One for each temperature, with the answer's fields."""
        return [{"temperature": temperature} | asdict(answer) for temperature, answer in self.answers]

    def frame(self) -> Any:
        """The same as a DataFrame.

        Raises:
            MissingExtraError: pandas is not installed.
        """
        return load("pandas", extra="pandas", feature="temperatures as a DataFrame").DataFrame(self.records())

    def __repr__(self) -> str:
        return "\n\n".join(f"temperature {each:g}: {answer}\n[{answer.figures}]" for each, answer in self.answers)

    def _repr_html_(self) -> str:
        style = "text-align:left;vertical-align:top;min-width:12em;padding:.3em .8em .3em 0"
        heads = "".join(f'<th scope="col" style="{style}">temperature {each:g}</th>' for each, _ in self.answers)
        cells = "".join(f'<td style="{style}">{paragraph(str(a), a.figures)}</td>' for _, a in self.answers)
        caption = f'<caption style="text-align:left">{show(self.prompt)}</caption>'
        return f"<table>{caption}<thead><tr>{heads}</tr></thead><tbody><tr>{cells}</tr></tbody></table>"


def compare_temperatures(
    cluster: Any,
    prompt: Prompt,
    temperatures: Sequence[float] = (0.0, 0.5, 1.0),
    *,
    api_key: str = "",
    max_tokens: int = 128,
    **params: Any,
) -> Temperatures:
    """Ask the same at several temperatures, all at once over the fleet's slots.

    Args:
        cluster: a `Cluster`, an `InferenceEngine`, or a gateway's base URL.
        prompt: a text, or a list of chat messages; the model's chat template is applied.
        temperatures: 0 is greedy.
        api_key: of the gateway.
        max_tokens: longest answer.
        params: others of /v1/chat/completions, the same for all: `seed`, `model`, ...

    Raises:
        ConfigError: no temperatures, a fleet without a gateway, or a wrong parameter.
        LltmRayError: the first request's error, after all have ended.
    """
    if not temperatures:
        raise ConfigError("temperatures", temperatures, "must name one or more")
    source = Source.of(cluster, api_key=api_key, model=params.pop("model", ""))
    messages, common = to_messages(prompt), source.params(max_tokens=max_tokens, **params)
    with source.client() as client, ThreadPoolExecutor(len(temperatures)) as pool:
        asked = [pool.submit(client.chat, messages, temperature=each, **common) for each in temperatures]
    answers = [to_answer(each.result()) for each in asked]
    return Temperatures(str(messages[-1]["content"]), tuple(zip(temperatures, answers, strict=True)))
