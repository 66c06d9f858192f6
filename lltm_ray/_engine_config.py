"""Settings of one llama-server; `config` is where to import them from."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from pathlib import Path

from lltm_ray._settings import check as _check
from lltm_ray._settings import check_choice as _check_choice
from lltm_ray._settings import check_range as _check_range

CACHE_TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1")
SPLIT_MODES = ("none", "layer", "row", "tensor")
SPEC_TYPES = (
    *("none", "draft-simple", "draft-eagle3", "draft-mtp", "draft-dflash", "draft-dspark"),
    *("ngram-simple", "ngram-map-k", "ngram-map-k4v", "ngram-mod", "ngram-cache"),
)
POOLING = ("none", "mean", "cls", "last", "rank")
SIMILARITY_RATIO, LLAMA_CPP_SIMILARITY_RATIO = 0.9, 0.1
"""`--slot-prompt-similarity`: ours where there is a host-memory prompt cache, and llama.cpp's default."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraAdapter:
    """A GGUF LoRA adapter (`--lora-scaled`). Requests choose it as `model:name`."""

    path: str
    scale: float = 1.0
    """Its strength, for requests that choose no adapter, too; 0: only for those that choose it, which then get 1."""
    name: str | None = None
    """None: the file's stem."""

    @property
    def label(self) -> str:
        """What requests call it."""
        return self.name or Path(self.path).stem


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """One llama-server. Every field becomes a flag of it; `None` leaves the choice to the planner or to llama.cpp."""

    n_ctx: int | None = None
    """Tokens of KV cache, shared by all slots (`--ctx-size`). None: the largest that fits the share, at most the
    model's trained context for each slot."""
    n_parallel: int = 4
    """Slots (`--parallel`); 4 is llama-server's own automatic choice."""
    n_batch: int = 2048
    """Logical batch in tokens (`--batch-size`)."""
    n_ubatch: int = 512
    """Physical batch in tokens (`--ubatch-size`); sizes the compute buffer."""
    n_gpu_layers: int | None = None
    """Layers on the GPU (`--n-gpu-layers`). None: as many as fit the share."""
    split_mode: str = "layer"
    """How a model is split over several GPUs (`--split-mode none|layer|row|tensor`)."""
    tensor_split: tuple[float, ...] = ()
    """Proportions per GPU (`--tensor-split`)."""
    main_gpu: int = 0
    """GPU for small tensors when not splitting (`--main-gpu`), counted among the engine's own GPUs."""
    flash_attn: str = "auto"
    """`--flash-attn on|off|auto`."""
    cache_type_k: str = "f16"
    """KV cache type of keys (`--cache-type-k`)."""
    cache_type_v: str = "f16"
    """KV cache type of values (`--cache-type-v`); a quantized type needs flash attention."""
    kv_unified: bool = False
    """One KV buffer for all slots (`--kv-unified`); off, so that each slot owns n_ctx / n_parallel."""
    cache_ram_mib: int | None = None
    """Host-memory prompt cache in MiB (`--cache-ram`); 0 turns it off, which also keeps tenants apart. None: an eighth
    of the node's free memory, divided among its engines, at most llama.cpp's own 8192; with `lora` 0."""
    cache_reuse: int | None = None
    """Smallest chunk in tokens to reuse by KV shifting (`--cache-reuse`)."""
    swa_full: bool = False
    """Full-size cache for sliding-window layers (`--swa-full`)."""
    context_shift: bool = False
    """Shift the context when it is full instead of ending (`--context-shift`)."""
    slot_prompt_similarity: float | None = None
    """A slot that holds more than this part of a prompt, 0..1, is used without a look into the host-memory prompt cache
    (`--slot-prompt-similarity`; 0: whenever a request names a slot, and never otherwise). None: 0.9 where there is such
    a cache and a gateway that names slots, else llama.cpp's 0.1. At 0.1 a shared system prompt keeps the rest of a
    conversation from being found there; a higher value makes a request that names no slot (/v1/messages, /v1/responses,
    handles) miss the latest turn of a conversation that grew by more than the rest."""
    n_threads: int | None = None
    """CPU threads for decode (`--threads`). None: on a GPU llama.cpp's choice, else the node's cores divided among its
    engines."""
    n_threads_batch: int | None = None
    """CPU threads for prefill (`--threads-batch`)."""
    n_threads_http: int | None = None
    """HTTP threads (`--threads-http`). None: more than twice the slots, so that /health answers under full load."""
    use_mmap: bool = True
    """Map the model file (`--load-mode mmap`, else `none`)."""
    use_mlock: bool = False
    """Lock the model in memory (`--load-mode mlock`)."""
    lora: tuple[LoraAdapter, ...] = ()
    """Adapters loaded at start (`--lora-scaled`), for requests to choose from."""
    mmproj: str | None = None
    """Multimodal projector GGUF (`--mmproj`)."""
    model_draft: str | None = None
    """Draft model for speculative decoding (`--spec-draft-model`): a name, path or `repo:file`, as the model."""
    draft_max: int | None = None
    """Most drafted tokens (`--spec-draft-n-max`)."""
    draft_min: int | None = None
    """Fewest drafted tokens (`--spec-draft-n-min`)."""
    draft_p_min: float | None = None
    """Least probability to go on drafting, 0..1 (`--spec-draft-p-min`)."""
    n_gpu_layers_draft: int | None = None
    """Draft layers on the GPU (`--spec-draft-ngl`)."""
    spec_type: str | None = None
    """How to draft (`--spec-type`): `ngram-simple` and its like find it in the text so far, without a second model.
    None: `draft-simple` with `model_draft`, else not at all."""
    embeddings: bool = False
    """Serve embeddings (`--embeddings`)."""
    reranking: bool = False
    """Serve reranking (`--reranking`)."""
    pooling: str | None = None
    """`--pooling none|mean|cls|last|rank`."""
    chat_template: str | None = None
    """Template text or a built-in name (`--chat-template`)."""
    jinja: bool = True
    """Use the model's Jinja template (`--jinja`); tools need it."""
    reasoning_format: str = "auto"
    """Where thinking goes (`--reasoning-format none|deepseek|deepseek-legacy|auto`)."""
    rope_freq_base: float | None = None
    """`--rope-freq-base`."""
    rope_freq_scale: float | None = None
    """`--rope-freq-scale`."""
    slot_save_path: str | None = None
    """Folder for saved slots (`--slot-save-path`)."""
    sleep_idle_s: int | None = None
    """Unload after so many idle seconds (`--sleep-idle-seconds`)."""
    warmup: bool = True
    """Run once before serving (`--warmup`)."""
    extra_args: tuple[str, ...] = ()
    """Further llama-server arguments, as they are; the embedded engine refuses those it does not know."""

    @property
    def slot_similarity_ratio(self) -> float:
        """The `--slot-prompt-similarity` that its server runs with."""
        given = self.slot_prompt_similarity
        default = LLAMA_CPP_SIMILARITY_RATIO if self.cache_ram_mib == 0 else SIMILARITY_RATIO
        return default if given is None else given

    def __post_init__(self) -> None:
        _check_range(
            self,
            n_ctx=(8, 2**31),
            n_parallel=(1, 1024),
            n_batch=(1, 2**20),
            n_ubatch=(1, 2**20),
            n_gpu_layers=(0, 100_000),
            main_gpu=(0, 127),
            cache_ram_mib=(-1, 2**31),
            n_threads=(1, 4096),
            n_threads_batch=(1, 4096),
            n_threads_http=(1, 65_536),
            slot_prompt_similarity=(0, 1),
            draft_p_min=(0, 1),
            draft_max=(0, 1024),
            draft_min=(0, 1024),
            sleep_idle_s=(1, 2**31),
        )
        _check_choice("split_mode", self.split_mode, SPLIT_MODES)
        _check_choice("flash_attn", self.flash_attn, ("on", "off", "auto"))
        _check_choice("cache_type_k", self.cache_type_k, CACHE_TYPES)
        _check_choice("cache_type_v", self.cache_type_v, CACHE_TYPES)
        _check_choice("pooling", self.pooling, POOLING)
        _check_choice("spec_type", self.spec_type, SPEC_TYPES)
        _check_choice("reasoning_format", self.reasoning_format, ("none", "deepseek", "deepseek-legacy", "auto"))
        quantized_v = self.cache_type_v not in ("f32", "f16", "bf16")
        _check(
            not (quantized_v and self.flash_attn == "off"),
            "cache_type_v",
            self.cache_type_v,
            "a quantized V cache needs flash_attn on or auto",
        )
        self._check_adapters()
        _check(
            not self.tensor_split or (min(self.tensor_split) >= 0 and 0 < sum(self.tensor_split) < inf),
            "tensor_split",
            self.tensor_split,
            "parts must be finite and >= 0, and not all 0",
        )

    def _check_adapters(self) -> None:
        names = [adapter.label for adapter in self.lora]
        for place, name in enumerate(names):
            is_new = name not in names[:place]
            _check(is_new, f"lora[{place}].name", name, "two adapters have it: give one another name")
        _check(
            not (self.lora and self.cache_ram_mib),
            "cache_ram_mib",
            self.cache_ram_mib,
            "must be 0 with lora: llama.cpp's host-memory prompt cache does not tell adapters apart",
        )
