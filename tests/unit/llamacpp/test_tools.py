"""llama.cpp's programs, played by a script that says what llama-quantize and llama-imatrix of release 11434 said."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from threading import Event, Timer

import pytest

from lltm_ray.actors.quantize_job import ImatrixJob, QuantizeJob, make_imatrix, run_job
from lltm_ray.config import read_environment
from lltm_ray.errors import CancelledError, ConfigError, MissingExtraError, ModelFormatError, ToolError
from lltm_ray.llamacpp.tools import find_tool, run_quantize, run_tool
from lltm_ray.models.quantize.plan import Options
from tests.quantized import SMALL, digest, make, write_matrix, write_source

SCRIPT = r"""#!{python}
import os, shutil, sys, time

def say(text):
    sys.stderr.write(text)
    sys.stderr.flush()

def quantize(arguments):
    while arguments[0].startswith("--"):
        flag = arguments.pop(0)
        if flag == "--imatrix":
            arguments.pop(0)
        elif flag not in ("--allow-requantize", "--leave-output-tensor", "--pure"):
            print("usage: llama-quantize [--help] [--allow-requantize] ...")
            sys.exit(1)
    source, out, kind, *rest = arguments
    if rest and not rest[0].isdigit():
        say(f"llama_quantize: invalid nthread '{{rest[0]}}' (stoi)\n")
        sys.exit(1)
    say(f"llama_quantize: quantizing '{{source}}' to '{{out}}' as {{kind}} using {{rest[0]}} threads\n")
    say("[   1/  30] output.weight                        - [   256,      4,      1,      1], type =    f32, ")
    say("converting to q6_K .. size =     0.35 MiB ->     0.07 MiB\n")
    open(out, "wb").write(b"GGUF half of it")
    say("[   2/  30] output_norm.weight                   - [   256,      1,      1,      1], type =    f32, ")
    mode = os.environ.get("FAKE")
    if mode == "hang":
        open(os.environ["FAKE_PID"], "w").write(str(os.getpid()))
        time.sleep(60)
    say("size =    0.001 MiB\n")
    if mode == "fail":
        say("llama_model_quantize: failed to quantize: requantizing from type q8_0 is disabled\n")
        say(f"llama_quantize: failed to quantize model from '{{source}}'\n")
        sys.exit(1)
    if mode != "garbage":
        shutil.copy(os.environ["FAKE_RESULT"], out)
    print("\nllama_quantize: quantize time =   380.11 ms")

def imatrix(arguments):
    given = dict(zip(arguments[::2], arguments[1::2]))
    say("0.00.086.322 I compute_imatrix: computing over 3 chunks, n_ctx=128, batch_size=2048, n_seq=16\n")
    sys.stdout.write("0.00 minutes\n")
    for chunk in (1, 2, 3):
        sys.stdout.write(f"[{{chunk}}]979317180.5901,")
        sys.stdout.flush()
        time.sleep(0.05)
    shutil.copy(os.environ["FAKE_RESULT"], given["-o"])
    print("\nFinal estimate: PPL = 698821857.7472 +/- 295593408.04842")

