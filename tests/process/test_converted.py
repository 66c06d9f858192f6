"""llama.cpp loads what was converted, and computes with it."""

import numpy as np
import pytest

from lltm_ray.models.convert.convert import convert
from lltm_ray.sdk.server import ServerManager
from tests.checkpoints import CONFIGS, write_checkpoint


@pytest.mark.parametrize("architecture", CONFIGS)
def test_llama_cpp_loads_and_runs_a_converted_checkpoint(tmp_path, monkeypatch, architecture):
    monkeypatch.setenv("LLTM_RAY_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "model.gguf"
    convert(write_checkpoint(tmp_path / "checkpoint", architecture), path, out_type="f32")
    with ServerManager() as manager:
        kind = {"embeddings": architecture == "BertModel" or None, "pooling": pooling(architecture)}
        manager.start_server(str(path), ctx_size=512, n_threads=1, n_threads_batch=1, **kind)
        if architecture == "BertModel":
            one, same, other = np.array(manager.client.embed(["ab c", "ab c", "xyz"]).vectors)
            assert one == pytest.approx(same, abs=1e-4)
            assert abs(one - other).max() > 1e-3
        else:
            done = manager.client.complete("abab cd", n_predict=6, temperature=0, ignore_eos=True)
            assert done.usage.output_tokens == 6
            assert manager.client.detokenize(list(manager.client.tokenize("abcd ab"))) == "abcd ab"


def pooling(architecture):
    return "mean" if architecture == "BertModel" else None
