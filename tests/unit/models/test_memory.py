import os
import re
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import xllamacpp
from hypothesis import given, settings
from hypothesis import strategies as st

from lltm_ray.config import CACHE_TYPES, EngineConfig
from lltm_ray.errors import ConfigError, ModelDoesNotFitError
from lltm_ray.models import footprint
from lltm_ray.models.gguf import GgufInfo, read_gguf
from lltm_ray.models.gguf_header import TensorInfo
from lltm_ray.models.memory import estimate, plan_fit
from tests.sparse_models import Shape, write_sparse

MIB, GIB = 2**20, 2**30
FLASH_OFF = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
FLASH_ON = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_ENABLED


def model(*, layer_bytes=200 * MIB, embedding_bytes=400 * MIB, tied=False, metadata=(), **changes):
    """Llama 3.1 8B in outline, about 7 GiB."""
    fields = {
        "architecture": "llama", "n_layer": 32, "n_embd": 4096, "n_head": 32, "n_head_kv": 8, "key_length": 128,
        "value_length": 128, "n_ff": 14336, "n_vocab": 128_256, "n_ctx_train": 131_072, "sliding_window": 0,
    } | changes  # fmt: skip
    sizes = {"token_embd.weight": embedding_bytes, "output_norm.weight": MIB}
    sizes |= {} if tied else {"output.weight": embedding_bytes}
    sizes |= {f"blk.{index}.ffn_up.weight": layer_bytes for index in range(fields["n_layer"])}
    tensors = tuple(TensorInfo(name, (nbytes,), "I8", 0, nbytes) for name, nbytes in sizes.items())
    return GgufInfo(
        path="m.gguf", file_bytes=0, version=3, name="m", n_params=0, tensors=tensors, quantization={}, n_expert=0,
        n_expert_used=0, chat_template=None, pooling=None, split_no=0, split_count=0,
        metadata={f"{fields['architecture']}.{key}": value for key, value in dict(metadata).items()}, **fields,
    )  # fmt: skip


def kv_bytes(info, n_ctx=8192, n_parallel=1, **config):
    found = estimate(info, n_ctx=n_ctx, n_parallel=n_parallel, n_gpu_layers=0, config=EngineConfig(**config))
    return found.kv_bytes


def test_the_cache_of_a_grouped_query_model_is_heads_times_length_times_layers():
    assert kv_bytes(model()) == 8192 * 32 * 8 * (128 + 128) * 2 == GIB


def test_the_cache_type_scales_keys_and_values_apart():
    assert kv_bytes(model(), cache_type_k="q8_0", cache_type_v="q8_0") == GIB * 34 // 64
    assert kv_bytes(model(), cache_type_k="q8_0") == GIB // 2 + GIB // 2 * 34 // 64
    assert kv_bytes(model(), cache_type_v="q4_0") == GIB // 2 + GIB // 2 * 18 // 64
    assert kv_bytes(model(), cache_type_k="f32", cache_type_v="f32") == 2 * GIB


def test_every_cache_type_of_the_settings_has_a_size():
    assert set(footprint.CACHE_TYPES) == set(CACHE_TYPES)


def test_a_cache_type_whose_blocks_do_not_divide_the_heads_is_refused():
    with pytest.raises(ConfigError, match="heads of 80") as caught:
        kv_bytes(model(key_length=80), cache_type_k="q8_0")
    assert caught.value.field == "cache_type_k"


def test_layers_with_their_own_head_counts_are_summed():
    heads = (8,) * 16 + (0,) * 8 + (16,) * 8
    assert kv_bytes(model(n_head_kv=heads)) == 8192 * sum(heads) * 256 * 2


def test_slots_are_padded_to_256_tokens_each():
    one = kv_bytes(model(), n_ctx=256)
    assert kv_bytes(model(), n_ctx=5000, n_parallel=3) == one * 7 * 3
    assert kv_bytes(model(), n_ctx=8, n_parallel=4) == one * 4
    assert kv_bytes(model(), n_ctx=5000, n_parallel=3, kv_unified=True) == one * 20


def test_sliding_window_layers_keep_the_window_and_a_batch():
    info = model(architecture="gemma3", sliding_window=1024, n_layer=12)
    cell = 8 * 256 * 2
    assert kv_bytes(info) == cell * (2 * 8192 + 10 * 1536)
    assert kv_bytes(info, swa_full=True) == cell * 12 * 8192
    assert kv_bytes(info, n_ctx=16_384, n_parallel=2, kv_unified=True) == cell * (2 * 16_384 + 10 * 2560)
    assert kv_bytes(info, n_ctx=1024) == cell * 12 * 1024


