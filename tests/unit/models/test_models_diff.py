"""Two GGUF files against plain NumPy over whole tensors."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
from typer.testing import CliRunner

from lltm_ray.cli import app
from lltm_ray.errors import ConfigError, ModelFormatError, ModelNotFoundError
from lltm_ray.models import diff as diff_module
from lltm_ray.models.diff import diff_models, reference_dequantize

F16, Q8, Q4 = gguf.GGMLQuantizationType.F16, gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q4_0


def write(path: Path, tensors: dict[str, tuple[np.ndarray, gguf.GGMLQuantizationType | None]]) -> Path:
    """A GGUF of these; float32 where the type is None."""
    writer = gguf.GGUFWriter(path, "llama")
    for name, (values, kind) in tensors.items():
        if kind is None:
            writer.add_tensor(name, values)
        else:
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def weights(seed: int, rows: int, columns: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, columns)).astype(np.float32)


@pytest.fixture
def pair(tmp_path):
    one, two = weights(1, 64, 256), weights(2, 3, 32)
    norm = np.ones(64, np.float32)
    a = write(
        tmp_path / "a.gguf",
        {"blk.0.x.weight": (one, F16), "blk.1.x.weight": (two, F16), "norm": (norm, None), "gone": (norm, None)},
    )
    b = write(
        tmp_path / "b.gguf",
        {"blk.0.x.weight": (one, Q4), "blk.1.x.weight": (two, Q8), "norm": (norm, None), "new": (norm, None)},
    )
    return a, b, one


def of(found, name):
    return next(each for each in found.tensors if each.name == name)


def test_figures_are_those_of_the_whole_tensor_at_once(pair, monkeypatch):
    a, b, values = pair
    x = values.astype(np.float16).astype(np.float64)
    y = gguf.quants.dequantize(gguf.quants.quantize(values, Q4), Q4).astype(np.float64)
    for chunk in (2**22, 1024):
        monkeypatch.setattr(diff_module, "CHUNK_ELEMENTS", chunk)
        found = of(diff_models(a, b), "blk.0.x.weight")
        assert (found.kind_a, found.kind_b, found.state, found.shape) == ("F16", "Q4_0", "compared", (256, 64))
        assert (found.bits_a, found.bits_b) == (16, 4.5)
        assert found.max_abs == np.abs(x - y).max()
        assert found.rmse == pytest.approx(np.sqrt(((x - y) ** 2).mean()), rel=1e-12)
        assert found.relative == pytest.approx(np.linalg.norm(x - y) / np.linalg.norm(x), rel=1e-12)
        cosine = (x * y).sum() / np.linalg.norm(x) / np.linalg.norm(y)
        assert 1 - found.cosine == pytest.approx(1 - cosine, rel=1e-9)


def test_a_file_does_not_differ_from_itself(pair):
    same = [of(diff_models(pair[1], pair[1]), name) for name in ("blk.0.x.weight", "blk.1.x.weight", "norm", "new")]
    assert [(each.max_abs, each.rmse, each.relative) for each in same] == [(0, 0, 0)] * 4
    assert [each.cosine for each in same] == pytest.approx([1] * 4, rel=1e-14)


def test_what_cannot_be_compared_is_said_first(pair, tmp_path):
    found = diff_models(*pair[:2])
    assert [(each.name, each.state) for each in found.worst()] == [
        ("gone", "only in a"),
        ("new", "only in b"),
        ("blk.0.x.weight", "compared"),
        ("blk.1.x.weight", "compared"),
        ("norm", "compared"),
    ]
    reshaped = write(tmp_path / "c.gguf", {"norm": (np.ones((2, 32), np.float32), None)})
    row = of(diff_models(pair[0], reshaped), "norm")
    assert (row.state, row.note, row.relative) == ("other shape", "[32, 2] in b", None)


def test_numbers_that_are_none_and_zeros_are_no_figures(tmp_path):
    ones, bad, zeros = np.ones(32, np.float32), np.full(32, np.nan, np.float32), np.zeros(32, np.float32)
    endless = np.full(32, np.inf, np.float32)
    a = write(tmp_path / "a.gguf", {"n": (ones, None), "i": (endless, None), "z": (zeros, None), "zz": (zeros, None)})
    b = write(tmp_path / "b.gguf", {"n": (bad, None), "i": (endless, None), "z": (ones, None), "zz": (zeros, None)})
    found = diff_models(a, b)
    assert [of(found, name).state for name in ("n", "i", "z", "zz")] == ["not finite"] * 2 + ["compared"] * 2
    assert (of(found, "z").relative, of(found, "z").cosine, of(found, "z").rmse) == (None, None, 1)
    assert (of(found, "zz").relative, of(found, "zz").cosine) == (0, None)


def test_infinities_whose_products_cancel_are_not_finite(tmp_path):
    inf, many = np.float32(np.inf), 2**14
    a = write(tmp_path / "a.gguf", {"x": (np.full(many, inf), None)})
    b = write(tmp_path / "b.gguf", {"x": (np.repeat([inf, -inf], many // 2), None)})
    assert of(diff_models(a, b), "x").state == "not finite"


def test_a_decoder_that_knows_some_types_leaves_the_others_to_gguf(pair):
    seen = set()

    def decode(blocks, kind, *, n_elements):
        seen.add(kind)
        if kind == "Q4_0":
            raise ConfigError("kind", kind, "cannot be dequantized here")
        return reference_dequantize(blocks, kind, n_elements=n_elements)

    found = diff_models(*pair[:2], dequantize=decode)
    assert {each.name: each.note for each in found.tensors if each.note} == {
        "blk.0.x.weight": "Q4_0 decoded by gguf on the CPU"
    }
    assert of(found, "blk.0.x.weight").relative == of(diff_models(*pair[:2]), "blk.0.x.weight").relative
    assert {"Q8_0", "F16", "F32"} <= seen


def test_a_type_that_nobody_decodes_is_named(pair, monkeypatch):
    known = gguf.quants.dequantize

    def forget(data, kind):
        if kind == Q8:
            raise NotImplementedError
        return known(data, kind)

    monkeypatch.setattr(gguf.quants, "dequantize", forget)
    row = of(diff_models(*pair[:2]), "blk.1.x.weight")
    assert (row.state, row.note, row.relative) == ("cannot be decoded", "Q8_0", None)


def test_a_file_that_is_missing_or_cut_off_is_an_error_of_ours(pair, tmp_path):
    with pytest.raises(ModelNotFoundError):
        diff_models(pair[0], tmp_path / "none.gguf")
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(pair[1].read_bytes()[:-2000])
    with pytest.raises(ModelFormatError):
        diff_models(pair[0], cut)


def test_progress_ends_at_the_bytes_of_both_files(pair):
    told = []
    diff_models(*pair[:2], progress=lambda name, done, total: told.append((name, done, total)))
    assert [name for name, _, _ in told] == ["blk.0.x.weight", "blk.1.x.weight", "norm", "gone", "new"]
    assert told[-1][1] == told[-1][2] > told[0][1] > 0


# the command ------------------------------------------------------------------------------------------------------


def run(*argv: object):
    return CliRunner().invoke(app, ["models", "diff", *map(str, argv)], env={"COLUMNS": "200"})


def test_the_command_prints_the_worst_first_and_a_row_a_type(pair):
    result = run(*pair[:2], "--device", "cpu")
    assert result.exit_code == 0, result.output
    names = [line.split()[0] for line in result.stdout.splitlines()[1:6]]
    assert names == ["gone", "new", "blk.0.x.weight", "blk.1.x.weight", "norm"]
    assert "by type" in result.stdout
    assert "F16" in result.stdout
    assert "Compared on the CPU" in result.stderr
    short = run(*pair[:2], "--device", "cpu", "--rows", 2)
    assert "3 more with less error" in short.stderr


def test_the_command_writes_json_and_a_page(pair, tmp_path):
    page = tmp_path / "page.html"
    result = run(*pair[:2], "--device", "cpu", "--json", "--html", page)
    answer = json.loads(result.stdout)
    assert answer["device"] == "the CPU"
    assert answer["tensors"][2]["name"] == "blk.0.x.weight"
    assert answer["tensors"][2]["relative"] > answer["tensors"][3]["relative"] > 0
    text = page.read_text(encoding="utf-8")
    assert "Plotly.newPlot" in text
    assert "x.weight" in text.split("Plotly.newPlot")[-1]


def test_a_tensor_name_cannot_end_the_pages_script(tmp_path):
    a = write(tmp_path / "a.gguf", {"</script><b>x": (weights(1, 2, 32), F16)})
    page = tmp_path / "page.html"
    assert run(a, a, "--device", "cpu", "--html", page).exit_code == 0
    assert "</script><b>" not in page.read_text(encoding="utf-8")


def test_a_wrong_device_or_count_is_the_users_mistake(pair):
    assert run(*pair[:2], "--device", "tpu").exit_code == 2
    assert run(*pair[:2], "--rows", -1).exit_code == 2
    assert run(*pair[:2], "--only", "nothing").exit_code == 2


def test_only_what_is_named_is_compared(pair):
    answer = json.loads(run(*pair[:2], "--device", "cpu", "--json", "--only", "blk.*.weight").stdout)
    assert [each["name"] for each in answer["tensors"]] == ["blk.0.x.weight", "blk.1.x.weight"]


def test_files_of_two_models_are_refused():
    result = run("tiny", "tiny-draft", "--device", "cpu")
    assert result.exit_code == 2
    assert "(only in a, other shape); give two files of one model" in " ".join(result.stderr.split())