(imatrix if sys.argv[0].endswith("imatrix") else quantize)(sys.argv[1:])
"""


@pytest.fixture
def llama_cpp(tmp_path, monkeypatch):
    """A folder with both programs; LLAMA_CPP_DIR names it."""
    folder = tmp_path / "llama.cpp"
    (folder / "bin").mkdir(parents=True)
    for name in ("llama-quantize", "llama-imatrix"):
        put_program(folder / "bin" / name)
    monkeypatch.setenv("LLAMA_CPP_DIR", str(folder))
    return folder / "bin"


def put_program(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(SCRIPT.format(python=sys.executable))
    path.chmod(0o755)
    return path


@pytest.fixture
def job(tmp_path, llama_cpp, monkeypatch):
    source = write_source(tmp_path / "source.gguf", SMALL["llama"])
    monkeypatch.setenv("FAKE_RESULT", make(source, tmp_path / "result.gguf", "Q4_K_M").path)
    monkeypatch.setenv("FAKE_PID", str(tmp_path / "pid"))
    return QuantizeJob(
        source=str(source),
        out=str(tmp_path / "out" / "out.gguf"),
        options=Options(kind="Q4_K_M", allow_requantize=True, threads=3),
        tool="llama-quantize",
    )


@pytest.fixture(autouse=True)
def out(tmp_path):
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def is_gone(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z"
    except OSError:
        return True


def test_llama_quantize_is_given_options_first_and_its_tensors_are_heard(job, out, tmp_path):
    heard = []
    done = run_job(job, progress=lambda *said: heard.append(said))
    total = heard[0][2]
    assert heard[0] == ("output.weight", 0, total)
    assert heard[-1] == ("output_norm.weight", 4 * 256 * 4, total)
    assert (done.path, done.kind) == (job.out, "Q4_K_M")
    assert done.tool.endswith("bin/llama-quantize")
    assert digest(out / "out.gguf") == digest(tmp_path / "result.gguf")
    assert [path.name for path in out.iterdir()] == ["out.gguf"]


def test_its_error_is_told_in_its_own_words_and_no_file_is_left(job, out, monkeypatch):
    monkeypatch.setenv("FAKE", "fail")
    with pytest.raises(
        ToolError, match="ended with exit code 1: llama_quantize: failed to quantize model from"
    ) as caught:
        run_job(job)
    assert caught.value.exit_code == 1
    assert "requantizing from type q8_0 is disabled" in caught.value.log_tail
    assert "requantizing from type q8_0 is disabled" in str(caught.value)
    assert list(out.iterdir()) == []


def test_a_program_that_says_it_is_done_and_wrote_half_is_not_believed(job, out, monkeypatch):
    monkeypatch.setenv("FAKE", "garbage")
    (out / "out.gguf").write_text("before")
    with pytest.raises(ModelFormatError):
        run_job(job)
    assert [(path.name, path.read_text()) for path in out.iterdir()] == [("out.gguf", "before")]


def test_cancelling_ends_the_program_and_removes_what_it_wrote(job, out, tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE", "hang")
    cancel = Event()
    waiting = Timer(0.0, lambda: (wait_for(tmp_path / "pid"), cancel.set()))
    waiting.start()
    with pytest.raises(CancelledError):
        run_job(job, cancel=cancel)
    waiting.join()
    assert is_gone((tmp_path / "pid").read_text())
    assert list(out.iterdir()) == []


@pytest.mark.parametrize(("number", "leftovers"), [(signal.SIGTERM, 0), (signal.SIGKILL, 1)])
def test_the_program_ends_with_the_command_however_that_ends(job, out, tmp_path, monkeypatch, number, leftovers):
    monkeypatch.setenv("FAKE", "hang")
    argv = ["models", "quantize", job.source, job.out, "--type", "Q4_K_M", "--tool", "llama-quantize"]
    with subprocess.Popen([sys.executable, "-m", "lltm_ray.cli", *argv], stderr=subprocess.PIPE) as command:
        pid = wait_for(tmp_path / "pid")
        command.send_signal(number)
        command.communicate(timeout=100)
    assert command.returncode != 0
    deadline = time.monotonic() + 60
    while not is_gone(pid):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert len(list(out.iterdir())) == leftovers
    monkeypatch.setenv("FAKE", "")
    run_job(job)
    assert [path.name for path in out.iterdir()] == ["out.gguf"]  # the next one sweeps


def wait_for(path):
    deadline = time.monotonic() + 60
    while not path.exists() or not path.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return int(path.read_text())


def test_a_program_that_is_killed_or_cannot_start_is_told_so(tmp_path):
    with pytest.raises(ToolError, match="sh was ended by SIGKILL: about to die") as caught:
        run_tool(["/bin/sh", "-c", "echo about to die; kill -9 $$"], hear=lambda _: None)
    assert caught.value.exit_code == -9
    with pytest.raises(ToolError, match="No such file"):
        run_quantize([str(tmp_path / "nothing")])


def test_an_importance_matrix_is_made_with_its_chunks_heard(tmp_path, out, llama_cpp, monkeypatch):
    source = write_source(tmp_path / "source.gguf", SMALL["llama"])
    monkeypatch.setenv("FAKE_RESULT", str(write_matrix(tmp_path / "matrix.gguf", SMALL["llama"])))
    (tmp_path / "text.txt").write_text("some text")
    heard = []
    job = ImatrixJob(model=str(source), text=str(tmp_path / "text.txt"), out=str(out / "matrix.gguf"))
    found = make_imatrix(job, progress=lambda *said: heard.append(said))
    assert (heard[0], heard[-1]) == (("chunks", 1, 3), ("chunks", 3, 3))
    assert (found.n_chunks, found.dataset, len(found.weights)) == (7, "text.txt", 22)
    assert [path.name for path in out.iterdir()] == ["matrix.gguf"]
    for taken in (source, tmp_path / "text.txt"):
        with pytest.raises(ConfigError, match="is one of the files that it is made of"):
            make_imatrix(ImatrixJob(model=str(source), text=str(tmp_path / "text.txt"), out=str(taken)))
    monkeypatch.setenv("FAKE_RESULT", str(source))
    with pytest.raises(ModelFormatError, match="is no importance matrix"):
        make_imatrix(ImatrixJob(model=str(source), text=str(tmp_path / "text.txt"), out=str(out / "other.gguf")))


def test_a_program_is_found_where_llama_cpp_is(tmp_path, llama_cpp, monkeypatch):
    def found(name="llama-quantize", **variables):
        return find_tool(name, read_environment({"LLTM_RAY_CACHE": str(tmp_path / "cache")} | variables))

    assert found(LLAMA_CPP_DIR=str(llama_cpp)) == llama_cpp / "llama-quantize"
    assert found(LLAMA_CPP_DIR=str(llama_cpp.parent)) == llama_cpp / "llama-quantize"
    with pytest.raises(ConfigError, match=r"LLAMA_CPP_DIR=.*has no llama-nothing"):
        found("llama-nothing", LLAMA_CPP_DIR=str(llama_cpp))
    monkeypatch.setenv("PATH", "/nowhere")
    assert found() is None
    downloaded = put_program(tmp_path / "cache" / "engines" / "b1-cpu" / "llama-quantize")
    put_program(downloaded.with_name("llama-server"))
    downloaded.chmod(0o644)  # as it is unpacked
    assert found() == downloaded
    assert os.access(downloaded, os.X_OK)
    beside = put_program(tmp_path / "build" / "llama-quantize")
    put_program(beside.with_name("llama-server"))
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "llama-server").symlink_to(beside.with_name("llama-server"))
    assert found(LLAMA_SERVER_PATH=str(tmp_path / "links" / "llama-server")) == beside
    monkeypatch.setenv("PATH", str(llama_cpp))
    assert found() == downloaded  # beside the server that would be used
    assert found(LLTM_RAY_CACHE=str(tmp_path)) == llama_cpp / "llama-quantize"


def test_a_missing_program_is_told_with_the_way_to_it(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setenv("LLTM_RAY_CACHE", str(tmp_path))
    monkeypatch.delenv("LLAMA_CPP_DIR", raising=False)
    with pytest.raises(MissingExtraError, match=r"llama-imatrix is not installed: .*engine-download.*LLAMA_CPP_DIR"):
        make_imatrix(ImatrixJob(model="m.gguf", text="t.txt", out="o.gguf"))
    with pytest.raises(ConfigError, match="tool='other': must be one of auto, llama-quantize, embedded"):
        QuantizeJob(source="a", out="b", options=Options(kind="Q8_0"), tool="other")
