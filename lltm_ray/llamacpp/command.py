"""`EngineConfig` -> llama-server's arguments, and back. Pure: one table of flags serves both directions.

`build_args` writes what a server is started with; `read_args` reads the same flags for the embedded engine, which
therefore knows exactly what we can write and refuses the rest, as llama-server does. Spellings are those of
llama.cpp's help text (`common/arg.cpp`, build 11433).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lltm_ray.config import CACHE_TYPES, POOLING, SPLIT_MODES, EngineConfig
from lltm_ray.errors import ConfigError

Value = bool | int | float | str
LOAD_MODES = ("auto", "none", "mmap", "mlock", "mmap+mlock", "dio")


@dataclass(frozen=True, slots=True, kw_only=True)
class Flag:
    """How one flag is read: a switch (no value), or one value of `kind`, from `choices` where there are any."""

    kind: type[bool] | type[int] | type[float] | type[str]
    choices: tuple[str, ...] = ()
    negates: str | None = None
    """For `--no-x`: the switch that it turns off."""


def _switch(negates: str | None = None) -> Flag:
    return Flag(kind=bool, negates=negates)


def _choice(*choices: str) -> Flag:
    return Flag(kind=str, choices=choices)


_INT, _FLOAT, _TEXT = Flag(kind=int), Flag(kind=float), Flag(kind=str)

FLAGS: Mapping[str, Flag] = {
    "--alias": _TEXT,
    "--api-key-file": _TEXT,
    "--batch-size": _INT,
    "--cache-ram": _INT,
    "--cache-reuse": _INT,
    "--cache-type-k": _choice(*CACHE_TYPES),
    "--cache-type-v": _choice(*CACHE_TYPES),
    "--chat-template": _TEXT,
    "--context-shift": _switch(),
    "--ctx-size": _INT,
    "--embeddings": _switch(),
    "--fit": _choice("on", "off"),
    "--flash-attn": _choice("on", "off", "auto"),
    "--host": _TEXT,
    "--jinja": _switch(),
    "--kv-unified": _switch(),
    "--load-mode": _choice(*LOAD_MODES),
    "--lora-scaled": _TEXT,
    "--main-gpu": _INT,
    "--metrics": _switch(),
    "--mmproj": _TEXT,
    "--model": _TEXT,
    "--n-gpu-layers": _INT,
    "--no-context-shift": _switch("--context-shift"),
    "--no-jinja": _switch("--jinja"),
    "--no-kv-unified": _switch("--kv-unified"),
    "--no-ui": _switch("--ui"),
    "--no-warmup": _switch("--warmup"),
    "--offline": _switch(),
    "--parallel": _INT,
    "--pooling": _choice(*POOLING),
    "--port": _INT,
    "--props": _switch(),
    "--reasoning-format": _choice("none", "deepseek", "deepseek-legacy", "auto"),
    "--reranking": _switch(),
    "--rope-freq-base": _FLOAT,
    "--rope-freq-scale": _FLOAT,
    "--sleep-idle-seconds": _INT,
    "--slot-prompt-similarity": _FLOAT,
    "--slot-save-path": _TEXT,
    "--slots": _switch(),
    "--spec-draft-model": _TEXT,
    "--spec-draft-n-max": _INT,
    "--spec-draft-n-min": _INT,
    "--spec-draft-ngl": _INT,
    "--spec-draft-p-min": _FLOAT,
    "--spec-type": _TEXT,
    "--split-mode": _choice(*SPLIT_MODES),
    "--swa-full": _switch(),
    "--tensor-split": _TEXT,
    "--threads": _INT,
    "--threads-batch": _INT,
    "--threads-http": _INT,
    "--ubatch-size": _INT,
    "--verbosity": _INT,
    "--warmup": _switch(),
}
"""Every flag that `build_args` can write, and `--verbosity`, which users add while they look for a fault."""

_VALUES: Mapping[str, str] = {
    "n_batch": "--batch-size",
    "n_ubatch": "--ubatch-size",
    "split_mode": "--split-mode",
    "main_gpu": "--main-gpu",
    "flash_attn": "--flash-attn",
    "cache_type_k": "--cache-type-k",
    "cache_type_v": "--cache-type-v",
    "cache_ram_mib": "--cache-ram",
    "cache_reuse": "--cache-reuse",
    "slot_similarity_ratio": "--slot-prompt-similarity",
    "n_threads": "--threads",
    "n_threads_batch": "--threads-batch",
    "mmproj": "--mmproj",
    "model_draft": "--spec-draft-model",
    "draft_max": "--spec-draft-n-max",
    "draft_min": "--spec-draft-n-min",
    "draft_p_min": "--spec-draft-p-min",
    "n_gpu_layers_draft": "--spec-draft-ngl",
    "pooling": "--pooling",
    "reasoning_format": "--reasoning-format",
    "rope_freq_base": "--rope-freq-base",
    "rope_freq_scale": "--rope-freq-scale",
    "slot_save_path": "--slot-save-path",
    "sleep_idle_s": "--sleep-idle-seconds",
    "chat_template": "--chat-template",
}
_SWITCHES: Mapping[str, tuple[str, str | None]] = {
    "kv_unified": ("--kv-unified", "--no-kv-unified"),
    "context_shift": ("--context-shift", "--no-context-shift"),
    "swa_full": ("--swa-full", None),
    "jinja": ("--jinja", "--no-jinja"),
    "warmup": ("--warmup", "--no-warmup"),
    "embeddings": ("--embeddings", None),
    "reranking": ("--reranking", None),
}
_ALWAYS = ("--fit", "off", "--metrics", "--slots", "--props", "--no-ui", "--offline")
"""We plan memory, watch, and have a front of our own; a server of ours never downloads."""

_OURS = frozenset(("--model", "-m", "--alias", "-a", "--host", "--port", "--api-key-file"))
_OURS |= frozenset(("--slot-prompt-similarity", "-sps"))
"""What is asked for elsewhere too: routing must know by which rule a server takes its slots."""
_PREFIX = "--api-prefix"
_SECRET = frozenset(("--api-key", "--hf-token", "-hft"))


def build_args(  # noqa: PLR0913 -- three numbers are the planner's, three the process's; all by name
    config: EngineConfig,
    *,
    model_path: str,
    host: str,
    port: int,
    alias: str,
    api_key_file: str | None,
    n_gpu_layers: int | None = None,
    n_ctx: int | None = None,
    n_parallel: int | None = None,
) -> list[str]:
    """Write llama-server's arguments for `config`, without the executable.

    Args:
        config: settings.
        model_path: GGUF file.
        host: address to bind; comma-separated for several.
        port: 0 takes a free one.
        alias: served name.
        api_key_file: file with one key a line; a key itself is never an argument, where `ps` shows it.
        n_gpu_layers: the planner's number; wins over the config, as the next two do.
        n_ctx: tokens of KV cache for all slots.
        n_parallel: number of slots.

    Raises:
        ConfigError: a value that llama-server would misread or that must not be an argument.
    """
    slots = config.n_parallel if n_parallel is None else n_parallel
    planned = {
        "--ctx-size": config.n_ctx if n_ctx is None else n_ctx,
        "--parallel": slots,
        "--n-gpu-layers": config.n_gpu_layers if n_gpu_layers is None else n_gpu_layers,
        "--threads-http": config.n_threads_http or default_http_threads(slots),
        "--api-key-file": api_key_file,
    }
    args = ["--model", model_path, "--alias", _one_name(alias), "--host", host, "--port", str(port)]
    args += [*_pairs(planned), *_ALWAYS, *_switch_args(config)]
    plain = {flag: getattr(config, name) for name, flag in _VALUES.items()}
    return [*args, *_pairs(plain), *_pairs(_derived(config)), *_checked_extra(config.extra_args)]


def default_http_threads(slots: int) -> int:
    """HTTP threads for `slots`: each keep-alive connection holds one, and /health needs some to spare at full load."""
    return 2 * slots + 8


def _one_name(alias: str) -> str:
    if "," in alias or not alias:
        raise ConfigError("alias", alias, "must be one name; llama-server splits it at commas")
    return alias


def _pairs(flags: Mapping[str, Value | None]) -> list[str]:
    return [text for flag, value in flags.items() if value is not None for text in (flag, str(value))]


def _switch_args(config: EngineConfig) -> list[str]:
    # --jinja must precede --chat-template: without it only built-in templates are accepted.
    chosen = (on if getattr(config, name) else off for name, (on, off) in _SWITCHES.items())
    return [flag for flag in chosen if flag is not None]


def _derived(config: EngineConfig) -> dict[str, Value | None]:
    """Flags that take more than one field, or another form than the field has."""
    if config.sleep_idle_s == 0:
        raise ConfigError("sleep_idle_s", 0, "llama-server wants at least 1 second, or -1 for never")
    drafts = config.model_draft is not None and "--spec-type" not in config.extra_args
    return {
        "--load-mode": _load_mode(mmap=config.use_mmap, mlock=config.use_mlock),
        "--tensor-split": ",".join(str(part) for part in config.tensor_split) or None,
        "--lora-scaled": ",".join(f"{_plain_path(item.path)}:{item.scale}" for item in config.lora) or None,
        # A draft model alone leaves the kind of drafting to a guess from its metadata.
        "--spec-type": config.spec_type or ("draft-simple" if drafts else None),
    }


def _load_mode(*, mmap: bool, mlock: bool) -> str:
    return "+".join(name for name, on in (("mmap", mmap), ("mlock", mlock)) if on) or "none"


def _plain_path(path: str) -> str:
    if set(path) & set(',:"'):
        raise ConfigError("lora", path, "llama-server splits at ',' and ':'; use a path without them or quotes")
    return path


def _checked_extra(extra: Sequence[str]) -> list[str]:
    for text in extra:
        name = text.partition("=")[0]
        if name in _SECRET:
            raise ConfigError("extra_args", name, "a secret must not be an argument, every user of the machine sees it")
        if name == _PREFIX:
            why = "moves every route, and engines are asked at their root; put a prefix before the gateway by a proxy"
            raise ConfigError("extra_args", name, why)
        if name in _OURS:
            raise ConfigError("extra_args", name, "is set by lltm_ray; use the setting of that name")
    return list(extra)


class ArgumentError(ValueError):
    """An argument the embedded engine cannot read; the message is llama-server's."""


