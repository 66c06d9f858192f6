import hashlib
import io
import os
import stat
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from lltm_ray.config import read_environment
from lltm_ray.errors import ServerBinaryError
from lltm_ray.llamacpp import download, unpack
from lltm_ray.llamacpp.binary import find_server
from lltm_ray.llamacpp.download import default_variant, download_engine, releases

SERVER = b"#!/bin/sh\necho version: 1\n" + os.urandom(300_000)
Entry = tuple[tarfile.TarInfo, bytes]


def regular(name: str, data: bytes = b"data") -> Entry:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    return info, data


def special(name: str, kind: bytes, target: str = "") -> Entry:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info, b""


def tar_gz(*entries: Entry) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as file:
        for info, data in entries:
            file.addfile(info, io.BytesIO(data))
    return out.getvalue()


GOOD = tar_gz(
    special("llama-b1", tarfile.DIRTYPE),
    regular("llama-b1/llama-server", SERVER),
    special("llama-b1/libllama.so", tarfile.SYMTYPE, "libllama.so.0"),
    special("llama-b1/libllama.so.0", tarfile.SYMTYPE, "libllama.so.0.5.0"),
    regular("llama-b1/libllama.so.0.5.0", b"\x7fELF library"),
    regular("llama-b1/LICENSE", b"MIT"),
)


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@dataclass
class Mirror:
    """What the server below answers with, and what it was asked."""

    body: bytes = GOOD
    status: list[int] = field(default_factory=list)
    """Answers for the first requests; then the file."""
    cut_at: list[int] = field(default_factory=list)
    """Bytes after which the first replies break off."""
    ranges: bool = True
    content_range: Callable[[int, int], str] = lambda start, size: f"bytes {start}-{size - 1}/{size}"
    url: str = ""
    asked: list[tuple[str, str | None]] = field(default_factory=list)


class Handler(BaseHTTPRequestHandler):
    mirror: Mirror

    def do_GET(self) -> None:
        mirror, wanted = self.mirror, self.headers.get("Range")
        mirror.asked.append((self.path, wanted))
        if mirror.status:
            self.send_error(mirror.status.pop(0))
            return
        size = len(mirror.body)
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and mirror.ranges else 0
        if start >= size:
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{size}")
            self.end_headers()
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", mirror.content_range(start, size))
        self.send_header("Content-Length", str(size - start))
        self.end_headers()
        end = start + mirror.cut_at.pop(0) if mirror.cut_at else size
        self.wfile.write(mirror.body[start:end])

    def log_message(self, *_: object) -> None:
        """Tests are quiet."""


@pytest.fixture
def mirror(monkeypatch: pytest.MonkeyPatch) -> Iterator[Mirror]:
    monkeypatch.setattr(download, "RETRY_PAUSE_S", 0.0)
    state = Mirror()
    with ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"mirror": state})) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        state.url = f"http://127.0.0.1:{server.server_port}/releases"
        yield state
        server.shutdown()
        thread.join()


def fetch(mirror: Mirror, cache: Path, sha256: str | None = None, progress: download.Progress | None = None) -> Path:
    return download_engine(
        "b1",
        cache_dir=cache,
        variant="cpu-x64",
        sha256=digest(mirror.body) if sha256 is None else sha256,
        base_url=mirror.url,
        progress=progress,
    )


def leftovers(cache: Path) -> list[str]:
    """What an install left beside the builds, its lock file apart."""
    return [path.name for path in (cache / "engines").iterdir() if path.name.startswith(".") and path.suffix != ".lock"]


def test_a_build_is_installed_whole_and_then_found(
    mirror: Mirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int | None]] = []
    server = fetch(mirror, tmp_path, progress=lambda done, total: seen.append((done, total)))
    assert server == tmp_path / "engines/b1-cpu-x64/llama-server"
    assert server.read_bytes() == SERVER
    assert mirror.asked == [("/releases/b1/llama-b1-bin-ubuntu-x64.tar.gz", None)]
    assert seen[-1] == (len(GOOD), len(GOOD))
    assert leftovers(tmp_path) == []
    monkeypatch.setenv("PATH", "")
    found = find_server(None, read_environment({"LLTM_RAY_CACHE": str(tmp_path)}))
    assert (found.origin, found.path) == ("cache", str(server))


