"""Quantized files against what llama-quantize made of the same sources (`python -m tests.peers.quantize`)."""

import json
import platform
import shutil
import struct
import tracemalloc
from pathlib import Path
from threading import Event

import gguf
import numpy as np
import pytest

from lltm_ray.errors import CancelledError, ConfigError, DiskFullError, ModelFormatError, ModelNotFoundError
from lltm_ray.llamacpp.ggml import TYPES, load_ggml
from lltm_ray.models.diff import diff_models
from lltm_ray.models.gguf import read_gguf, read_model
from lltm_ray.models.gguf_header import TENSOR_TYPES
from lltm_ray.models.quantize.kinds import KINDS, find_kind
from lltm_ray.models.quantize.mixtures import needs_imatrix
from lltm_ray.models.quantize.plan import Options, choose_types
from lltm_ray.models.quantize.quantize import quantize
from lltm_ray.models.whole_file import check_space, whole_file
from tests.peers.quantize import OPTIONS, types_digest
from tests.quantized import DEEP, SMALL, by_ggml, digest, make, write_matrix, write_source

KEPT = json.loads(Path(__file__).with_name("quantized.json").read_text())
SAME_BLOCKS = platform.machine() == "x86_64"
"""The digests are of this processor: others fuse multiplication and addition, which moves a rounding now and then."""


def left(folder):
    return [path.name for path in folder.iterdir() if "partial" in path.name]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return write_source(tmp_path_factory.mktemp("source") / "llama-F16.gguf", SMALL["llama"], "F16")


@pytest.mark.parametrize("name", SMALL)
def test_whole_files_are_llama_quantizes_byte_for_byte(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)  # a file keeps its matrix's path
    matrix, out = write_matrix(Path("matrix.gguf"), SMALL[name]), tmp_path / "out.gguf"
    sources = {
        kind: write_source(tmp_path / f"{kind}.gguf", SMALL[name], kind)
        for kind in (("F32", "F16", "BF16") if name == "llama" else ("BF16",))
    }
    ours = {}
    for kind in (kind for kind in KINDS if f"{name} {kind}" in KEPT["whole_files"]):
        have = {"F32": "F16", "F16": "BF16"}.get(kind, "F32") if name == "llama" else "BF16"
        path = sources[have].rename(tmp_path / f"{name}.gguf")
        for label, given, _ in (*OPTIONS, ("imatrix", {"imatrix": str(matrix)}, [])):
            case = f"{name} {kind} {label}".strip()
            if KEPT["whole_files"].get(case):
                make(path, out, kind, threads=2, **given)
                ours[case] = digest(out)
        path.rename(sources[have])
    assert len(ours) >= 20
    if SAME_BLOCKS:
        assert ours == {case: KEPT["whole_files"][case] for case in ours}


def test_a_matrix_changes_blocks_and_metadata_as_llama_quantize_has_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = write_source(Path("mixtral.gguf"), SMALL["mixtral"], "BF16")
    write_matrix(Path("matrix.gguf"), SMALL["mixtral"])
    with_it, without = make(source, "a.gguf", "Q4_0", imatrix="matrix.gguf"), make(source, "b.gguf", "Q4_0")
    said = {key: value for key, value in with_it.metadata.items() if key.startswith("quantize.")}
    assert said == {
        "quantize.imatrix.file": "matrix.gguf",
        "quantize.imatrix.dataset": "text.txt",
        "quantize.imatrix.entries_count": 17,
        "quantize.imatrix.chunks_count": 7,
    }
    assert without.metadata.keys() == with_it.metadata.keys() - said.keys()
    changed = [
        each.name for each in diff_models("a.gguf", "b.gguf").tensors if each.max_abs and each.name != "output.weight"
    ]
    assert len(changed) == 14  # all that the matrix knows; token_embd.weight it does not


@pytest.mark.parametrize("name", DEEP)
def test_every_tensor_of_a_deep_model_gets_llama_quantizes_type(tmp_path, name):
    info = read_model(write_source(tmp_path / "deep.gguf", DEEP[name]))
    for kind in KINDS:
        for label, has_imatrix in (("", False), (" imatrix", True)):
            types = choose_types(info, Options(kind=kind), has_imatrix=has_imatrix)
            theirs = KEPT["types_only"][f"{name} {kind}{label}"]
            if theirs is None:
                assert any(needs_imatrix(tensor, chosen, kind) for tensor, chosen in types.items()), kind
            else:
                assert types_digest(types) == theirs, (kind, label)


def test_names_and_numbers_are_those_of_ggml_and_llama_cpp():
    assert {number: name for name, (number, _) in KINDS.items()}.items() <= {
        each.value: each.name.removeprefix("MOSTLY_").removeprefix("ALL_") for each in gguf.LlamaFileType
    }.items()
    assert {number: TENSOR_TYPES[number][0] for number in TYPES.values()} == {n: name for name, n in TYPES.items()}
    assert find_kind("q4_k") == "Q4_K_M"
    with pytest.raises(ConfigError, match=r"type='Q4': must be one of BF16, F16"):
        find_kind("Q4")


