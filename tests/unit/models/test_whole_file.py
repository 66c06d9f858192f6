"""A file appears when it is whole: whose errors are told how, what may not be replaced, what is on the disk before."""

import errno
import os
from pathlib import Path

import pytest

from lltm_ray.errors import ConfigError, DiskFullError
from lltm_ray.models.convert.convert import convert
from lltm_ray.models.lora.convert import convert_adapter
from lltm_ray.models.lora.merge import merge_adapter
from lltm_ray.models.shards import split
from lltm_ray.models.whole_file import new_files, open_scratch, refuse_same, whole_file
from tests.checkpoints import write_checkpoint
from tests.peers.lora import write_peft
from tests.quantized import SMALL, make, write_source


def test_a_disk_that_becomes_full_is_told_as_one_and_nothing_is_left(tmp_path):
    for context in (whole_file(tmp_path / "out.gguf"), new_files([tmp_path / "out.gguf"])):
        with (
            pytest.raises(DiskFullError, match=r"no room for .*out\.gguf"),
            context,
            open_scratch(Path("/dev/full")) as file,
        ):
            file.write(b"1")
        assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_told_by_its_name(tmp_path):
    (tmp_path / "folder").mkdir()
    for place, why in (("no/out.gguf", "No such file"), ("folder", "Is a directory"), ("o" * 250, "too long")):
        with (
            pytest.raises(ConfigError, match=f"out=.*{place[:20]}.*cannot be written: .*{why}"),
            whole_file(tmp_path / place) as path,
        ):
            path.write_bytes(b"1")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_what_progress_raises_is_not_taken_for_an_error_of_the_file(tmp_path):
    folder, base, ada = write_checkpoint(tmp_path / "hf", "LlamaForCausalLM"), tmp_path / "b.gguf", tmp_path / "a.gguf"
    convert(folder, base)
    peft = write_peft(tmp_path / "peft", "LlamaForCausalLM", only=("q_proj",))
    convert_adapter(peft, ada, base=base)
    before, out = set(tmp_path.iterdir()), tmp_path / "out.gguf"

    def fail(*_said):
        raise OSError(errno.ENOSPC, "of the caller's own disk")

    for work in (
        lambda: convert(folder, out, progress=fail),
        lambda: convert_adapter(peft, out, base=base, progress=fail),
        lambda: merge_adapter(base, [(ada, 1.0)], out, progress=fail),
        lambda: split(base, out, max_tensors=9, progress=fail),
    ):
        with pytest.raises(OSError, match="of the caller's own disk") as caught:
            work()
        assert type(caught.value) is OSError
    assert set(tmp_path.iterdir()) == before


def test_all_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    synced, target = [], tmp_path / "out.gguf"
    fsync = os.fsync

    def note(file):
        synced.append((os.fstat(file).st_size, target.exists()))
        fsync(file)

    monkeypatch.setattr(os, "fsync", note)
    with whole_file(target) as path, open_scratch(path) as file:
        file.write(bytes(100_000))
    assert (synced[0], len(synced)) == ((100_000, False), 2)
    assert target.stat().st_size == 100_000


def test_a_link_in_the_place_of_what_is_written_is_not_followed(tmp_path):
    other = tmp_path / "other"
    other.write_text("kept")

    def write_through_a_link():
        with whole_file(tmp_path / "out.gguf") as path:
            path.unlink()
            path.symlink_to(other)
            open_scratch(path)

    with pytest.raises(ConfigError, match="symbolic links"):
        write_through_a_link()
    assert [(each.name, each.read_text()) for each in tmp_path.iterdir()] == [("other", "kept")]


def test_no_model_is_quantized_onto_a_shard_of_its_own(tmp_path):
    source = write_source(tmp_path / "m.gguf", SMALL["llama"], "F16")
    first, second, *rest = split(source, tmp_path / "s", max_tensors=12)
    before = [path.read_bytes() for path in (first, second, *rest)]
    with pytest.raises(ConfigError, match="is one of the files that it is made of"):
        make(first, second, "Q8_0")
    assert [path.read_bytes() for path in (first, second, *rest)] == before
    with pytest.raises(ConfigError, match="is a folder"):
        refuse_same(tmp_path, source)
    refuse_same(tmp_path / "new.gguf", first, tmp_path / "nothing.gguf")
