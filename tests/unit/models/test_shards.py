"""Splitting and merging, against llama.cpp itself and digests that llama-gguf-split wrote (tests/peers/shards.py)."""

from __future__ import annotations

import hashlib
import os
import resource
import tracemalloc
from collections import namedtuple
from pathlib import Path

import gguf
import numpy as np
import pytest
from typer.testing import CliRunner

from lltm_ray.cli import app
from lltm_ray.errors import ConfigError, DiskFullError, ModelFormatError, ModelNotFoundError
from lltm_ray.models import shards
from lltm_ray.models.gguf import read_gguf, read_model
from lltm_ray.models.shards import merge, split
from tests.quantized import make
from tests.sparse_models import Shape, write_sparse
from tests.unit.models.test_gguf import ARCH, build, entry, number, tensor, text

SHARD_DIGESTS = [
    "a5d31d07a6ad135880e3ccbf644bf7831ba505094e0b527bb09377ddb7984301",
    "1e29a0aa11d78cfdcb2a50ff5a6f7971faeff1c44ca23159de9e3c83f4b92a57",
    "96d9c026c924c68c3adfe92a837ae7b1871ede676b38fff3a2eedc2a1b945f76",
]


def contents(path):
    reader = gguf.GGUFReader(path)
    tensors = [(each.name, each.tensor_type, tuple(each.shape), each.data.tobytes()) for each in reader.tensors]
    return tensors, {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}


