"""`models diff` with numbers that PyTorch holds, as on a GPU; needs PyTorch."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from lltm_ray.errors import ConfigError
from lltm_ray.models.diff import diff_models, reference_dequantize

pytestmark = pytest.mark.torch


def write(path, kind, values):
    writer = gguf.GGUFWriter(path, "llama")
    for name, each in values.items():
        writer.add_tensor(name, gguf.quants.quantize(each, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def pair(tmp_path):
    random = np.random.default_rng(0)
    values = {name: random.normal(size=(37, 256)).astype(np.float32) for name in ("x", "y")}
    kinds = {"a": gguf.GGMLQuantizationType.F16, "b": gguf.GGMLQuantizationType.Q5_0}
    return [write(tmp_path / f"{name}.gguf", kind, values) for name, kind in kinds.items()]


def test_tensors_of_pytorch_give_the_figures_of_numpy(pair):
    import torch

    def decode(blocks, kind, *, n_elements):
        return torch.from_numpy(reference_dequantize(blocks, kind, n_elements=n_elements))

    ours, theirs = diff_models(*pair, dequantize=decode).tensors, diff_models(*pair).tensors
    for one, two in zip(ours, theirs, strict=True):
        assert (one.max_abs, one.note) == (two.max_abs, "")
        for name in ("rmse", "relative", "cosine"):
            assert getattr(one, name) == pytest.approx(getattr(two, name), rel=1e-12), name


def test_a_type_that_the_kernels_do_not_know_is_compared_on_the_cpu_and_says_so(pair):
    import torch

    from lltm_ray.kernels.gguf_blocks import dequantize

    def decode(blocks, kind, *, n_elements):
        return dequantize(torch.from_numpy(blocks), kind, n_elements=n_elements)

    with pytest.raises(ConfigError, match="Q5_0"):
        decode(np.zeros(22, np.uint8), "Q5_0", n_elements=32)
    found, wanted = diff_models(*pair, dequantize=decode).tensors, diff_models(*pair).tensors
    assert {each.note for each in found} == {"Q5_0 decoded by gguf on the CPU"}
    assert [each.relative for each in found] == [each.relative for each in wanted]