def test_only_the_server_is_executable_and_library_names_are_no_links(mirror: Mirror, tmp_path: Path) -> None:
    folder = fetch(mirror, tmp_path).parent
    modes = {path.name: stat.S_IMODE(path.lstat().st_mode) for path in folder.iterdir()}
    library = dict.fromkeys(("libllama.so", "libllama.so.0", "libllama.so.0.5.0", "LICENSE"), 0o644)
    assert modes == {"llama-server": 0o755, **library}
    assert (folder / "libllama.so").read_bytes() == b"\x7fELF library"
    assert not any(path.is_symlink() for path in folder.iterdir())


def test_an_installed_build_is_not_fetched_again(mirror: Mirror, tmp_path: Path) -> None:
    assert fetch(mirror, tmp_path) == fetch(mirror, tmp_path)
    assert len(mirror.asked) == 1


def test_a_broken_connection_is_resumed_where_it_broke(mirror: Mirror, tmp_path: Path) -> None:
    mirror.cut_at = [100_000, 50_000]
    assert fetch(mirror, tmp_path).read_bytes() == SERVER
    assert [wanted for _, wanted in mirror.asked] == [None, "bytes=100000-", "bytes=150000-"]


def test_a_mirror_that_ignores_ranges_is_read_from_the_start(mirror: Mirror, tmp_path: Path) -> None:
    mirror.cut_at, mirror.ranges = [100_000], False
    assert fetch(mirror, tmp_path).read_bytes() == SERVER
    assert [wanted for _, wanted in mirror.asked] == [None, "bytes=100000-"]


@pytest.mark.parametrize("told", ["bytes 0-9/10", "bytes 100001-299999/300000", "bytes */5", "", "tokens 1-2/3"])
def test_a_reply_for_another_range_is_thrown_away(mirror: Mirror, tmp_path: Path, told: str) -> None:
    mirror.cut_at, mirror.content_range = [100_000], lambda _start, _size: told
    assert fetch(mirror, tmp_path).read_bytes() == SERVER
    assert [wanted for _, wanted in mirror.asked] == [None, "bytes=100000-", None]


def test_a_download_goes_on_in_a_later_run(mirror: Mirror, tmp_path: Path) -> None:
    mirror.cut_at = [10_000] * download.ATTEMPTS
    with pytest.raises(ServerBinaryError, match="40000 bytes are kept"):
        fetch(mirror, tmp_path)
    fetch(mirror, tmp_path)
    assert mirror.asked[-1][1] == "bytes=40000-"


def test_a_complete_part_of_an_interrupted_run_is_used_as_it_is(mirror: Mirror, tmp_path: Path) -> None:
    (tmp_path / "engines").mkdir()
    (tmp_path / "engines/.b1-cpu-x64.part").write_bytes(GOOD)
    assert fetch(mirror, tmp_path).read_bytes() == SERVER


def test_a_part_longer_than_the_file_is_thrown_away(mirror: Mirror, tmp_path: Path) -> None:
    (tmp_path / "engines").mkdir()
    (tmp_path / "engines/.b1-cpu-x64.part").write_bytes(GOOD + b"more")
    assert fetch(mirror, tmp_path).read_bytes() == SERVER


def test_a_server_in_trouble_is_asked_again(mirror: Mirror, tmp_path: Path) -> None:
    mirror.status = [500, 503, 429]
    assert fetch(mirror, tmp_path).exists()


@pytest.mark.parametrize(
    ("status", "why", "requests"), [(404, "no such release", 1), (403, "refused", 1), (500, "500", 4)]
)
def test_a_refusal_names_the_address_and_the_status(
    mirror: Mirror, tmp_path: Path, status: int, why: str, requests: int
) -> None:
    mirror.status = [status] * 9
    with pytest.raises(ServerBinaryError, match=why) as caught:
        fetch(mirror, tmp_path)
    assert "/b1/llama-b1-bin-ubuntu-x64.tar.gz" in str(caught.value)
    assert len(mirror.asked) == requests