def test_a_window_that_llama_cpp_does_not_use_saves_nothing():
    assert kv_bytes(model(architecture="phi3", sliding_window=1024)) == kv_bytes(model())


def test_the_files_own_window_pattern_wins_over_the_table():
    pattern = (True,) * 30 + (False,) * 2
    info = model(
        architecture="gemma4", sliding_window=512,
        metadata={"attention.sliding_window_pattern": pattern, "attention.key_length_swa": 64},
    )  # fmt: skip
    assert kv_bytes(info) == 8 * 2 * (2 * 8192 * 256 + 30 * 1024 * (64 + 128))


def test_shared_recurrent_and_encoder_layers_have_no_cache_of_their_own():
    assert kv_bytes(model(metadata={"attention.shared_kv_layers": 12})) == GIB * 20 // 32
    assert kv_bytes(model(metadata={"full_attention_interval": 4})) == GIB // 4
    assert kv_bytes(model(architecture="bert")) == 0


def test_recurrent_state_is_counted_once_a_slot():
    state = {"ssm.inner_size": 4096, "ssm.state_size": 128, "ssm.conv_kernel": 4, "ssm.group_count": 1}
    info = model(n_head_kv=0, metadata=state)
    one = 4 * 32 * (3 * (4096 + 256) + 4096 * 128)
    assert kv_bytes(info) == one
    assert kv_bytes(info, n_ctx=65_536, n_parallel=4) == 4 * one


def test_weights_go_to_the_device_layer_by_layer_and_never_get_lost():
    info, config = model(), EngineConfig()
    total = info.tensor_bytes
    for layers in range(34):
        found = estimate(info, n_ctx=4096, n_parallel=1, n_gpu_layers=layers, config=config)
        assert found.weights_device_bytes + found.weights_host_bytes == total
        assert found.kv_bytes == GIB // 2
        assert found.kv_device_bytes == GIB // 2 * min(layers, 32) // 32
    assert found.weights_host_bytes == 400 * MIB  # the input embeddings stay
    assert found.host_bytes == 400 * MIB + 4 * 128_256  # and a row of logits
    assert estimate(info, n_ctx=4096, n_parallel=1, n_gpu_layers=99, config=config) == found


def test_a_tied_output_is_on_the_device_and_the_embeddings_on_the_host():
    found = estimate(model(tied=True), n_ctx=4096, n_parallel=1, n_gpu_layers=33, config=EngineConfig())
    assert found.weights_device_bytes == (32 * 200 + 400 + 1) * MIB
    assert found.weights_host_bytes == 400 * MIB
    assert estimate(model(tied=True), n_ctx=4096, n_parallel=1, n_gpu_layers=0, config=EngineConfig()).host_bytes > 0


def test_without_flash_attention_the_scores_of_all_heads_are_added():
    def compute(flash, **changes):
        config = EngineConfig(flash_attn=flash)
        return estimate(
            model(**changes), n_ctx=32_768, n_parallel=1, n_gpu_layers=0, config=config
        ).compute_bytes  # fmt: skip

    scores, attention, feed_forward, mask = 32 * 32_768, 3 * 4096 + 8 * 256, 3 * 14_336, 2 * 32_768
    assert compute("off") - compute("on") == 512 * (4 * (scores + attention - feed_forward) + mask)
    assert compute("auto") == compute("on")
    assert compute("auto", key_length=100) == compute("off", key_length=100)


def test_embeddings_reserve_the_logits_of_a_whole_batch():
    def compute(**config):
        found = estimate(model(), n_ctx=8192, n_parallel=4, n_gpu_layers=0, config=EngineConfig(**config))
        return found.compute_bytes, found.output_bytes

    plain, embedding = compute(), compute(embeddings=True)
    assert embedding[0] - plain[0] == 4 * 512 * (128_256 + 4096 - 3 * 14_336)
    assert plain[1] == 4 * 4 * 128_256
    assert embedding[1] == plain[1] + 4 * 4 * 4096


