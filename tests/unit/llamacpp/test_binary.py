import os
import sys
from pathlib import Path

import pytest

from lltm_ray.config import Environment
from lltm_ray.errors import ServerBinaryError
from lltm_ray.llamacpp.binary import ServerBinary, cached_servers, find_server, server_version


def script(path: Path, text: str = "exit 0", mode: int = 0o755) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(mode)
    return path


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Environment:
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return Environment(llama_server_path=None, ray_address=None, cache_dir=tmp_path / "cache", hf_offline=True)


def named(environment: Environment, path: Path | str) -> Environment:
    return Environment(
        llama_server_path=str(path),
        ray_address=None,
        cache_dir=environment.cache_dir,
        hf_offline=environment.hf_offline,
    )


def test_with_nothing_installed_the_embedded_engine_is_chosen(environment: Environment) -> None:
    assert find_server(None, environment) == ServerBinary(
        argv=(sys.executable, "-m", "lltm_ray.llamacpp.embedded"), origin="embedded", path=sys.executable
    )


def test_the_order_is_explicit_then_environment_then_path_then_cache(environment: Environment, tmp_path: Path) -> None:
    cached = script(tmp_path / "cache/engines/b10-cpu-x64/llama-server")
    found = find_server(None, environment)
    assert (found.origin, found.argv) == ("cache", (str(cached),))
    on_path = script(tmp_path / "bin/llama-server")
    found = find_server(None, environment)
    assert (found.origin, found.argv) == ("path", (str(on_path),))
    by_name = script(tmp_path / "mine/server")
    found = find_server(None, named(environment, by_name))
    assert (found.origin, found.argv) == ("environment", (str(by_name),))
    chosen = script(tmp_path / "other/server")
    found = find_server(str(chosen), named(environment, by_name))
    assert (found.origin, found.argv) == ("explicit", (str(chosen),))


@pytest.mark.parametrize("source", ["--llama-server", "LLAMA_SERVER_PATH"])
@pytest.mark.parametrize(("name", "why"), [("nowhere", "does not exist"), ("bin", "not a file"), ("plain", "chmod")])
def test_a_named_server_that_cannot_run_is_an_error_that_names_its_source(
    environment: Environment, tmp_path: Path, source: str, name: str, why: str
) -> None:
    script(tmp_path / "bin/llama-server")
    plain = script(tmp_path / "plain", mode=0o644)
    path = str(tmp_path / name)
    explicit, where = (path, environment) if source == "--llama-server" else (None, named(environment, path))
    with pytest.raises(ServerBinaryError, match=why) as caught:
        find_server(explicit, where)
    assert source in str(caught.value)
    assert plain.stat().st_mode & 0o777 == 0o644


def test_embedded_can_be_asked_for_although_another_server_is_installed(
    environment: Environment, tmp_path: Path
) -> None:
    script(tmp_path / "bin/llama-server")
    assert find_server("embedded", environment).origin == "embedded"
    assert find_server(None, named(environment, "embedded")).origin == "embedded"


def test_a_relative_path_and_a_tilde_are_resolved(
    environment: Environment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = script(tmp_path / "home/server")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    assert find_server("~/server", environment).path == str(server)
    assert find_server("home/server", environment).path == str(server)


def test_the_newest_build_of_the_cache_wins_by_number_not_by_spelling(tmp_path: Path) -> None:
    for name in ("b9999-cpu-x64", "b11433-cpu-x64", "custom", ".b99999-cpu-x64.tmp"):
        script(tmp_path / "engines" / name / "llama-server")
    script(tmp_path / "engines/b20000-cpu-x64/llama-server", mode=0o644)
    vulkan = script(tmp_path / "engines/b11433-vulkan-x64/llama-server")
    os.utime(vulkan, (1, 1))
    names = [path.parent.name for path in cached_servers(tmp_path)]
    assert names == ["b11433-cpu-x64", "b11433-vulkan-x64", "b9999-cpu-x64", "custom"]


@pytest.mark.parametrize("stream", ["1", "2"])
def test_the_version_is_read_from_either_stream(tmp_path: Path, stream: str) -> None:
    path = script(tmp_path / "s", f'test "$1" = --version && echo "version: 0.6.0 (build 5, commit ab)" >&{stream}')
    assert server_version(binary_at(path)) == "0.6.0 (build 5, commit ab)"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("echo libcuda.so.1: cannot open >&2; exit 127", "exit code 127 and said: libcuda.so.1: cannot open"),
        ("echo hello", "exit code 0 and said: hello"),
        ("exit 3", "said: nothing"),
        ("exec /bin/sleep 30", "timed out"),
    ],
)
def test_a_server_that_does_not_tell_its_version_is_an_error(tmp_path: Path, text: str, why: str) -> None:
    with pytest.raises(ServerBinaryError, match=why):
        server_version(binary_at(script(tmp_path / "s", text)), timeout_s=0.5 if "sleep" in text else 30)


def test_the_embedded_engine_tells_its_version(tmp_path: Path, environment: Environment) -> None:
    assert "xllamacpp" in server_version(find_server("embedded", environment))


def binary_at(path: Path) -> ServerBinary:
    return ServerBinary(argv=(str(path),), origin="explicit", path=str(path))
