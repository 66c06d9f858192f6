"""Secrets come one at a time, from where the service keeps them, and never show."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants

from lltm_ray.errors import ConfigError, ModelDownloadError
from lltm_ray.integrations.kaggle import secrets
from lltm_ray.integrations.kaggle.machine import Machine, detect
from lltm_ray.sdk.quick import _token, quick_start

HIDDEN = "hf_never_to_be_seen"
KAGGLE = {"KAGGLE_KERNEL_RUN_TYPE": "Interactive"}
KAGGLES = f'''
class BackendError(Exception):
    pass


class UserSecretsClient:
    def get_secret(self, label):
        if label == "DOWN":
            raise BackendError("{HIDDEN}")
        if label != "HF_TOKEN":
            raise BackendError("No user secrets exist for kernel")
        return "{HIDDEN}"
'''
COLABS = f"""
class SecretNotFoundError(Exception):
    pass


def get(key):
    if key != "HF_TOKEN":
        raise SecretNotFoundError(key)
    return "{HIDDEN}-colab"
"""


@pytest.fixture
def services(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The modules that the services' images have, as far as they are asked."""
    (tmp_path / "kaggle_secrets.py").write_text(KAGGLES)
    (tmp_path / "google/colab").mkdir(parents=True)
    (tmp_path / "google/colab/userdata.py").write_text(COLABS)
    (tmp_path / "content").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    for name in theirs():
        monkeypatch.delitem(sys.modules, name)
    yield tmp_path
    for name in theirs():
        del sys.modules[name]


def theirs() -> list[str]:
    return [name for name in sys.modules if name.partition(".")[0] in ("kaggle_secrets", "google")]


def test_kaggles_secret_comes_before_the_environment_and_neither_is_copied_there(services: Path) -> None:
    before = dict(os.environ)
    found = secrets.get("HF_TOKEN", environ=KAGGLE | {"HF_TOKEN": "other"}, root=services)
    assert (found.reveal(), found.source) == (HIDDEN, "kaggle")
    assert dict(os.environ) == before


def test_colabs_secret_is_asked_of_colab(services: Path) -> None:
    found = secrets.get("HF_TOKEN", environ={"COLAB_RELEASE_TAG": "x"}, root=services)
    assert (found.reveal(), found.source) == (f"{HIDDEN}-colab", "colab")


def test_what_the_service_lacks_is_taken_from_the_environment(services: Path) -> None:
    found = secrets.get("OTHER", environ=KAGGLE | {"OTHER": "here"}, root=services)
    assert (found.reveal(), found.source) == ("here", "environment")
    assert secrets.find("NOWHERE", environ=KAGGLE, root=services) is None


def test_a_secret_that_is_nowhere_is_an_error_that_says_where_to_put_it(services: Path) -> None:
    with pytest.raises(ConfigError, match=r"kaggle: BackendError.*Add-ons"):
        secrets.get("MISSING", environ=KAGGLE, root=services)
    with pytest.raises(ConfigError, match="set it in the environment"):
        secrets.get("MISSING", environ={}, root=services / "content")
    with pytest.raises(ConfigError) as refusal:
        secrets.get("DOWN", environ=KAGGLE, root=services)
    assert HIDDEN not in str(refusal.value)


def test_outside_kaggles_image_its_module_is_missed_without_a_crash(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not installed"):
        secrets.get("HF_TOKEN", environ=KAGGLE, root=tmp_path)


def test_a_secret_never_prints_and_never_pickles(services: Path) -> None:
    found = secrets.get("HF_TOKEN", environ=KAGGLE, root=services)
    assert HIDDEN not in f"{found} {found!r} {[found]}"
    with pytest.raises(ConfigError, match="does not pickle"):
        pickle.dumps(found)


def test_a_secret_is_in_the_environment_only_while_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def child() -> str:
        code = "import os; print(os.environ.get('LLTM_TEST_SECRET'))"
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()

    monkeypatch.setenv("LLTM_TEST_SECRET", "mine")
    with secrets.use("LLTM_TEST_SECRET"):
        assert child() == "mine"
    assert os.environ["LLTM_TEST_SECRET"] == "mine"
    monkeypatch.delenv("LLTM_TEST_SECRET")
    with pytest.raises(ConfigError), secrets.use("LLTM_TEST_SECRET"):
        pass
    assert child() == "None"


@pytest.fixture
def gated_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[str]]:
    """A hub that refuses everybody; the tokens that it was shown."""
    shown: list[str] = []

    class Gate(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            shown.append(self.headers.get("authorization") or "")
            self.send_response(403)
            self.send_header("X-Error-Code", "GatedRepo")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Gate) as server:
        url = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield shown
        server.shutdown()
        thread.join()


@pytest.fixture
def machine() -> Machine:
    return detect(environ={}, look_online=False)


def test_a_login_that_fails_is_an_error_and_the_token_goes_to_the_hub_alone(
    gated_hub: list[str], machine: Machine
) -> None:
    with pytest.raises(ModelDownloadError, match="accept its terms") as refusal:
        quick_start("a/gated:m.gguf", machine=machine, token=secrets.Secret("HF_TOKEN", HIDDEN, "test"))
    assert set(gated_hub) == {f"Bearer {HIDDEN}"}
    assert HIDDEN not in str(refusal.value)
    assert "HF_TOKEN" not in os.environ


def test_the_secret_of_that_name_is_the_token_unless_another_is_given(
    gated_hub: list[str], machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_from_the_environment")
    with pytest.raises(ModelDownloadError):
        quick_start("a/gated:m.gguf", machine=machine)
    assert set(gated_hub) == {"Bearer hf_from_the_environment"}


@pytest.mark.parametrize("model", ["tiny", "tiny-draft", "random", "./mine.gguf", "~/mine.gguf", "mine.gguf"])
def test_no_service_is_asked_for_a_model_that_is_no_hubs(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(secrets, "find", asked.append)
    shown = _token(None, model), _token("hf_given", model)
    assert (asked, shown) == ([], (None, None))
    assert _token(None, "a/gated:m.gguf") is None
    assert asked == ["HF_TOKEN"]