def test_a_mirror_that_is_not_there_is_an_error(mirror: Mirror, tmp_path: Path) -> None:
    mirror.url = "http://127.0.0.1:9/releases"
    with pytest.raises(ServerBinaryError, match="cannot download"):
        fetch(mirror, tmp_path)


def test_a_corrupted_file_is_refused_and_not_kept(mirror: Mirror, tmp_path: Path) -> None:
    right = digest(GOOD)
    mirror.body = GOOD[:1000] + b"!" + GOOD[1001:]
    with pytest.raises(ServerBinaryError, match=f"expected {right}"):
        fetch(mirror, tmp_path, sha256=right)
    assert leftovers(tmp_path) == []
    mirror.body = GOOD
    assert fetch(mirror, tmp_path).exists()


@pytest.mark.parametrize("sha256", ["", "abc", "z" * 64])
def test_without_a_hash_nothing_is_fetched_and_the_error_says_where_to_get_one(
    mirror: Mirror, tmp_path: Path, sha256: str
) -> None:
    with pytest.raises(ServerBinaryError, match="pass --sha256") as caught:
        fetch(mirror, tmp_path, sha256=sha256)
    assert "github.com/ggml-org/llama.cpp/releases/tag/b1" in str(caught.value)
    assert mirror.asked == []


def test_a_hash_may_be_written_as_github_shows_it(mirror: Mirror, tmp_path: Path) -> None:
    assert fetch(mirror, tmp_path, sha256="sha256:" + digest(GOOD).upper()).exists()


@pytest.mark.parametrize("tag", ["../b1", "b1/../..", ".b1", "", "b 1"])
def test_a_tag_is_a_plain_name(tmp_path: Path, tag: str) -> None:
    with pytest.raises(ServerBinaryError, match=r"not a release tag|SHA-256"):
        download_engine(tag, cache_dir=tmp_path, variant="cpu-x64")
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_variant_is_answered_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ServerBinaryError, match="cpu-x64, cpu-arm64, vulkan-x64"):
        download_engine(None, cache_dir=tmp_path, variant="metal")


def test_a_mirror_of_another_scheme_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ServerBinaryError, match="base_url"):
        download_engine(None, cache_dir=tmp_path, variant="cpu-x64", sha256="0" * 64, base_url="file:///etc")


def test_the_table_holds_the_variants_we_offer_and_only_well_formed_hashes() -> None:
    table = releases()
    assert default_variant() in table["variants"]
    for variant in table["variants"].values():
        assert "{tag}" in variant["file"]
        assert all(len(bytes.fromhex(value)) == 32 for value in variant["sha256"].values())


def test_of_two_parallel_installs_one_downloads_and_both_succeed(mirror: Mirror, tmp_path: Path) -> None:
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(fetch(mirror, tmp_path))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert len(mirror.asked) == 1


def tar_gz_header(info: tarfile.TarInfo, data: bytes = b"") -> bytes:
    """A gzip member with one bare header, whatever size it claims."""
    out = io.BytesIO()
    with unpack.gzip.GzipFile(fileobj=out, mode="wb") as file:
        file.write(info.tobuf(tarfile.GNU_FORMAT) + data)
    return out.getvalue()


def claiming(kind: bytes, size: int) -> bytes:
    info = tarfile.TarInfo("x")
    info.type, info.size = kind, size
    return tar_gz_header(info, b"\0" * 4096)


def zipped(entries: dict[str, bytes], mode: int = 0) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in entries.items():
            info = zipfile.ZipInfo(name)
            info.external_attr = mode << 16
            file.writestr(info, data)
    return out.getvalue()


