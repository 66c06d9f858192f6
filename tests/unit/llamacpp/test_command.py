from dataclasses import fields
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lltm_ray.config import CACHE_TYPES, EngineConfig, LoraAdapter
from lltm_ray.errors import ConfigError
from lltm_ray.llamacpp.command import FLAGS, ArgumentError, build_args, default_http_threads, read_args, read_loras

OTHER: dict[str, Any] = {
    "n_ctx": 4096,
    "n_parallel": 2,
    "n_batch": 1024,
    "n_ubatch": 256,
    "n_gpu_layers": 7,
    "split_mode": "row",
    "tensor_split": (0.5, 1.5),
    "main_gpu": 1,
    "flash_attn": "on",
    "cache_type_k": "q8_0",
    "cache_type_v": "q4_0",
    "kv_unified": True,
    "cache_ram_mib": 0,
    "cache_reuse": 64,
    "swa_full": True,
    "context_shift": True,
    "slot_prompt_similarity": 0.25,
    "n_threads": 3,
    "n_threads_batch": 5,
    "n_threads_http": 33,
    "use_mmap": False,
    "use_mlock": True,
    "lora": (LoraAdapter(path="/a.gguf", scale=0.5), LoraAdapter(path="/b.gguf")),
    "mmproj": "/eye.gguf",
    "model_draft": "/draft.gguf",
    "draft_max": 8,
    "draft_min": 2,
    "draft_p_min": 0.75,
    "n_gpu_layers_draft": 3,
    "spec_type": "ngram-simple",
    "embeddings": True,
    "reranking": True,
    "pooling": "mean",
    "chat_template": "chatml",
    "jinja": False,
    "reasoning_format": "none",
    "rope_freq_base": 10000.0,
    "rope_freq_scale": 0.5,
    "slot_save_path": "/slots",
    "sleep_idle_s": 60,
    "warmup": False,
    "extra_args": ("--verbosity", "4"),
}
"""For each setting a value that is not its default."""


def args_of(config: EngineConfig | None = None, **changes: Any) -> list[str]:
    where: dict[str, Any] = {
        "model_path": "/m.gguf",
        "host": "127.0.0.1",
        "port": 8081,
        "alias": "m",
        "api_key_file": "/key",
    }
    return build_args(config or EngineConfig(), **{**where, **changes})


def test_there_is_another_value_for_every_setting() -> None:
    assert set(OTHER) == {item.name for item in fields(EngineConfig)}
    defaults = EngineConfig()
    assert all(getattr(defaults, name) != value for name, value in OTHER.items())


@pytest.mark.parametrize("name", OTHER)
def test_every_setting_changes_the_arguments_and_can_be_read_back(name: str) -> None:
    config = EngineConfig(**{name: OTHER[name]})
    assert args_of(config) != args_of()
    assert read_args(args_of(config)) != read_args(args_of())


def test_all_settings_together_read_back_as_they_were_written() -> None:
    found = read_args(args_of(EngineConfig(**OTHER)))
    assert found == {
        "--model": "/m.gguf",
        "--alias": "m",
        "--host": "127.0.0.1",
        "--port": 8081,
        "--api-key-file": "/key",
        "--ctx-size": 4096,
        "--parallel": 2,
        "--n-gpu-layers": 7,
        "--threads-http": 33,
        "--fit": "off",
        "--metrics": True,
        "--slots": True,
        "--props": True,
        "--ui": False,
        "--offline": True,
        "--kv-unified": True,
        "--context-shift": True,
        "--swa-full": True,
        "--jinja": False,
        "--warmup": False,
        "--embeddings": True,
        "--reranking": True,
        "--batch-size": 1024,
        "--ubatch-size": 256,
        "--split-mode": "row",
        "--main-gpu": 1,
        "--flash-attn": "on",
        "--cache-type-k": "q8_0",
        "--cache-type-v": "q4_0",
        "--cache-ram": 0,
        "--cache-reuse": 64,
        "--slot-prompt-similarity": 0.25,
        "--threads": 3,
        "--threads-batch": 5,
        "--mmproj": "/eye.gguf",
        "--spec-draft-model": "/draft.gguf",
        "--spec-draft-n-max": 8,
        "--spec-draft-n-min": 2,
        "--spec-draft-p-min": 0.75,
        "--spec-draft-ngl": 3,
        "--spec-type": "ngram-simple",
        "--pooling": "mean",
        "--reasoning-format": "none",
        "--rope-freq-base": 10000.0,
        "--rope-freq-scale": 0.5,
        "--slot-save-path": "/slots",
        "--sleep-idle-seconds": 60,
        "--chat-template": "chatml",
        "--load-mode": "mlock",
        "--tensor-split": "0.5,1.5",
        "--lora-scaled": "/a.gguf:0.5,/b.gguf:1.0",
        "--verbosity": 4,
    }


def test_every_flag_of_the_table_is_written_by_some_configuration() -> None:
    written = {text for config in (EngineConfig(**OTHER), EngineConfig()) for text in args_of(config)}
    assert set(FLAGS) <= written | {"--no-context-shift", "--no-kv-unified"}
    assert {text for text in written if text.startswith("--")} <= set(FLAGS)


