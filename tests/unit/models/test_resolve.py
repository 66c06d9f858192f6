import hashlib
import os
import pickle
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import MappingProxyType

import huggingface_hub
import pytest
from huggingface_hub import constants

from lltm_ray.errors import ConfigError, ModelDownloadError, ModelNotFoundError
from lltm_ray.models import resolve as resolving
from lltm_ray.models.catalog import CatalogEntry
from lltm_ray.models.gguf import read_gguf
from lltm_ray.models.resolve import DEMONSTRATIONS, Origin, resolve

COMMIT = "a" * 40


class HubHandler(BaseHTTPRequestHandler):
    """The hub's `resolve` endpoint: files with ETag and commit, and its own error codes."""

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, *, body):
        self.server.seen.append(f"{self.command} {self.path}")
        raw = self.server.files.get(self.path)
        if raw is None:
            return self.refuse()
        if isinstance(raw, tuple):
            return self.refuse(*raw)
        start = int((self.headers.get("Range") or "bytes=0-")[6:].split("-")[0])
        self.send_response(206 if start else 200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha256(raw).hexdigest()}"')
        self.send_header("Content-Length", str(len(raw) - start))
        self.end_headers()
        if body:
            self.wfile.write(raw[start:])
        return None

    def refuse(self, status=404, code="EntryNotFound"):
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