S = regular("llama-b1/llama-server")
LINK, HARD, FIFO, CHAR = tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE
HOSTILE = {
    "parent path": (tar_gz(S, regular("llama-b1/../../evil")), "leaves its folder"),
    "absolute path": (tar_gz(S, regular("/tmp/evil")), "leaves its folder"),
    "absolute folder": (tar_gz(S, special("/tmp/evil", tarfile.DIRTYPE)), "leaves its folder"),
    "control character": (tar_gz(S, regular("llama-b1/a\nb")), "not plain"),
    "link to a parent": (tar_gz(S, special("llama-b1/libx.so", LINK, "../../etc/passwd")), "no file beside it"),
    "absolute link": (tar_gz(S, special("llama-b1/libx.so", LINK, "/etc/passwd")), "no file beside it"),
    "dangling link": (tar_gz(S, special("llama-b1/libx.so", LINK, "liby.so")), "no file beside it"),
    "link to a folder": (tar_gz(S, special("llama-b1/libx.so", LINK, "..")), "no file beside it"),
    "loop of links": (
        tar_gz(S, special("llama-b1/a.so", LINK, "b.so"), special("llama-b1/b.so", LINK, "a.so")),
        "no file beside it",
    ),
    "link as the server": (tar_gz(special("llama-b1/llama-server", LINK, "/bin/sh")), "no file beside it"),
    "file through a link": (
        tar_gz(S, special("llama-b1/x", LINK, "/tmp"), regular("llama-b1/x/evil")),
        "no file beside",
    ),
    "hard link": (tar_gz(S, special("llama-b1/libx.so", HARD, "llama-b1/llama-server")), "neither a file nor a folder"),
    "fifo": (tar_gz(S, special("llama-b1/pipe", FIFO)), "neither a file nor a folder"),
    "device": (tar_gz(S, special("llama-b1/null", CHAR)), "neither a file nor a folder"),
    "the same name twice": (tar_gz(S, S), "twice"),
    "no server": (tar_gz(regular("llama-b1/readme")), "0 files named llama-server"),
    "two servers": (tar_gz(S, regular("other/llama-server")), "2 files named llama-server"),
    "too many files": (
        tar_gz(S, *(regular(f"llama-b1/{n}", b"") for n in range(unpack.MAX_MEMBERS))),
        "over the limit",
    ),
    "size bomb": (claiming(tarfile.REGTYPE, unpack.MAX_UNPACKED_BYTES + 1), "over the limit"),
    "long name bomb": (claiming(tarfile.GNUTYPE_LONGNAME, 2**30), "header of"),
    "attribute bomb": (claiming(tarfile.XHDTYPE, 2**30), "header of"),
    "not an archive": (b"<html>not found</html>", "damaged"),
    "half an archive": (GOOD[:200_000], "damaged"),
    "zip with a parent path": (zipped({"b/llama-server": b"x", "b/../../evil": b"x"}), "leaves its folder"),
    "zip with a backslash": (zipped({"b/llama-server": b"x", "b\\..\\evil": b"x"}), "not plain"),
    "zip with a link": (zipped({"b/llama-server": b"/bin/sh"}, mode=stat.S_IFLNK | 0o777), "neither a file"),
    "zip bomb": (zipped({"b/llama-server": b"x"} | {f"b/{n}": b"\0" * 2**20 for n in range(9)}), "over the limit"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_archive_is_refused_and_leaves_nothing(
    mirror: Mirror, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unpack, "MAX_UNPACKED_BYTES", 8 * 2**20 if name == "zip bomb" else unpack.MAX_UNPACKED_BYTES)
    mirror.body, why = HOSTILE[name]
    cache = tmp_path / "deep/cache"
    with pytest.raises(ServerBinaryError, match=why):
        fetch(mirror, cache)
    assert [path.name for path in (cache / "engines").iterdir() if not path.name.startswith(".b1-cpu-x64.")] == []
    assert not list(tmp_path.rglob("evil"))
    assert not list(tmp_path.rglob("llama-server"))


def test_an_old_zip_release_is_installed_too(mirror: Mirror, tmp_path: Path) -> None:
    mirror.body = zipped({"build/bin/llama-server": SERVER, "build/bin/libllama.so": b"lib", "build/other": b"x"})
    folder = fetch(mirror, tmp_path).parent
    assert sorted(path.name for path in folder.iterdir()) == ["libllama.so", "llama-server"]
    assert stat.S_IMODE((folder / "llama-server").stat().st_mode) == 0o755
