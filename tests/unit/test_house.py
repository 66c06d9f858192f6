"""The house keeps its own rules: what is public, what is imported, how large things are, what the README says."""

from __future__ import annotations

import ast
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lltm_ray
from lltm_ray import errors
from lltm_ray.errors import LltmRayError

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "lltm_ray").rglob("*.py"))
README = (ROOT / "README.md").read_text(encoding="utf-8")
PUBLIC = """
    AsyncLlamaClient Cluster Completion ConfigError Conversation EmbeddingEngine EngineConfig EngineInfo FleetConfig
    GatewayConfig InferResult InferenceEngine LlamaClient LltmRayError SemanticSearch ServerManager StreamEvent
    __version__ build_app split_gpu
"""
SAMPLES = {
    errors.ConfigError: ("port", 99999, "must be from 0 to 65535"),
    errors.MissingExtraError: ("GPU inventory", "nvml"),
    errors.ModelNotFoundError: ("m", "why"),
    errors.ModelFormatError: ("m.gguf", 12, "why"),
    errors.ModelDownloadError: ("m", "why"),
    errors.ModelDoesNotFitError: ("m", 10, 5, "take a smaller one"),
    errors.ExtractionError: (0, 120, "the answer did not end"),
    errors.EngineStartError: ("exit code 1", 1, "tail"),
    errors.EngineExitedError: ("engine-0", -9),
    errors.EngineNotReadyError: ("engine-0", "stopped"),
    errors.RequestTooLargeError: ("body", 2, 1),
    errors.OverloadedError: ("all slots are busy", 2.5),
    errors.DeadlineError: ("chat", 1.0),
    errors.UpstreamError: (418, '{"error":1}'),
    errors.PlacementError: ("1 GPU", "none"),
}


def all_errors(cls=LltmRayError):
    yield cls
    for below in cls.__subclasses__():
        yield from all_errors(below)


def test_the_public_names_are_few_sorted_and_there():
    assert lltm_ray.__all__ == sorted(PUBLIC.split())
    for name in lltm_ray.__all__:
        assert getattr(lltm_ray, name) is not None
    with pytest.raises(AttributeError, match="nothing_like_it"):
        _ = lltm_ray.nothing_like_it


def test_importing_the_package_loads_nothing_slow():
    slow = ("ray", "torch", "numpy", "aiohttp", "uvicorn", "gguf", "huggingface_hub", "xllamacpp", "typer")
    code = f"import lltm_ray, sys; print([name for name in {slow!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("cls", sorted(set(all_errors()), key=lambda cls: cls.__name__))
def test_every_error_crosses_a_process_border_whole(cls):
    error = cls(*SAMPLES.get(cls, ("a message",)))
    error.retry_hint = "kept too"
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is cls
    assert (str(copy), copy.__dict__) == (str(error), error.__dict__)
    assert copy.as_dict()["error"]["code"] == copy.http_status >= 400


def test_every_error_is_drawn_in_the_tree():
    for cls in set(all_errors()):
        assert cls.__name__ in errors.__doc__, cls


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_stay_small(path):
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not is_command(node):
            assert node.end_lineno - node.lineno + 1 <= 40, node.name


def is_command(node):
    """Command functions are their options; one a line."""
    return any("errors_end_the_command" in ast.unparse(decorator) for decorator in node.decorator_list)


@pytest.mark.parametrize(
    ("package", "home"),
    [
        ("xllamacpp", "llamacpp/embedded.py"),
        ("pynvml", "gpu/nvml.py"),
        ("huggingface_hub", "models/resolve.py"),
    ],
)
def test_outside_packages_have_one_home(package, home):
    users = {
        str(path.relative_to(ROOT / "lltm_ray"))
        for path in SOURCES
        if re.search(
            rf"^\s*(import|from) {package}\b|load\(\"{package}", path.read_text(encoding="utf-8"), re.MULTILINE
        )
    }
    assert users == {home}


def test_the_readmes_commands_exist():
    from lltm_ray.cli import COMMANDS

    named = set(re.findall(r"lltm-ray ([a-z]+)", README))
    assert named >= {"up", "status", "down", "chat", "bench", "models", "doctor"}
    assert named <= set(COMMANDS)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"`?make ([a-z]+)", README):
        assert f"\n{target}:" in makefile, target


def test_the_readmes_options_exist():
    from typer.testing import CliRunner

    from lltm_ray.cli import app

    for command, words in re.findall(r"lltm-ray ([a-z]+)((?: [^\n`|#]+)?)", README):
        given = set(re.findall(r"(--[a-z-]+)", words))
        if given:
            groups = words.split()[: {"models": 1 + ("lora" in words.split()[0])}.get(command, 0)]
            shown = CliRunner().invoke(app, [command, *groups, "--help"], env={"COLUMNS": "200"})
            missing = {option for option in given if option not in shown.output}
            assert not missing, (command, missing)


def test_every_setting_in_the_readme_is_a_setting():
    for block in re.findall(r"```toml\n(.*?)```", README, re.DOTALL):
        import tomllib

        from lltm_ray.config import FleetConfig, build

        assert build(FleetConfig, tomllib.loads(block)).engines >= 1
