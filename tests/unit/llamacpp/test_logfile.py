"""The server's log: its end, its progress, its size."""

import os

from lltm_ray.llamacpp.logfile import LogFile


def test_the_tail_holds_whole_lines_of_the_present_run_only(tmp_path):
    log = LogFile(tmp_path / "logs" / "engine.log")
    with log.open() as child:
        child.write(b"old run\n")
    with log.open() as child:
        child.write(b"first line\nsecond line\n")
    assert log.tail() == "first line\nsecond line"
    assert log.tail(16) == "second line"


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