def test_each_gpu_of_a_split_has_its_own_buffers():
    one = estimate(model(), n_ctx=4096, n_parallel=1, n_gpu_layers=33, config=EngineConfig())
    two = estimate(
        model(), n_ctx=4096, n_parallel=1, n_gpu_layers=33, config=EngineConfig(tensor_split=(1.0, 3.0, 0.0))
    )
    assert two.compute_bytes == 2 * one.compute_bytes
    assert two.margin_bytes - one.margin_bytes >= footprint.CUDA_CONTEXT_BYTES
    assert two.weights_device_bytes == one.weights_device_bytes


OFF = {"flash_attn": "off"}
MOE = Shape(architecture="qwen3moe", n_ff=256, n_expert=16, n_expert_used=4)
WINDOWED = Shape(architecture="cohere2", window=128, tied=True)
LOADED = [
    (Shape(), {}, {}),
    (Shape(n_vocab=32_000, kind="F16", n_layer=8), {"n_parallel": 1, "n_ctx": 16_384}, {}),
    (Shape(n_vocab=32_000, kind="Q8_0", n_layer=16), {"n_parallel": 3, "n_ctx": 5000}, {"cache_type_k": "q8_0"}),
    (Shape(n_embd=768, n_head=12, kind="F16"), {}, {"cache_type_k": "q4_0", "cache_type_v": "q4_0"}),
    (Shape(n_head_kv=8), {"n_ubatch": 128}, {"cache_type_k": "f32", "cache_type_v": "f32"}),
    (Shape(n_ff=512), {"n_ctx": 8192, "n_parallel": 4, "kv_unified": True}, {}),
    (Shape(n_head_kv=2), {"n_parallel": 4}, OFF),
    (Shape(n_embd=1024, head_length=64, n_ff=4096), {"n_ctx": 1024}, OFF),
    (Shape(architecture="qwen3", head_length=128, kind="F16"), {}, {}),
    (Shape(architecture="gemma3", window=512, n_layer=6, n_vocab=32_000, tied=True), {}, {}),
    (MOE, {"n_ctx": 8192}, {"cache_type_k": "q8_0", "cache_type_v": "q8_0"}),
    (WINDOWED, {"n_parallel": 3, "kv_unified": True}, {}),
    (WINDOWED, {"n_parallel": 1, "swa_full": True}, OFF),
    (Shape(n_vocab=16_000), {"n_parallel": 64, "n_ctx": 16_384}, {}),
]


@contextmanager
def output_in(path):
    """All that this process writes goes into a file; pytest's own capture drops what is written while it is read."""
    kept = [(number, os.dup(number)) for number in (1, 2)]
    with path.open("wb") as file:
        for number, _ in kept:
            os.dup2(file.fileno(), number)
    try:
        yield
    finally:
        for number, copy in kept:
            os.dup2(copy, number)
            os.close(copy)


@pytest.mark.parametrize(("shape", "shared", "special"), LOADED)
def test_the_estimate_is_within_5_percent_of_what_llama_cpp_reports(tmp_path, start_engine, shape, shared, special):
    path = tmp_path / "m.gguf"
    info = write_sparse(path, shape)
    config = EngineConfig(**{"n_ctx": 4096, "n_parallel": 2, "flash_attn": "on", **shared, **special})
    native = {"flash_attn_type": FLASH_OFF if config.flash_attn == "off" else FLASH_ON}
    native |= {
        name: getattr(xllamacpp.ggml_type, f"GGML_TYPE_{value.upper()}")
        for name, value in special.items()
        if name.startswith("cache_type")
    }
    log = read_log(tmp_path / "log", lambda: start_engine(path, verbosity=4, warmup=False, **shared, **native))
    kinds = {kind: rf"{kind} buffer size = +([\d.]+) MiB" for kind in ("model", "KV", "compute", "output")}
    told = {kind: sum(map(float, re.findall(pattern, log))) for kind, pattern in kinds.items()}
    found = estimate(info, n_ctx=config.n_ctx, n_parallel=config.n_parallel, n_gpu_layers=0, config=config)
    assert found.kv_bytes / MIB == pytest.approx(told["KV"], abs=0.011)
    assert found.output_bytes / MIB == pytest.approx(told["output"], abs=0.011)
    assert min(told.values()) > 0 or told["output"] == 0
    assert (found.host_bytes - found.margin_bytes) / MIB == pytest.approx(sum(told.values()), rel=0.05)
    assert found.host_bytes / MIB > sum(told.values())


def read_log(file, start):
    """What llama.cpp logs until its slots are there; a thread of its own writes it."""
    deadline = time.monotonic() + 90
    with output_in(file):
        start()
        while "initializing, n_slots" not in (log := file.read_text(encoding="utf-8")):
            assert time.monotonic() < deadline
            time.sleep(0.02)
    return log


