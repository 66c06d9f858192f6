"""The server's log: its end, its progress, its size."""

import os

import pytest

from lltm_ray.llamacpp.logfile import LogFile


def test_the_tail_holds_whole_lines_of_the_present_run_only(tmp_path):
    log = LogFile(tmp_path / "logs" / "engine.log")
    with log.open() as child:
        child.write(b"old run\n")
    with log.open() as child:
        child.write(b"first line\nsecond line\n")
    assert log.tail() == "first line\nsecond line"
    assert log.tail(16) == "second line"


@pytest.mark.parametrize(
    ("said", "remedy"),
    [
        (b"error loading model: device CUDA0 does not support split buffers\n", "'layer' or 'tensor'"),
        (b"error: LLAMA_SPLIT_MODE_TENSOR not implemented for architecture 'mamba'\n", "use split_mode='layer'"),
        (b"simultaneous use of SPLIT_MODE_TENSOR and KV cache quantization not implemented\n", "f16, bf16 or f32"),
        (b"error: out of memory\n", ""),
    ],
)
def test_what_llama_cpp_cannot_split_has_a_remedy_for_the_present_run(tmp_path, said, remedy):
    log = LogFile(tmp_path / "engine.log")
    with log.open() as child:
        child.write(said + b"llama_model_load_from_file_impl: failed to load model\n")
    assert remedy in log.remedy()
    assert bool(remedy) == bool(log.remedy())
    with log.open() as child:
        child.write(b"error: out of memory\n")
    assert log.remedy() == ""


def test_dots_are_load_progress(tmp_path):
    log = LogFile(tmp_path / "engine.log")
    assert log.load_progress() is None
    with log.open() as child:
        child.write(b"load_tensors: CPU\n" + b"." * 37)
        child.flush()
        assert log.load_progress() == 0.37


def test_a_full_log_is_set_aside_while_the_child_goes_on_writing(tmp_path):
    log = LogFile(tmp_path / "engine.log", max_bytes=1000)
    with log.open() as child:
        child.write(b"x" * 2000 + b"\n")
        child.flush()
        assert log.rotate()
        child.write(b"after\n")
        child.flush()
    assert log.tail() == "after"
    assert os.path.getsize(f"{log.path}.1") == 2001
    assert not log.rotate()


def test_others_cannot_read_it(tmp_path):
    log = LogFile(tmp_path / "engine.log")
    log.open().close()
    assert log.path.stat().st_mode & 0o777 == 0o600
