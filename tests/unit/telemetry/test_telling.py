"""What a request's rows tell of it, by whichever way it came."""

import json
from typing import Any

import pytest

from lltm_ray.errors import ConfigError, DeadlineError, UpstreamError
from lltm_ray.telemetry.parameters import read_parameters
from lltm_ray.telemetry.telling import cut_error, known_type, tell_error, tell_parameters

SAID = "the-heron-at-dusk"


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ConfigError("body", SAID, "is no JSON"), "body: is no JSON"),
        (UpstreamError(400, json.dumps({"error": {"message": SAID}})), "llama-server answered 400"),
        (DeadlineError("the request", 2.0), "the request took longer than 2 s"),
        (ValueError(SAID), "ValueError"),
    ],
)
def test_an_error_is_told_without_what_it_quotes(error: Exception, told: str) -> None:
    assert tell_error(error) == told


def test_parameters_keep_only_the_members_that_are_read() -> None:
    fields: dict[str, Any] = {
        "temperature": 0.5,
        "messages": [SAID],
        "response_format": {"type": "json_schema", "json_schema": {"description": SAID}},
        "json_schema": {"description": SAID},
        "metadata": {"gen_ai.agent.name": "crane", "note": SAID},
        "prompt": {"id": "p-1", "version": "2", "variables": {"bird": SAID}},
    }
    told = tell_parameters(fields)
    assert SAID not in told
    assert read_parameters(told) == read_parameters(json.dumps(fields))
    assert SAID not in tell_parameters({"prompt": SAID, "metadata": SAID, "seed": 1})


def test_what_is_too_long_or_no_json_costs_no_row() -> None:
    assert tell_parameters({"stop": ["x" * 5000]}) == ""
    assert json.loads(tell_parameters({"seed": {1, 2}})) == {"seed": "set"}
    assert len(cut_error("\ud800" * 5000).encode()) == 1024


def test_only_a_type_of_llama_servers_own_is_passed_on() -> None:
    assert [known_type(each) for each in ("server_error", SAID, None, ["server_error"])] == ["server_error", "", "", ""]