def plan(info, budget, *, on_gpu=True, **config):
    return plan_fit(info, budget_bytes=budget, config=EngineConfig(**config), on_gpu=on_gpu)


def test_a_roomy_gpu_gets_every_layer_and_the_whole_trained_context():
    found = plan(model(), 140 * GIB)
    assert (found.n_ctx, found.n_parallel, found.n_gpu_layers, found.shrunk) == (524_288, 4, 33, ())


def test_a_fitting_gpu_gets_every_layer_and_what_context_it_holds():
    found = plan(model(), 16 * GIB)
    assert found.n_gpu_layers == 33
    assert 4 * 4096 < found.n_ctx < 4 * 131_072
    assert found.n_ctx % (4 * 256) == 0
    assert found.shrunk == (f"n_ctx is {found.n_ctx}, {found.n_ctx // 4} a slot of the model's 131072: "
                            "that is all the share can hold",)  # fmt: skip
    more = estimate(model(), n_ctx=found.n_ctx + 1024, n_parallel=4, n_gpu_layers=33, config=EngineConfig())
    assert found.estimate.device_bytes <= 16 * GIB < more.device_bytes


def test_a_small_gpu_gets_the_layers_that_fit_and_a_comfortable_context():
    found = plan(model(), 6 * GIB)
    assert 1 < found.n_gpu_layers < 33
    assert (found.n_ctx, found.n_parallel) == (4 * 2048, 4)
    assert any(f"n_gpu_layers is {found.n_gpu_layers} of 33" in line for line in found.shrunk)
    assert found.estimate.host_bytes > GIB


def test_a_cpu_gets_no_layers_and_at_most_8192_tokens_a_slot():
    found = plan(model(), 64 * GIB, on_gpu=False)
    assert (found.n_ctx, found.n_gpu_layers) == (4 * 8192, 0)
    assert found.shrunk == ("n_ctx is 32768, 8192 a slot of the model's 131072: set n_ctx for more",)
    assert found.estimate.device_bytes == 0
    assert plan(model(), 64 * GIB, on_gpu=False, n_ctx=100_000).n_ctx == 100_000
    assert plan(model(), 64 * GIB, on_gpu=False, n_gpu_layers=20).shrunk[-1] == (
        "n_gpu_layers is 0 instead of 20: the share has no GPU"
    )


def test_without_a_budget_everything_fits_at_the_default_context():
    found = plan(model(), None)
    assert (found.n_ctx, found.n_gpu_layers) == (4 * 8192, 33)


def test_slots_are_given_up_only_when_512_tokens_each_do_not_fit():
    weights = estimate(model(), n_ctx=512, n_parallel=1, n_gpu_layers=0, config=EngineConfig()).host_bytes
    found = plan(model(), weights + 70 * MIB, on_gpu=False)
    assert (found.n_parallel, found.n_ctx) == (2, 1024)
    assert found.shrunk[0] == "n_parallel is 2 instead of 4: more slots do not fit"
    assert plan(model(), weights, on_gpu=False).n_parallel == 1


def test_a_model_too_large_is_refused_with_its_need_and_a_remedy():
    with pytest.raises(ModelDoesNotFitError, match="smaller quantization") as caught:
        plan(model(), GIB, on_gpu=False)
    assert caught.value.free_bytes == GIB
    assert caught.value.need_bytes > model().tensor_bytes
    assert plan(model(), caught.value.need_bytes, on_gpu=False).n_parallel == 1
    with pytest.raises(ModelDoesNotFitError, match="larger gpu_share"):
        plan(model(), 100 * MIB)


def test_a_context_that_was_asked_for_is_kept_or_refused_with_what_would_fit():
    assert plan(model(), 16 * GIB, n_ctx=5000).n_ctx == 5000
    assert plan(model(), 6 * GIB, n_ctx=8192).n_gpu_layers < 33
    with pytest.raises(ModelDoesNotFitError, match=r"n_ctx=200000 was asked for; n_ctx=(\d+) fits") as caught:
        plan(model(), 16 * GIB, on_gpu=False, n_ctx=200_000)
    fits = int(re.search(r"n_ctx=(\d+) fits", str(caught.value))[1])
    assert plan(model(), 16 * GIB, on_gpu=False, n_ctx=fits).n_ctx == fits
    with pytest.raises(ModelDoesNotFitError):
        plan(model(), 16 * GIB, on_gpu=False, n_ctx=fits + 1024)


