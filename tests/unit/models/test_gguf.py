import functools
import io
import math
import os
import struct
import tempfile
import time
import tracemalloc
from pathlib import Path

import gguf
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lltm_ray.errors import ModelFormatError, ModelNotFoundError
from lltm_ray.models.gguf import describe_header, read_gguf, read_model, shard_paths
from lltm_ray.models.gguf_header import TENSOR_TYPES, HeaderReader, LazyValue
from lltm_ray.models.random_weights import RandomShape, write_random


def number(value, code="Q"):
    return struct.pack("<" + code, value)


def text(value):
    raw = value if isinstance(value, bytes) else value.encode()
    return number(len(raw)) + raw


def entry(key, kind, payload):
    return text(key) + number(kind, "I") + payload


def tensor(name="t", shape=(32,), kind=0, offset=0):
    return text(name) + number(len(shape), "I") + b"".join(map(number, shape)) + number(kind, "I") + number(offset)


ARCH = entry("general.architecture", 8, text("llama"))


def build(entries=(ARCH,), tensors=(), *, data=0, version=3, magic=b"GGUF", n_tensors=None, n_entries=None):
    counts = (len(tensors) if n_tensors is None else n_tensors, len(entries) if n_entries is None else n_entries)
    head = magic + number(version, "I") + number(counts[0]) + number(counts[1]) + b"".join((*entries, *tensors))
    return head + b"\0" * (-len(head) % 32 + data)