@given(
    n_ctx=st.integers(8, 2**31),
    similarity=st.floats(0, 1),
    cache=st.sampled_from(CACHE_TYPES),
    scale=st.floats(allow_nan=False, allow_infinity=False),
)
def test_numbers_survive_the_way_to_text_and_back(n_ctx: int, similarity: float, cache: str, scale: float) -> None:
    config = EngineConfig(
        n_ctx=n_ctx,
        slot_prompt_similarity=similarity,
        cache_type_k=cache,
        lora=(LoraAdapter(path="/l.gguf", scale=scale),),
    )
    found = read_args(args_of(config))
    assert (found["--ctx-size"], found["--slot-prompt-similarity"], found["--cache-type-k"]) == (
        n_ctx,
        similarity,
        cache,
    )
    assert read_loras(str(found["--lora-scaled"])) == [("/l.gguf", scale)]


def test_the_planner_numbers_win_over_the_settings() -> None:
    config = EngineConfig(n_ctx=1024, n_parallel=1, n_gpu_layers=5)
    found = read_args(args_of(config, n_ctx=9999, n_parallel=3, n_gpu_layers=0))
    assert (found["--ctx-size"], found["--parallel"], found["--n-gpu-layers"]) == (9999, 3, 0)


def test_what_nobody_chose_is_left_to_llama_cpp() -> None:
    found = read_args(args_of(api_key_file=None))
    assert not {"--ctx-size", "--n-gpu-layers", "--cache-ram", "--threads", "--api-key-file"} & set(found)


def test_http_threads_outnumber_the_connections_that_can_be_busy() -> None:
    assert read_args(args_of(n_parallel=16))["--threads-http"] == default_http_threads(16) == 40


def test_the_jinja_switch_precedes_the_template_it_allows() -> None:
    args = args_of(EngineConfig(chat_template="{{ messages }}"))
    assert args.index("--jinja") < args.index("--chat-template")


@pytest.mark.parametrize(
    ("mmap", "mlock", "mode"),
    [(True, False, "mmap"), (True, True, "mmap+mlock"), (False, True, "mlock"), (False, False, "none")],
)
def test_mmap_and_mlock_become_one_load_mode(mmap: bool, mlock: bool, mode: str) -> None:
    assert read_args(args_of(EngineConfig(use_mmap=mmap, use_mlock=mlock)))["--load-mode"] == mode


def test_a_chosen_kind_of_drafting_is_not_overruled() -> None:
    config = EngineConfig(model_draft="/d.gguf", extra_args=("--spec-type", "draft-mtp"))
    assert args_of(config).count("--spec-type") == 1
    assert read_args(args_of(config))["--spec-type"] == "draft-mtp"


@pytest.mark.parametrize("flag", ["--api-key", "--api-key=abc", "--hf-token", "-hft", "--port", "-m", "--api-key-file"])
def test_secrets_and_our_own_flags_are_refused_as_extra_arguments(flag: str) -> None:
    with pytest.raises(ConfigError, match="extra_args") as caught:
        args_of(EngineConfig(extra_args=(flag, "secret-word")))
    assert "secret-word" not in str(caught.value)
    assert "abc" not in str(caught.value)


@pytest.mark.parametrize("flag", ["--api-prefix", "--api-prefix=/v1"])
def test_a_prefix_before_all_routes_is_refused_with_where_to_put_one(flag: str) -> None:
    with pytest.raises(ConfigError, match=r"^extra_args='--api-prefix': .* put a prefix before the gateway by a proxy"):
        args_of(EngineConfig(extra_args=(flag, "/v1")))


@pytest.mark.parametrize("path", ["/a,b.gguf", "/a:b.gguf", '/a"b.gguf'])
def test_an_adapter_path_that_llama_cpp_would_split_is_refused(path: str) -> None:
    with pytest.raises(ConfigError, match="lora"):
        args_of(EngineConfig(lora=(LoraAdapter(path=path),)))


@pytest.mark.parametrize("alias", ["", "a,b"])
def test_an_alias_is_one_name(alias: str) -> None:
    with pytest.raises(ConfigError, match="alias"):
        args_of(alias=alias)


def test_zero_idle_seconds_are_refused_before_llama_cpp_does() -> None:
    with pytest.raises(ConfigError, match="sleep_idle_s"):
        args_of(EngineConfig(sleep_idle_s=0))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--grammar", "x"], "error: invalid argument: --grammar"),
        (["model.gguf"], "error: invalid argument: model.gguf"),
        (["--ctx-size"], "expected value for argument"),
        (["--ctx-size", "many"], "'many' is not a whole number"),
        (["--rope-freq-base", "x"], "'x' is not a number"),
        (["--flash-attn", "yes"], "'yes' is not one of on, off, auto"),
    ],
)
def test_arguments_that_cannot_be_read_are_errors(args: list[str], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        read_args(args)


def test_the_last_of_a_repeated_or_negated_flag_wins() -> None:
    assert read_args(["--jinja", "--no-jinja", "--port", "1", "--port", "2"]) == {"--jinja": False, "--port": 2}


@pytest.mark.parametrize("text", ["/a.gguf", "/a.gguf:much", ""])
def test_an_adapter_without_a_scale_is_an_error(text: str) -> None:
    with pytest.raises(ArgumentError, match="FNAME:SCALE"):
        read_loras(text)