def test_the_result_reads_back_as_near_as_its_type_allows(tmp_path, llama):
    sizes = {}
    for kind, most in (("Q8_0", 0.01), ("Q6_K", 0.03), ("Q4_K_M", 0.15), ("Q2_K", 0.5)):
        info = make(llama, tmp_path / "out.gguf", kind)
        rows = diff_models(llama, info.path).tensors
        assert all(row.state == "compared" and row.relative < most for row in rows), kind
        sizes[kind] = info.file_bytes
        assert gguf.GGUFReader(info.path).fields["general.quantization_version"].contents() == 2
        assert info.metadata["tokenizer.ggml.tokens"].count == 4  # the tokenizer is there
    assert sorted(sizes.values(), reverse=True) == list(sizes.values())


def test_a_split_model_becomes_one_file_with_the_same_bytes(tmp_path, llama):
    whole = make(llama, tmp_path / "whole.gguf", "Q5_K_S")
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama", split_max_tensors=9)
    reader = gguf.GGUFReader(llama)
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            kind = field.types[0]
            writer.add_key_value(field.name, field.contents(), kind, sub_type=field.types[-1] if kind == 9 else None)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    shards = sorted(tmp_path.glob("model-*"))
    assert len(shards) > 2
    joined = make(shards[0], tmp_path / "joined.gguf", "Q5_K_S")
    assert digest(Path(joined.path)) == digest(Path(whole.path))


def test_a_quantized_source_is_refused_unless_it_is_allowed(tmp_path, llama):
    once = make(llama, tmp_path / "once.gguf", "Q8_0").path
    with pytest.raises(ConfigError, match=r"output\.weight is Q8_0, quantized already.*--allow-requantize"):
        make(once, tmp_path / "twice.gguf", "Q4_K_M")
    assert make(once, tmp_path / "twice.gguf", "Q4_K_M", allow_requantize=True).quantization["Q4_K"]
    assert make(once, tmp_path / "same.gguf", "Q8_0").quantization["Q8_0"]  # nothing to do is nothing to lose


def test_a_kind_that_is_garbage_without_a_matrix_is_refused(tmp_path, llama):
    for kind in ("Q2_K_S", "IQ2_XXS", "IQ1_S"):
        with pytest.raises(ConfigError, match=rf"type='{kind}': blk\.0\..* importance matrix; give one"):
            make(llama, tmp_path / "out.gguf", kind)
    assert left(tmp_path) == []


def test_odd_options_and_places_are_refused_by_name(tmp_path, llama):
    with pytest.raises(ConfigError, match="threads=-1"):
        Options(kind="Q8_0", threads=-1)
    with pytest.raises(ConfigError, match="one of the files that it is made of"):
        make(llama, llama, "Q8_0")
    with pytest.raises(ConfigError, match="is a folder"):
        make(llama, tmp_path, "Q8_0")
    with pytest.raises(ConfigError, match="its folder cannot be used: No such file"):
        make(llama, tmp_path / "no" / "out.gguf", "Q8_0")
    with pytest.raises(ModelNotFoundError, match="no such file"):
        make(tmp_path / "no.gguf", tmp_path / "out.gguf", "Q8_0")


def test_a_matrix_that_is_none_or_anothers_is_refused(tmp_path, llama):
    out = tmp_path / "out.gguf"
    (tmp_path / "old.dat").write_bytes(struct.pack("<i", 3) + bytes(99))
    with pytest.raises(ConfigError, match=r"imatrix='.*old.dat': is no GGUF file; llama-imatrix --in-file"):
        make(llama, out, "Q4_K_M", imatrix=str(tmp_path / "old.dat"))
    with pytest.raises(ModelFormatError, match=r"is no importance matrix: it lacks imatrix\.datasets"):
        make(llama, out, "Q4_K_M", imatrix=str(llama))
    other = write_matrix(tmp_path / "other.gguf", DEEP["odd-10"])
    with pytest.raises(ConfigError, match=r"has 288 values for output\.weight, which has 256"):
        make(llama, out, "Q4_K_M", imatrix=str(other))
    endless = write_matrix(tmp_path / "endless.gguf", SMALL["llama"], scale=np.inf)
    with pytest.raises(ModelFormatError, match="not finite; compute the matrix anew"):
        make(llama, out, "Q4_K_M", imatrix=str(endless))
    with pytest.raises(ModelNotFoundError, match="it cannot be read: No such file"):
        make(llama, out, "Q4_K_M", imatrix=str(tmp_path / "no.gguf"))
    assert left(tmp_path) == []


def test_numbers_that_are_not_finite_are_told_by_tensor_and_leave_no_file(tmp_path, capfd):
    source = write_source(tmp_path / "source.gguf", SMALL["llama"])
    tensor = next(each for each in read_gguf(source).tensors if each.name == "blk.1.ffn_up.weight")
    with source.open("r+b") as file:
        file.seek(tensor.offset_bytes + 40)
        file.write(struct.pack("<f", float("nan")))
    with pytest.raises(ModelFormatError, match=r"blk\.1\.ffn_up\.weight holds numbers that are not finite"):
        make(source, tmp_path / "out.gguf", "Q8_0")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source.gguf"]
    assert "nan" in capfd.readouterr().err  # ggml's own word for it