HOSTILE = {
    "empty": (b"", 0, "not a GGUF"),
    "magic": (build(magic=b"GGML"), 0, "not a GGUF"),
    "magic alone": (b"GGUF", 4, "the file ends"),
    "version 1": (build(version=1), 4, "version 1"),
    "version 4": (build(version=4), 4, "version 4"),
    "big endian": (build(version=3 << 24), 4, "big-endian"),
    "tensor count": (build(n_tensors=2**63), 24, "more than the file can hold"),
    "metadata count": (build(n_entries=2**62), 24, "more than the file can hold"),
    "missing entry": (build(n_entries=2)[:58], None, "ends"),
    "long key": (build([number(2**40) + b"x" * 64]), 24, "metadata key of"),
    "empty key": (build([entry("", 4, number(1, "I"))]), 24, "metadata key of 0"),
    "key not text": (build([entry(b"\xff\xfe", 4, number(1, "I"))]), 32, "not UTF-8"),
    "long string": (build([ARCH, entry("k", 8, number(2**50) + b"x")]), None, "the file ends"),
    "negative string": (build([ARCH, entry("k", 8, number(2**64 - 1))]), None, "the file ends"),
    "unknown type": (build([entry("k", 99, b"\0" * 8)]), 33, "unknown metadata type 99"),
    "bool of 2": (build([entry("k", 7, b"\2")]), 37, "neither 0 nor 1"),
    "nested array": (build([entry("k", 9, number(9, "I") + number(1))]), 37, "array of arrays"),
    "array type": (build([entry("k", 9, number(50, "I") + number(1))]), 37, "unknown type 50"),
    "long array": (build([entry("k", 9, number(4, "I") + number(2**60))]), None, "the file ends"),
    "many strings": (build([entry("k", 9, number(8, "I") + number(2**60))]), 49, "strings in one array"),
    "string in array": (build([entry("k", 9, number(8, "I") + number(1) + number(2**60))]), None, "ends"),
    "twice a key": (build([ARCH, ARCH]), None, "appears twice"),
    "no architecture": (build([entry("general.name", 8, text("x"))]), 0, "no general.architecture"),
    "architecture 5": (build([entry("general.architecture", 4, number(5, "I"))]), None, "must be a string"),
    "alignment 3": (build([ARCH, entry("general.alignment", 4, number(3, "I"))]), None, "power of two"),
    "alignment text": (build([ARCH, entry("general.alignment", 8, text("32"))]), None, "power of two"),
    "five dimensions": (build(tensors=[tensor(shape=(1,) * 5)], data=128), None, "5 dimensions"),
    "overflow": (build(tensors=[tensor(shape=(2**32, 2**32))], data=128), None, "impossible dimensions"),
    "zero dimension": (build(tensors=[tensor(shape=(0, 4))], data=128), None, "impossible dimensions"),
    "tensor type": (build(tensors=[tensor(kind=4)], data=128), None, "unknown type 4"),
    "block of no dimensions": (build(tensors=[tensor(shape=(), kind=8)], data=128), None, "not whole Q8_0 blocks"),
    "block": (build(tensors=[tensor(shape=(33,), kind=8)], data=128), None, "not whole Q8_0 blocks"),
    "offset": (build(tensors=[tensor(offset=2**40)], data=128), None, "data offset"),
    "misaligned": (build(tensors=[tensor(), tensor("u", offset=130)], data=512), None, "not 128"),
    "overlap": (build(tensors=[tensor(), tensor("u", offset=0)], data=512), None, "not 128"),
    "twice a tensor": (build(tensors=[tensor(), tensor(offset=128)], data=512), None, "appears twice"),
    "no data": (build(tensors=[tensor()], data=127), None, "truncated"),
    "huge tensor": (build(tensors=[tensor(shape=(2**60,))], data=128), None, "truncated"),
    "layers": (build([ARCH, entry("llama.block_count", 10, number(2**40))]), None, "from 0 to 4096"),
    "minus one head": (build([ARCH, entry("llama.attention.head_count", 5, number(-1, "i"))]), None, "whole number"),
    "half a layer": (build([ARCH, entry("llama.block_count", 6, number(1.5, "f"))]), None, "whole number"),
    "text layers": (build([ARCH, entry("llama.block_count", 8, text("2"))]), None, "whole number"),
    "pooling 9": (build([ARCH, entry("llama.pooling_type", 4, number(9, "I"))]), None, "from 0 to 4"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_file_is_refused_with_its_offset_and_little_memory(tmp_path, case):
    raw, offset, why = HOSTILE[case]
    path = tmp_path / "hostile.gguf"
    path.write_bytes(raw)
    tracemalloc.start()
    with pytest.raises(ModelFormatError, match=why) as caught:
        read_gguf(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * 2**20
    assert caught.value.path == str(path)
    assert 0 <= caught.value.offset_bytes <= len(raw)
    assert offset is None or caught.value.offset_bytes == offset


def test_the_builder_of_hostile_files_can_build_a_good_one(tmp_path):
    path = tmp_path / "good.gguf"
    path.write_bytes(build(tensors=[tensor(), tensor("u", (32, 2), 8, 128)], data=128 + 68))
    info = read_gguf(path)
    assert [(one.name, one.type, one.nbytes) for one in info.tensors] == [("t", "F32", 128), ("u", "Q8_0", 68)]
    assert info.n_params == 96
    assert dict(info.quantization) == {"F32": 128, "Q8_0": 68}


def test_a_sparse_giant_of_claims_costs_neither_memory_nor_time(tmp_path):
    """A terabyte of zeros behind a header that claims all it may."""
    path = tmp_path / "sparse.gguf"
    path.write_bytes(build([ARCH], n_entries=60_000))
    os.truncate(path, 2**40)
    begun = time.process_time()
    with pytest.raises(ModelFormatError):
        read_gguf(path)
    path.write_bytes(build([ARCH, entry("k", 9, number(8, "I") + number(3_999_999))], n_entries=3))
    os.truncate(path, 2**40)
    with pytest.raises(ModelFormatError):
        read_gguf(path)
    assert time.process_time() - begun < 5


def test_every_truncation_of_a_good_file_is_refused(tiny_path, tmp_path):
    whole = tiny_path.read_bytes()
    path = tmp_path / "cut.gguf"
    for length in (*range(64), *range(64, len(whole), 9973), len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ModelFormatError):
            read_gguf(path)


def read_bytes(raw):
    header = HeaderReader(io.BytesIO(raw), "hostile.gguf", len(raw)).read()
    return describe_header("hostile.gguf", len(raw), header)


def check_hostile(raw):
    """Read or refused, and nothing else; never much more memory than the bytes themselves."""
    begun = time.process_time()
    tracemalloc.start()
    try:
        info = read_bytes(raw)
    except ModelFormatError as error:
        assert 0 <= error.offset_bytes <= len(raw)  # noqa: PT017
        info = None
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 8 * len(raw) + 2**19
    assert time.process_time() - begun < 1
    if info is not None:
        assert all(each.offset_bytes + each.nbytes <= len(raw) for each in info.tensors)


NAMES = ("", "a", "b", "general.alignment", "llama.block_count", "llama.attention.head_count_kv", "split.no", "é" * 9)
DIMENSIONS = (0, 1, 2, 32, 33, 256, 2**31, 2**32, 2**63, 2**64 - 1)


def structured(choices, payload):
    """A header whose names, types, counts and dimensions are chosen by bytes, from what is likely to hurt."""
    pick = iter(choices + bytes(64))
    entries = [
        entry(NAMES[next(pick) % len(NAMES)], next(pick) % 15, payload[: next(pick) % 64])
        for _ in range(next(pick) % 4)
    ]
    tensors = [
        tensor(
            NAMES[next(pick) % len(NAMES)],
            [DIMENSIONS[next(pick) % len(DIMENSIONS)] for _ in range(next(pick) % 6)],
            next(pick) % 45,
            next(pick) // 32 * 32,
        )
        for _ in range(next(pick) % 4)
    ]
    return build([ARCH, *entries], tensors, data=next(pick) * 4)


@functools.cache
def real_headers():
    """The first bytes of files that writers made, with few tokens so that damage hits all parts alike."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.gguf"
        found = []
        for shape in (RandomShape(n_layer=1), RandomShape(architecture="cohere2", sliding_window=64, n_layer=1)):
            write_random(path, shape)
            found.append(path.read_bytes()[: read_gguf(path).tensors[0].offset_bytes + 4096])
        path.write_bytes(build(tensors=[tensor(), tensor("u", (32, 2), 8, 128)], data=128 + 68))
        return (*found, path.read_bytes())


def damage(which, cut, flips):
    """A real header with bytes changed: of each five, three are the place, one how many, one the value."""
    raw = bytearray(real_headers()[which])
    for index in range(0, len(flips) - 4, 5):
        at = int.from_bytes(flips[index : index + 3], "little") % len(raw)
        raw[at : at + 1 + flips[index + 3] % 8] = flips[index + 4 : index + 5] * (1 + flips[index + 3] % 8)
    return bytes(raw[: len(raw) * (256 - cut) // 256 if cut > 128 else None])


RANDOM_HEADERS = st.binary(max_size=240).map(lambda tail: b"GGUF" + number(3, "I") + tail)
STRUCTURED = st.builds(structured, st.binary(max_size=48), st.binary(max_size=64))
DAMAGED = st.builds(damage, st.integers(0, 2), st.integers(0, 255), st.binary(min_size=5, max_size=40))
HOSTILE_BYTES = st.one_of(DAMAGED, STRUCTURED, RANDOM_HEADERS, st.binary(max_size=64))


@settings(max_examples=2000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(HOSTILE_BYTES)  # `python -m tests.peers.hostile` tries 10,000
def test_a_damaged_file_is_read_or_refused_and_nothing_else(raw):
    check_hostile(raw)
    assert len(raw) < 2**20


def test_what_is_read_is_what_the_reference_reader_reads(windowed_path):
    info, reference = read_gguf(windowed_path), gguf.GGUFReader(windowed_path)
    assert [(t.name, t.shape, t.type, t.offset_bytes, t.nbytes) for t in info.tensors] == [
        (t.name, tuple(map(int, t.shape)), t.tensor_type.name, t.data_offset, int(t.n_bytes)) for t in reference.tensors
    ]
    assert info.n_params == sum(int(t.n_elements) for t in reference.tensors)
    keys = {name for name in reference.fields if not name.startswith("GGUF.")}
    assert set(info.metadata) == keys
    for key in keys:
        value = info.metadata[key]
        if isinstance(value, LazyValue):
            assert value.count == len(reference.fields[key].data)
        else:
            expected = reference.fields[key].contents()
            assert (list(value) if isinstance(value, tuple) else value) == expected


def test_the_fields_are_those_of_the_file(tmp_path):
    path = tmp_path / "shape.gguf"
    write_random(
        path,
        RandomShape(architecture="cohere2", sliding_window=96, n_embd=128, n_head=8, n_head_kv=4, n_layer=3, n_ff=64),
    )
    info = read_gguf(path)
    assert (info.version, info.name, info.file_bytes) == (3, "random", path.stat().st_size)
    assert (info.n_layer, info.n_embd, info.n_head, info.n_head_kv, info.n_ff) == (3, 128, 8, 4, 64)
    assert (info.key_length, info.value_length, info.sliding_window) == (16, 16, 96)
    assert (info.n_ctx_train, info.n_vocab, info.split_count, info.pooling) == (8192, 354, 0, None)
    assert info.tensor_bytes == info.n_params * 4
    assert not info.is_embedding


def test_per_layer_heads_explicit_lengths_and_pooling_are_read(tmp_path):
    def array(values):
        return number(4, "I") + number(len(values)) + b"".join(number(value, "I") for value in values)

    path = tmp_path / "layers.gguf"
    entries = [
        ARCH,
        entry("llama.block_count", 4, number(3, "I")),
        entry("llama.embedding_length", 4, number(64, "I")),
        entry("llama.attention.head_count", 4, number(4, "I")),
        entry("llama.attention.head_count_kv", 9, array([2, 0, 4])),
        entry("llama.attention.key_length", 4, number(24, "I")),
        entry("llama.feed_forward_length", 9, array([10, 30, 20])),
        entry("llama.expert_count", 4, number(8, "I")),
        entry("llama.pooling_type", 4, number(4, "I")),
    ]
    path.write_bytes(build(entries))
    info = read_gguf(path)
    assert (info.n_head, info.n_head_kv) == (4, (2, 0, 4))
    assert (info.key_length, info.value_length, info.n_ff, info.n_expert) == (24, 16, 30, 8)
    assert info.pooling == "rank"
    assert info.name == "layers"
    path.write_bytes(build([*entries[:4], entry("llama.attention.head_count_kv", 9, array([2, 0]))]))
    with pytest.raises(ModelFormatError, match="each of 3 layers"):
        read_gguf(path)


def test_a_real_vocabulary_is_counted_without_being_read_into_memory(tmp_path):
    path = tmp_path / "vocabulary.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_token_list([f"token{index}" for index in range(200_000)])
    writer.add_token_scores([0.0] * 200_000)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    tracemalloc.start()
    begun = time.process_time()
    info = read_gguf(path)
    took = time.process_time() - begun
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert info.n_vocab == 200_000
    assert info.metadata["tokenizer.ggml.scores"].count == 200_000
    assert peak < 2**21
    assert took < 2


def test_the_type_table_is_the_gguf_packages():
    known = {int(kind): (kind.name, *sizes) for kind, sizes in gguf.GGML_QUANT_SIZES.items()}
    shared = known.keys() & TENSOR_TYPES.keys()
    assert len(shared) >= 30
    assert {kind: TENSOR_TYPES[kind] for kind in shared} == {kind: known[kind] for kind in shared}


def test_a_missing_file_a_folder_and_a_device_are_named_as_such(tmp_path):
    with pytest.raises(ModelNotFoundError, match="no such file"):
        read_gguf(tmp_path / "none.gguf")
    with pytest.raises(ModelFormatError, match="is a folder"):
        read_gguf(tmp_path)
    with pytest.raises(ModelFormatError, match="a device"):
        read_gguf("/dev/zero")
    with pytest.raises(ModelNotFoundError, match="cannot be read"):
        read_gguf("a\0b.gguf")


def write_shards(folder, count):
    whole = []
    for index in range(count):
        path = folder / f"model-{index + 1:05}-of-{count:05}.gguf"
        split = [entry("split.no", 2, number(index, "H")), entry("split.count", 2, number(count, "H"))]
        path.write_bytes(build([*([] if index else [ARCH]), *split], [tensor(f"t{index}")], data=128))
        whole.append(path)
    return whole


def test_a_split_model_is_read_as_one(tmp_path):
    shards = write_shards(tmp_path, 3)
    assert shard_paths(shards[0]) == tuple(shards)
    assert read_gguf(shards[0]).split_count == 3
    info = read_model(shards[0])
    assert [one.name for one in info.tensors] == ["t0", "t1", "t2"]
    assert (info.n_params, info.quantization) == (96, {"F32": 384})
    assert info.file_bytes == sum(path.stat().st_size for path in shards)


def test_a_split_model_needs_its_first_shard_and_all_others(tmp_path):
    shards = write_shards(tmp_path, 3)
    with pytest.raises(ModelNotFoundError, match="the first of its 3 shards"):
        read_model(shards[1])
    shards[2].unlink()
    with pytest.raises(ModelNotFoundError, match="model-00003-of-00003"):
        read_model(shards[0])


def test_a_model_of_one_file_is_read_whole(tiny_path):
    assert read_model(tiny_path) == read_gguf(tiny_path)
    assert math.prod(read_model(tiny_path).tensors[0].shape) > 0