def read_args(args: Sequence[str]) -> dict[str, Value]:
    """Read llama-server arguments: flag -> value, `--no-x` as `--x` False; the last of a repeated flag wins.

    Raises:
        ArgumentError: an unknown flag, a missing value, or one of the wrong kind.
    """
    found: dict[str, Value] = {}
    rest = iter(args)
    for name in rest:
        flag = FLAGS.get(name)
        if flag is None:
            raise ArgumentError(f"error: invalid argument: {name}")
        if flag.kind is bool:
            found[flag.negates or name] = flag.negates is None
        else:
            found[name] = _read_value(name, flag, next(rest, None))
    return found


def _read_value(name: str, flag: Flag, text: str | None) -> Value:
    if text is None:
        raise ArgumentError(f'error while handling argument "{name}": expected value for argument')
    if flag.choices and text not in flag.choices:
        raise ArgumentError(f'error while handling argument "{name}": {text!r} is not one of {", ".join(flag.choices)}')
    try:
        return flag.kind(text)
    except ValueError as error:
        wanted = "a whole number" if flag.kind is int else "a number"
        raise ArgumentError(f'error while handling argument "{name}": {text!r} is not {wanted}') from error


def read_loras(text: str) -> list[tuple[str, float]]:
    """`PATH:SCALE,...` of `--lora-scaled` as pairs.

    Raises:
        ArgumentError: an item that is not of that form.
    """
    return [_read_lora(item) for item in text.split(",")]


def _read_lora(item: str) -> tuple[str, float]:
    path, _, scale = item.partition(":")
    try:
        return path, float(scale)
    except ValueError as error:
        raise ArgumentError('error while handling argument "--lora-scaled": format is FNAME:SCALE') from error