def test_a_source_that_ends_early_is_refused(tmp_path, llama):
    source = Path(shutil.copy(llama, tmp_path / "short.gguf"))
    with source.open("r+b") as file:
        file.truncate(source.stat().st_size - 100)
    with pytest.raises(ModelFormatError, match="truncated or damaged"):
        make(source, tmp_path / "out.gguf", "Q8_0")


def test_cancelling_and_interrupting_leave_what_was_there(tmp_path, llama):
    out, cancel = tmp_path / "out.gguf", Event()
    out.write_text("before")

    def interrupt(name, done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(llama, out, Options(kind="Q4_K_M"), write=by_ggml, progress=interrupt)
    with pytest.raises(CancelledError):
        quantize(llama, out, Options(kind="Q8_0"), write=by_ggml, progress=lambda *_: cancel.set(), cancel=cancel)
    assert (out.read_text(), left(tmp_path)) == ("before", [])


def test_progress_counts_the_sources_bytes_to_the_end(tmp_path, llama):
    heard = []
    quantize(
        llama, tmp_path / "out.gguf", Options(kind="Q8_0"), write=by_ggml, progress=lambda *said: heard.append(said)
    )
    total = sum(each.nbytes for each in read_gguf(llama).tensors)
    done = [each[1] for each in heard]
    assert (done, heard[-1][1:]) == (sorted(done), (total, total))
    assert heard[0][0] == "output.weight"


def test_a_full_disk_is_told_before_anything_is_written(tmp_path, llama, monkeypatch):
    free = shutil.disk_usage(tmp_path)._replace(free=10_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    with pytest.raises(DiskFullError, match=r"GiB free, .* are needed") as caught:
        make(llama, tmp_path / "out.gguf", "Q8_0")
    assert caught.value.need_bytes > caught.value.free_bytes == 10_000
    with pytest.raises(DiskFullError):
        check_space({tmp_path / "a": 6000, tmp_path / "b": 6000})  # each alone would fit
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_writer_left_goes_and_what_a_living_one_writes_stays(tmp_path):
    target = tmp_path / "out.gguf"
    left_behind = tmp_path / ".out.gguf.0badcafe.partial"
    left_behind.mkdir()
    for name in ("out.gguf", "lock"):
        (left_behind / name).write_bytes(b"half")
    (tmp_path / ".out.gguf.0badc0de.partial").symlink_to(tmp_path.parent)
    with whole_file(target) as first:
        first.write_bytes(b"1")
        with whole_file(target) as second:
            folders = {path for path in tmp_path.iterdir() if not path.is_symlink()}
            assert folders == {first.parent, second.parent}
            second.write_bytes(b"2")
        assert target.read_bytes() == b"2"
    assert (target.read_bytes(), left(tmp_path)) == (b"1", [".out.gguf.0badc0de.partial"]), "no link is followed"


def test_memory_is_of_chunks_not_of_the_model(tmp_path):
    source = tmp_path / "source.gguf"
    writer = gguf.GGUFWriter(source, "llama")
    writer.add_block_count(1)
    writer.add_head_count(1)
    writer.add_tensor("blk.0.ffn_up.weight", np.zeros((8192, 4096), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tracemalloc.start()
    try:
        make(source, tmp_path / "out.gguf", "Q8_0", threads=2)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 16 * 2**20 < source.stat().st_size // 8


def test_ggml_is_not_called_with_what_would_end_the_process():
    ggml, rows = load_ggml(), np.ones((2, 256), np.float32)
    with pytest.raises(ConfigError, match="not whole Q4_K blocks of 256"):
        ggml.encode(rows[:, :255], "Q4_K")
    with pytest.raises(ConfigError, match="needs an importance matrix"):
        ggml.encode(rows, "IQ2_XS")
    with pytest.raises(ConfigError, match="one for each of 256 columns"):
        ggml.encode(rows, "Q4_K", np.ones(255, np.float32))
    with pytest.raises(ConfigError, match="must be one of F32"):
        ggml.encode(rows, "I32")
    with pytest.raises(ConfigError, match="are not the bytes of 512 elements of Q8_0"):
        ggml.decode(bytes(100), "Q8_0", 512)


@pytest.mark.parametrize(
    "kind", ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K"]
)
def test_what_ggml_encodes_gguf_decodes_as_ggml_does(kind):
    rows = np.random.default_rng(0).standard_normal((3, 512)).astype(np.float32)
    blocks = load_ggml().encode(rows, kind)
    there = load_ggml().decode(blocks.tobytes(), kind, rows.size)
    reference = gguf.quants.dequantize(blocks.reshape(3, -1), gguf.GGMLQuantizationType[kind])
    assert there == pytest.approx(reference.reshape(-1), abs=1e-6)
    assert load_ggml().is_valid(blocks, kind)
