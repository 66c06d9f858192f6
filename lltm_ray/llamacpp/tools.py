"""llama.cpp's other programs, where they are installed: `llama-quantize`, `llama-imatrix`.

They run as children that die with their caller, are heard while they run, and end when they are told to.
"""

from __future__ import annotations

import os
import re
import select
import shutil
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from threading import Event

from lltm_ray.config import Environment
from lltm_ray.errors import CancelledError, ConfigError, MissingExtraError, ToolError
from lltm_ray.llamacpp.binary import cached_servers, find_server

QUANTIZE, IMATRIX = "llama-quantize", "llama-imatrix"
GRACE_S = 5.0
"""After SIGTERM a program has so long; then it is killed."""
_POLL_S = 0.1
_TAIL_LINES = 30
_CHILD = str(Path(__file__).with_name("_child.py"))
_TENSOR = re.compile(r"^\[ *(\d+)/ *(\d+)\] +(\S+)")
"""`[  12/ 291] blk.0.ffn_up.weight - [...]`: llama.cpp's src/llama-quant.cpp, `llama_model_quantize_impl`."""
_CHUNKS = re.compile(r"computing over (\d+) chunks")
_CHUNK = re.compile(r"\[(\d+)\]-?(?:\d|nan|inf)")
"""`[1]4.62,[2]5.10,`: llama.cpp's tools/imatrix/imatrix.cpp, `compute_imatrix`."""
_COMPLAINT = re.compile(r"error|fail|invalid|abort|assert|unsupported|at least|cannot|missing|bad ", re.IGNORECASE)


def find_tool(name: str, environment: Environment) -> Path | None:
    """A program of llama.cpp's: in LLAMA_CPP_DIR; beside the llama-server that would be used, on PATH, downloaded.

    Args:
        name: `llama-quantize` or `llama-imatrix`.
        environment: what `read_environment` found.

    Raises:
        ConfigError: LLAMA_CPP_DIR is set and does not have it: whoever names a build wants that build.
        ServerBinaryError: LLAMA_SERVER_PATH names a server that cannot be used.
    """
    if environment.llama_cpp_dir is not None:
        folder = environment.llama_cpp_dir
        found = _first(folder / below / name for below in ("", "bin", "build/bin"))
        if found is None:
            why = f"has no {name} that can be run, nor have its bin and build/bin; correct it, or unset it"
            raise ConfigError("LLAMA_CPP_DIR", str(folder), why)
        return found
    on_path = shutil.which(name)
    found = _beside_server(name, environment) or (Path(on_path).absolute() if on_path else None)
    return found or _downloaded(name, environment)


def need_tool(name: str, environment: Environment) -> Path:
    """As `find_tool`.

    Raises:
        MissingExtraError: it is not here; says how to get it.
    """
    found = find_tool(name, environment)
    if found is None:
        remedy = (
            "`lltm-ray models engine-download` fetches a release of llama.cpp that has it; or name a build's folder in "
            "LLAMA_CPP_DIR, or put it on PATH"
        )
        raise MissingExtraError(name, "", remedy)
    return found


def quantize_args(
    tool: Path, source: str, out: Path, kind: str, *, threads: int, options: Sequence[str] = ()
) -> list[str]:
    """llama-quantize's command line; it takes options only before its positional arguments."""
    return [str(tool), *options, os.path.abspath(source), str(out.absolute()), kind, str(threads)]


def run_quantize(
    argv: Sequence[str], *, progress: Callable[[str, int, int], None] | None = None, cancel: Event | None = None
) -> None:
    """Run llama-quantize; `progress` hears a tensor's name, those done and those in all.

    Raises:
        ToolError, CancelledError: see `run_tool`.
    """

    def hear(line: str) -> None:
        if progress is not None and (said := _TENSOR.match(line)):
            progress(said[3], int(said[1]) - 1, int(said[2]))

    run_tool(argv, hear=hear, cancel=cancel)


def run_imatrix(
    argv: Sequence[str], *, progress: Callable[[str, int, int], None] | None = None, cancel: Event | None = None
) -> None:
    """Run llama-imatrix; `progress` hears "chunks", those done and those in all.

    Raises:
        ToolError, CancelledError: see `run_tool`.
    """
    total = 0

    def hear(line: str) -> None:
        nonlocal total
        if said := _CHUNKS.search(line):
            total = int(said[1])
        if progress is not None and total and (chunks := _CHUNK.findall(line)):
            progress("chunks", int(chunks[-1]), total)

    run_tool(argv, hear=hear, cancel=cancel)


def run_tool(argv: Sequence[str], *, hear: Callable[[str], None], cancel: Event | None = None) -> None:
    """Run a program until it ends; on any exception of ours, KeyboardInterrupt included, it ends too.

    Args:
        argv: the program and its arguments.
        hear: hears every line of both its outputs, and an unfinished one each time it grows.
        cancel: set by another thread, it ends the program.

    Raises:
        ToolError: it cannot be started, or ended with another code than 0; has `exit_code` and `log_tail`.
        CancelledError: `cancel` was set.
    """
    tool, tail = Path(argv[0]).name, deque[str](maxlen=_TAIL_LINES)
    command = [sys.executable, "-I", "-S", _CHILD, str(os.getpid()), *argv]
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    ) as child:
        try:
            for line, is_whole in _lines(child, cancel):
                if is_whole and line.strip():
                    tail.append(line)
                hear(line)
        except BaseException:
            _end(child)
            raise
    if child.returncode:
        raise _failure(tool, child.returncode, list(tail))


def _lines(child: subprocess.Popen[bytes], cancel: Event | None) -> Iterator[tuple[str, bool]]:
    """What the child says, as it says it, until it closes its output; and whether the line is whole."""
    assert child.stdout is not None  # noqa: S101  it is a pipe
    pending = b""
    while True:
        if cancel is not None and cancel.is_set():
            raise CancelledError("the program was ended on request")
        if not select.select([child.stdout], [], [], _POLL_S)[0]:
            continue
        read = os.read(child.stdout.fileno(), 65_536)
        *lines, pending = (pending + read).split(b"\n")
        yield from ((line.decode(errors="replace"), True) for line in lines)
        if pending:
            yield pending[-4096:].decode(errors="replace"), not read
        if not read:
            return


def _end(child: subprocess.Popen[bytes]) -> None:
    child.terminate()
    try:
        child.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        child.kill()


def _failure(tool: str, code: int, tail: list[str]) -> ToolError:
    complaints = [line for line in tail if _COMPLAINT.search(line)]
    why = (complaints or tail or ["it said nothing"])[-1].strip()
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    said = "\n".join(tail)
    return ToolError(
        f"{tool} {how}: {why}\n--- its last lines ---\n{said}", tool=tool, exit_code=code, why=why, log_tail=said
    )


def _beside_server(name: str, environment: Environment) -> Path | None:
    server = find_server(None, environment)
    if server.origin == "embedded":
        return None
    return _first(path.parent / name for path in (Path(server.path), Path(server.path).resolve()))


def _downloaded(name: str, environment: Environment) -> Path | None:
    """Of the builds that we downloaded, the newest that has it."""
    for server in cached_servers(environment.cache_dir):
        found = server.with_name(name)
        if found.is_file():
            found.chmod(0o755)  # the archive's hash was checked; only the server was made executable then
            return found
    return None


def _first(paths: Iterator[Path]) -> Path | None:
    return next((path.absolute() for path in paths if path.is_file() and os.access(path, os.X_OK)), None)