def point_to(monkeypatch, endpoint):
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    server = ThreadingHTTPServer(("127.0.0.1", 0), HubHandler)
    server.files, server.seen = {}, []
    point_to(monkeypatch, f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    huggingface_hub.close_session()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def find(tmp_path):
    return lambda model, **options: resolve(model, cache_dir=tmp_path / "cache", **options)


@pytest.fixture
def catalogue(monkeypatch, tiny_path):
    def put(**fields):
        base = {"repo": "us/m-GGUF", "file": "m-q8_0.gguf", "licence": "mit", "parameters": 1, "context": 512}
        entry = CatalogEntry(name="m-q8_0", architecture="llama", **{**base, **fields})
        monkeypatch.setattr(resolving, "load_catalog", lambda: MappingProxyType({"m-q8_0": entry}))
        return entry

    return put


def test_random_is_made_in_the_cache(find, tmp_path):
    found = find("random")
    assert (found.name, found.origin) == ("random", Origin.RANDOM)
    assert found.path.is_relative_to(tmp_path / "cache")
    assert read_gguf(found.path).name == "random"
    assert pickle.loads(pickle.dumps(found)) == found


@pytest.mark.parametrize(("name", "parameters"), [("tiny", 8_917_248), ("tiny-draft", 918_144)])
def test_the_embedded_models_come_with_the_package(find, name, parameters):
    found = find(name)
    assert (found.name, found.origin, found.path.parent.name) == (name, Origin.EMBEDDED, "embedded")
    assert read_gguf(found.path).n_params == parameters
    assert found.path.stat().st_size <= 10_000_000


def test_every_model_without_a_download_is_explained(find):
    assert {find(name).name for name in DEMONSTRATIONS} == {"tiny", "tiny-draft", "random"}


def test_a_path_is_taken_as_it_is(find, tiny_path, monkeypatch):
    found = find(str(tiny_path))
    assert (found.name, found.path, found.origin) == ("tiny", tiny_path, Origin.PATH)
    monkeypatch.chdir(tiny_path.parent)
    assert find("tiny.gguf").path == tiny_path
    assert find("./tiny.gguf").path == tiny_path
    monkeypatch.setenv("HOME", str(tiny_path.parent))
    assert find("~/tiny.gguf").path == tiny_path


def test_a_link_and_a_shard_keep_their_names(find, tiny_path, tmp_path):
    link = tmp_path / "llama-q8_0-00001-of-00003.gguf"
    link.symlink_to(tiny_path)
    found = find(str(link))
    assert (found.name, found.path) == ("llama-q8_0", link)


def test_a_missing_path_is_refused_with_near_misses(find, tmp_path):
    (tmp_path / "llama-3.2-1b.gguf").touch()
    with pytest.raises(ModelNotFoundError, match=r"has llama-3\.2-1b\.gguf"):
        find(str(tmp_path / "lama-3.2-1b.gguf"))
    with pytest.raises(ModelNotFoundError, match="no folder"):
        find(str(tmp_path / "none" / "m.gguf"))
    with pytest.raises(ModelNotFoundError, match=r"a folder.*has llama-3\.2-1b\.gguf"):
        find(str(tmp_path))
    with pytest.raises(ModelNotFoundError, match="no such file"):
        find("missing.gguf")


@pytest.mark.parametrize(("name", "near"), [("tinny", "tiny"), ("tiny-drat", "tiny-draft"), ("ramdom", "random")])
def test_a_mistyped_model_without_a_download_is_suggested(find, name, near):
    with pytest.raises(ModelNotFoundError, match=rf"did you mean .*\b{near}\b"):
        find(name)


@pytest.mark.parametrize("name", ["llama-3.2-1b", "Llama-3.2-1B-Q4_K_M", "lama-3.2-1b-q4km"])
def test_an_unknown_name_is_refused_with_the_closest(find, name):
    with pytest.raises(ModelNotFoundError, match=r"did you mean .*llama-3\.2-1b-q4_k_m.*models list"):
        find(name)


@pytest.mark.parametrize("name", ["", "x" * 5000, "a\0b", "zzzzzz"])
def test_a_name_like_nothing_is_refused(find, name):
    with pytest.raises(ModelNotFoundError, match="models list"):
        find(name)


@pytest.mark.parametrize(
    "model",
    [
        "us/m:../../etc/passwd.gguf",
        "us/m:/etc/passwd.gguf",
        "us/m:a/../b.gguf",
        "us/m:a\\b.gguf",
        "us/..:m.gguf",
        "us/m:m.gguf@../main",
        "us/m:m.bin",
        "us/m:m\n.gguf",
        "us/m?x=1:m.gguf",
    ],
)
def test_a_name_that_would_leave_its_place_is_refused(find, hub, model):
    with pytest.raises(ConfigError):
        find(model)
    assert hub.seen == []


def test_a_hub_file_is_downloaded_once_with_progress(find, hub, tiny_path):
    hub.files["/us/m-GGUF/resolve/main/m.gguf"] = tiny_path.read_bytes()
    said = []
    found = find("us/m-GGUF:m.gguf", progress=lambda *step: said.append(step))
    assert (found.name, found.origin, found.entry) == ("m", Origin.HUB, None)
    assert found.path.read_bytes() == tiny_path.read_bytes()
    size = tiny_path.stat().st_size
    assert said[-1] == ("m.gguf", size, size)
    assert find("us/m-GGUF:m.gguf").path == found.path
    assert [line for line in hub.seen if line.startswith("GET /us")] == ["GET /us/m-GGUF/resolve/main/m.gguf"]
    assert find("us/m-GGUF:m.gguf", offline=True).path == found.path


def test_a_revision_and_a_folder_of_the_repo_are_asked_for(find, hub):
    hub.files["/us/m-GGUF/resolve/v1.0/Q8/m.gguf"] = b"x"
    assert find("us/m-GGUF:Q8/m.gguf@v1.0").path.read_bytes() == b"x"


def test_the_first_shard_brings_the_others(find, hub):
    for number in (1, 2, 3):
        hub.files[f"/us/m/resolve/main/m-{number:05}-of-00003.gguf"] = b"%d" % number
    found = find("us/m:m-00001-of-00003.gguf")
    assert found.name == "m"
    assert sorted(path.read_bytes() for path in found.path.parent.iterdir()) == [b"1", b"2", b"3"]


@pytest.mark.parametrize(
    ("answer", "kind", "why"),
    [
        ((404, "EntryNotFound"), ModelNotFoundError, "has no file m.gguf"),
        ((404, "RepoNotFound"), ModelNotFoundError, "there is no http"),
        ((404, "RevisionNotFound"), ModelNotFoundError, "has no revision 'v9'"),
        ((401, "RepoNotFound"), ModelDownloadError, "hf auth login"),
        ((401, "GatedRepo"), ModelDownloadError, "accept its terms"),
        ((403, "GatedRepo"), ModelDownloadError, "accept its terms"),
        ((403, ""), ModelDownloadError, "HF_TOKEN"),
        ((400, ""), ModelDownloadError, "give the path"),
        ((503, ""), ModelDownloadError, "answered 503"),
    ],
)
def test_what_the_hub_refuses_is_said_with_a_remedy(find, hub, monkeypatch, answer, kind, why):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    hub.files["/us/m/resolve/v9/m.gguf"] = answer
    with pytest.raises(kind, match=why) as caught:
        find("us/m:m.gguf@v9")
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_an_unreachable_hub_is_said_with_a_remedy_and_its_cache_still_serves(find, hub, monkeypatch):
    hub.files["/us/m/resolve/main/m.gguf"] = b"x"
    path = find("us/m:m.gguf").path
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    point_to(monkeypatch, "http://127.0.0.1:9")
    assert find("us/m:m.gguf").path == path
    with pytest.raises(ModelDownloadError, match=r"cannot reach the hub at http://127\.0\.0\.1:9.*give the path"):
        find("us/m:other.gguf")


def test_offline_only_the_cache_serves(find, hub):
    with pytest.raises(ModelDownloadError, match=r"offline, and us/m/m\.gguf is not in the hub's cache") as caught:
        find("us/m:m.gguf", offline=True)
    assert "`lltm-ray models pull us/m:m.gguf`" in str(caught.value)
    assert hub.seen == []


def test_a_catalogue_name_is_fetched_at_its_revision_and_verified(find, hub, catalogue, tmp_path):
    entry = catalogue(revision="v2", sha256=hashlib.sha256(b"right").hexdigest())
    hub.files["/us/m-GGUF/resolve/v2/m-q8_0.gguf"] = b"right"
    found = find("m-q8_0")
    assert (found.name, found.origin, found.entry) == ("m-q8_0", Origin.CATALOG, entry)
    assert len(list((tmp_path / "cache" / "verified").iterdir())) == 1


def test_a_file_with_the_wrong_sha256_is_not_used(find, hub, catalogue):
    catalogue(sha256=hashlib.sha256(b"right").hexdigest())
    hub.files["/us/m-GGUF/resolve/main/m-q8_0.gguf"] = b"wrong"
    with pytest.raises(ModelDownloadError, match="damaged or was changed"):
        find("m-q8_0")


def test_a_verified_file_that_changes_is_verified_again(find, hub, catalogue):
    catalogue(sha256=hashlib.sha256(b"right").hexdigest())
    hub.files["/us/m-GGUF/resolve/main/m-q8_0.gguf"] = b"right"
    blob = Path(os.path.realpath(find("m-q8_0").path))
    blob.write_bytes(b"wrong")
    os.utime(blob, ns=(1, 1))
    with pytest.raises(ModelDownloadError, match="damaged or was changed"):
        find("m-q8_0")