def test_layers_that_were_asked_for_are_kept_or_refused():
    assert plan(model(), 16 * GIB, n_gpu_layers=10).n_gpu_layers == 10
    assert plan(model(), 16 * GIB, n_gpu_layers=999).n_gpu_layers == 33
    assert plan(model(), 2 * GIB, n_gpu_layers=0).n_gpu_layers == 0
    with pytest.raises(ModelDoesNotFitError, match="smaller n_gpu_layers"):
        plan(model(), 6 * GIB, n_gpu_layers=33)


def test_a_quantized_cache_buys_context():
    plain = plan(model(), 16 * GIB)
    small = plan(model(), 16 * GIB, cache_type_k="q8_0", cache_type_v="q8_0")
    assert small.n_ctx > 1.7 * plain.n_ctx


def test_a_model_of_a_short_context_gets_no_more_than_it_was_trained_for():
    found = plan(model(n_ctx_train=300), 64 * GIB)
    assert found.n_ctx == 4 * 256
    assert plan(model(n_ctx_train=0), 64 * GIB).n_ctx == 4 * 8192


def test_the_tiny_model_fits_a_small_machine(tiny_path: Path):
    found = plan(read_gguf(tiny_path), 512 * MIB, on_gpu=False)
    assert (found.n_ctx, found.n_parallel, found.shrunk) == (4 * 8192, 4, ())


INFOS = st.builds(
    model,
    layer_bytes=st.integers(1, 300 * MIB),
    embedding_bytes=st.integers(1, 500 * MIB),
    tied=st.booleans(),
    architecture=st.sampled_from(["llama", "gemma3", "gpt-oss", "bert"]),
    n_layer=st.integers(1, 40),
    n_head_kv=st.sampled_from([0, 1, 8, 32]),
    n_ctx_train=st.sampled_from([0, 200, 512, 3000, 8192, 131_072]),
    sliding_window=st.sampled_from([0, 128, 1024]),
)
CONFIGS = st.builds(
    EngineConfig,
    n_ctx=st.one_of(st.none(), st.integers(8, 300_000)),
    n_parallel=st.integers(1, 9),
    n_gpu_layers=st.one_of(st.none(), st.integers(0, 50)),
    n_ubatch=st.sampled_from([16, 512]),
    flash_attn=st.sampled_from(["on", "off", "auto"]),
    cache_type_k=st.sampled_from(["f16", "q8_0"]),
    kv_unified=st.booleans(),
    swa_full=st.booleans(),
    tensor_split=st.sampled_from([(), (1.0, 1.0)]),
)
BUDGETS = st.integers(0, 30 * GIB)


def try_plan(info, budget, config, on_gpu):
    try:
        return plan_fit(info, budget_bytes=budget, config=config, on_gpu=on_gpu)
    except ModelDoesNotFitError as error:
        assert error.need_bytes > error.free_bytes == budget  # noqa: PT017
        return None


@settings(max_examples=150, deadline=None)
@given(INFOS, CONFIGS, BUDGETS, st.booleans())
def test_a_plan_fits_and_keeps_what_was_set(info, config, budget, on_gpu):
    found = try_plan(info, budget, config, on_gpu)
    if found is None:
        return
    need = found.estimate.device_bytes if on_gpu else found.estimate.host_bytes
    assert need <= budget
    assert 1 <= found.n_parallel <= config.n_parallel
    assert config.n_ctx in (None, found.n_ctx)
    assert 0 <= found.n_gpu_layers <= info.n_layer + 1
    if config.n_ctx is None:
        assert found.n_ctx % (256 * found.n_parallel) == 0
        assert found.n_ctx <= max(info.n_ctx_train or 8192, 256) * found.n_parallel
    if config.n_gpu_layers is not None and on_gpu:
        assert found.n_gpu_layers == min(config.n_gpu_layers, info.n_layer + 1)


@settings(max_examples=150, deadline=None)
@given(INFOS, CONFIGS, BUDGETS, BUDGETS, st.booleans())
def test_more_memory_never_gives_less(info, config, one, other, on_gpu):
    less, more = (try_plan(info, budget, config, on_gpu) for budget in sorted((one, other)))
    if less is None:
        return
    assert more is not None
    assert more.n_ctx >= less.n_ctx
    assert more.n_parallel >= less.n_parallel
    assert more.n_gpu_layers >= less.n_gpu_layers