def by_hand(path: Path) -> Path:
    """Five tensors of 128, 68, 256, 34 and 128 bytes, not of zeros alone."""
    listed = [("a", 32, 0), ("b", 64, 8), ("c", 64, 0), ("d", 32, 8), ("e", 32, 0)]
    sizes, offset, infos = [128, 68, 256, 34, 128], 0, []
    for (name, count, kind), size in zip(listed, sizes, strict=True):
        infos.append(tensor(name, (count,), kind, offset))
        offset += -(-size // 32) * 32
    entries = [ARCH, entry("general.name", 8, text("m")), entry("x.y", 9, number(4, "I") + number(2) + b"1234abcd")]
    head = build(entries, infos)
    data = b"".join(bytes((at + place) % 251 for at in range(size)) + bytes(-size % 32)
                    for place, size in enumerate(sizes))  # fmt: skip
    path.write_bytes(head + data)
    return path


def test_shards_are_byte_for_byte_those_of_llama_gguf_split(tmp_path):
    made = split(by_hand(tmp_path / "m.gguf"), tmp_path / "s", max_tensors=2)
    assert [path.name for path in made] == [f"s-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
    assert [hashlib.sha256(path.read_bytes()).hexdigest() for path in made] == SHARD_DIGESTS


@pytest.mark.parametrize(
    "limit", [{"max_tensors": 1}, {"max_tensors": 4}, {"max_bytes": 120_000}, {"max_tensors": 999}]
)
def test_what_was_split_and_merged_is_the_same_file(tiny_path, tmp_path, limit):
    made = split(tiny_path, tmp_path / "s.gguf", **limit)
    whole = read_gguf(tiny_path)
    assert [one.name for one in read_model(made[0]).tensors] == [one.name for one in whole.tensors]
    back = merge(made[0], tmp_path / "back.gguf") if len(made) > 1 else made[0]
    before, after = contents(tiny_path), contents(back)
    assert before[0] == after[0]
    assert before[1] == {name: value for name, value in after[1].items() if not name.startswith("split.")}
    assert len(made) == 1 or back.read_bytes() == tiny_path.read_bytes()


def test_no_shard_passes_the_limit_and_each_says_its_place(tiny_path, tmp_path):
    made = split(tiny_path, tmp_path / "s", max_bytes=100_000)
    infos = [read_gguf(path) for path in made]
    assert max(info.tensor_bytes for info in infos) <= 100_000
    assert [(info.split_no, info.split_count) for info in infos] == [(index, len(made)) for index in range(len(made))]
    assert {info.metadata["split.tensors.count"] for info in infos} == {len(read_gguf(tiny_path).tensors)}


def test_llama_cpp_answers_from_shards_as_from_the_whole_file(tiny_path, tmp_path, start_engine):
    made = split(tiny_path, tmp_path / "s", max_tensors=5)
    body = {"prompt": "What is a slot?", "n_predict": 12, "temperature": 0, "cache_prompt": False}
    assert len(made) > 3
    from_shards, whole = (start_engine(path).post("/completion", body)["content"] for path in (made[0], tiny_path))
    assert from_shards == whole
    assert len(whole) > 5


def test_alignment_of_the_original_is_kept_where_llama_cpp_keeps_it(tmp_path):
    source = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(source, "llama")
    writer.add_custom_alignment(128)
    for name in "abc":
        writer.add_tensor(name, np.full(33, ord(name), "float32"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    made = split(source, tmp_path / "s", max_tensors=1)
    assert merge(made[0], tmp_path / "back.gguf").read_bytes() == source.read_bytes()
    assert [each.data.tobytes()[:4] for path in made for each in gguf.GGUFReader(path).tensors] == [
        np.full(1, ord(name), "float32").tobytes() for name in "abc"
    ]


def test_a_large_model_is_copied_in_pieces(tmp_path):
    source = tmp_path / "m.gguf"
    info = write_sparse(source, Shape(n_embd=1024, n_ff=4096, n_layer=1))
    seen = []
    tracemalloc.start()
    split(source, tmp_path / "s", max_bytes=40 * 2**20, progress=lambda *each: seen.append(each))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert info.tensor_bytes > 90 * 2**20
    assert peak < 24 * 2**20
    dones = [done for _, done, _ in seen]
    assert dones == sorted(dones)
    assert dones[-1] == seen[-1][2] == sum(path.stat().st_size for path in tmp_path.glob("s-*"))


def test_after_an_error_nothing_is_left(tiny_path, tmp_path):
    def fail(_name, done, total):
        if done > total / 2:
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        split(tiny_path, tmp_path / "s", max_tensors=3, progress=fail)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_appeared_meanwhile_stays_and_no_shard_does(tiny_path, tmp_path):
    there = tmp_path / "s-00001-of-00005.gguf"

    def another(_name, done, total):
        if done == total:
            there.write_text("mine")

    with pytest.raises(ConfigError, match=r"00001-of-00005.gguf': is there already"):
        split(tiny_path, tmp_path / "s", max_tensors=5, progress=another)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(there.name, "mine")]


def test_shards_are_not_limited_by_how_many_files_may_be_open(tiny_path, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = set(map(int, os.listdir("/proc/self/fd")))
    free = [number for number in range(4096) if number not in used]
    resource.setrlimit(resource.RLIMIT_NOFILE, (free[10], limits[1]))
    try:
        made = split(tiny_path, tmp_path / "s", max_tensors=1)
        back = merge(made[0], tmp_path / "back.gguf")
        make(made[0], tmp_path / "small.gguf", "Q8_0", threads=1)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert len(made) == len(read_model(made[0]).tensors) > 12
    assert back.read_bytes() == tiny_path.read_bytes()


def test_a_full_disk_is_noticed_before_anything_is_written(tiny_path, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")(10**9, 10**9, 1000)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(DiskFullError, match="free"):
        split(tiny_path, tmp_path / "s", max_tensors=3)
    assert list(tmp_path.iterdir()) == []


def test_what_fits_one_shard_is_merged_too(tiny_path, tmp_path):
    (only,) = split(tiny_path, tmp_path / "s", max_bytes=10**9)
    assert merge(only, tmp_path / "m.gguf").read_bytes() == tiny_path.read_bytes()


def test_what_cannot_be_split_or_merged_is_refused_with_the_remedy(tiny_path, tmp_path):
    made = split(tiny_path, tmp_path / "s", max_tensors=8)
    for arguments, why in (
        ({}, "give either"),
        ({"max_bytes": 10**6, "max_tensors": 3}, "give either"),
        ({"max_tensors": 0}, "1 or above"),
        ({"max_bytes": 100}, "token_embd.weight alone has 90624 bytes"),
    ):
        with pytest.raises(ConfigError, match=why):
            split(tiny_path, tmp_path / "t", **arguments)
    with pytest.raises(ConfigError, match="merge them first"):
        split(made[0], tmp_path / "t", max_tensors=1)
    with pytest.raises(ConfigError, match="is there already"):
        split(tiny_path, tmp_path / "s", max_tensors=8)
    with pytest.raises(ConfigError, match="model of one file"):
        merge(tiny_path, tmp_path / "t.gguf")
    with pytest.raises(ModelNotFoundError, match="the first of its"):
        merge(made[1], tmp_path / "t.gguf")
    with pytest.raises(ConfigError, match="is there already"):
        merge(made[0], made[1])
    made[2].unlink()
    with pytest.raises(ModelNotFoundError, match="00003-of"):
        merge(made[0], tmp_path / "t.gguf")


def test_shards_that_do_not_belong_together_are_not_merged(tiny_path, tmp_path):
    made = split(tiny_path, tmp_path / "s", max_tensors=8)
    os.replace(made[1], made[2])
    made[1].write_bytes(made[2].read_bytes())
    with pytest.raises(ModelFormatError, match="says it is shard 1 of 3"):
        merge(made[0], tmp_path / "t.gguf")


def test_the_commands_print_paths_and_leave_errors_to_one_sentence(tiny_path, tmp_path):
    run = CliRunner()
    done = run.invoke(app, ["models", "split", str(tiny_path), str(tmp_path / "s"), "--max-size", "0.2MB"])
    assert done.exit_code == 0
    paths = done.stdout.split()
    assert all(Path(path).is_file() for path in paths)
    merged = run.invoke(app, ["models", "merge", paths[0], str(tmp_path / "m.gguf")])
    assert merged.stdout.strip() == str(tmp_path / "m.gguf")
    assert (tmp_path / "m.gguf").read_bytes() == tiny_path.read_bytes()
    wrong = run.invoke(app, ["models", "split", str(tiny_path), str(tmp_path / "t"), "--max-size", "many"])
    assert wrong.exit_code == 2
    assert "16GiB" in wrong.stderr


def test_pieces_of_a_file_that_becomes_shorter_are_an_error(tmp_path):
    path = tmp_path / "m"
    path.write_bytes(b"1234")
    with pytest.raises(ModelFormatError, match="became shorter"):
        list(shards._pieces(path, 0, 10))
