"""Which settings to try for a workload, and why: `plan`. Pure; `choice` says which of them measured best.

A plan holds what `lltm-ray up` would do by itself (`default`), one guess from the workload and the machine, and its
neighbours, each of which differs from the guess in one thing. All but the default fit the memory by construction: a
rung of `_ladder` is taken only if its engines fit, so more memory never gives fewer slots.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from lltm_ray.config import LLAMA_CPP_SIMILARITY_RATIO, SIMILARITY_RATIO, EngineConfig
from lltm_ray.errors import ConfigError, ModelDoesNotFitError

MIB = 2**20
CTX_MULTIPLE = 256
"""llama.cpp pads each slot's context to this."""
CONTEXT_RATIO = 0.9
"""Of a slot's context a workload may fill: prompts are sized by probes, and a template adds a few tokens."""
SLOTS_PER_GPU_ENGINE = 16
"""A llama-server samples on one CPU thread: on an H200 four engines of 16 slots made three times the tokens/s of one of
64 (README, "On GPUs")."""
MOST_ENGINES_PER_GPU = 4
CORES_PER_ENGINE = 8
"""Beyond it another engine uses a CPU's cores better than more threads of one, which wait for each other."""
DRAFT_MAX = 8
DRAFT_SLOTS = 8
"""Drafts fill a batch that is not full: with more requests at once than these per engine they rarely pay."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What clients send; lengths in tokens. `turns` requests make a conversation; each repeats all before it."""

    name: str
    goal: str
    """`ttft` (95th percentile of the time to the first token, at a given rate) or `throughput` (tokens/s)."""
    question_tokens: int
    answer_tokens: int
    concurrency: int
    """Requests at a time."""
    shared_tokens: int = 0
    """At the beginning of every prompt, alike in all: a system prompt, tools."""
    turns: int = 1

    def __post_init__(self) -> None:
        for name in ("question_tokens", "concurrency", "turns"):
            if getattr(self, name) < 1:
                raise ConfigError(name, getattr(self, name), "must be at least 1")
        if self.goal not in ("ttft", "throughput"):
            raise ConfigError("goal", self.goal, "must be ttft or throughput")

    @property
    def longest_tokens(self) -> int:
        """The last prompt of a conversation with its answer."""
        return self.shared_tokens + self.turns * (self.question_tokens + self.answer_tokens)

    @property
    def new_tokens(self) -> int:
        """Of a prompt that no cache holds, if the caches do what they are for."""
        return self.question_tokens + (self.answer_tokens if self.turns > 1 else 0)

    def fitted(self, n_ctx: int) -> Workload:
        """The same shape, short enough for a context of `n_ctx` tokens."""
        part = CONTEXT_RATIO * n_ctx / self.longest_tokens
        if part >= 1:
            return self
        return replace(
            self,
            shared_tokens=int(self.shared_tokens * part),
            question_tokens=max(1, int(self.question_tokens * part)),
            answer_tokens=int(self.answer_tokens * part),
        )


WORKLOADS: Mapping[str, Workload] = {
    "chat": Workload(
        name="chat", goal="ttft", question_tokens=96, answer_tokens=96, concurrency=16, shared_tokens=256, turns=6
    ),
    "rag": Workload(name="rag", goal="ttft", question_tokens=1536, answer_tokens=128, concurrency=8, shared_tokens=128),
    "batch": Workload(name="batch", goal="throughput", question_tokens=256, answer_tokens=256, concurrency=64),
    "embed": Workload(name="embed", goal="throughput", question_tokens=256, answer_tokens=0, concurrency=64),
    "agent": Workload(
        name="agent", goal="ttft", question_tokens=512, answer_tokens=128, concurrency=8, shared_tokens=2048, turns=8
    ),
}
REQUESTS_PER_CORE = 4
"""At a time, on a CPU: so many keep it busy, and a test of more would mostly wait."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What is known of the model and the machine."""

    model: str
    model_bytes: int
    n_params: int
    n_layer: int
    n_ctx_train: int
    n_vocab: int
    kv_token_bytes: int
    """Of the whole cache for one token, in f16."""
    memory: Callable[[EngineConfig, int], int]
    """Bytes that one engine takes with all its layers on so many GPUs; with 0 on the host."""
    budget_bytes: int
    """Of one GPU, or of the host for all engines where there is no GPU."""
    host_bytes: int
    """Free memory of the host."""
    cores: int
    gpus: float = 0.0
    """For the whole fleet: 0, a part of one, or whole ones."""
    can_quantize_cache: bool = False
    """Whether the blocks of q8_0 divide the model's heads."""
    model_draft: str | None = None
    draft_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """Settings to try."""

    name: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `EngineConfig` that are not left to their defaults."""
    engines: int = 1
    gpu_share: float = 0.0
    reasons: Mapping[str, str] = field(default_factory=dict)
    """A sentence for each of the above."""
    tries: str = ""
    """What it is to show, in one sentence."""

    @property
    def engine(self) -> EngineConfig:
        """The settings, checked."""
        return EngineConfig(**self.changes)

    def bytes_needed(self, facts: Facts) -> int:
        """Of the share of one engine, drafts and, on the CPU, the prompt cache included."""
        engine = self.engine
        draft = facts.draft_bytes if engine.model_draft else 0
        if not facts.gpus:
            return facts.memory(engine, 0) + draft + (engine.cache_ram_mib or 0) * MIB
        return facts.memory(engine, max(1, int(self.gpu_share))) + draft

    def bytes_given(self, facts: Facts) -> int:
        """The share of one engine."""
        part = self.gpu_share if facts.gpus else 1 / self.engines
        return int(facts.budget_bytes * part)

    def fits(self, facts: Facts) -> bool:
        """Whether each engine fits its share."""
        return self.bytes_needed(facts) <= self.bytes_given(facts)


def usual(workload: Workload, facts: Facts) -> Workload:
    """The workload as this machine is likely to see it: without a GPU fewer requests at a time."""
    most = workload.concurrency if facts.gpus else REQUESTS_PER_CORE * facts.cores
    return replace(workload, concurrency=min(workload.concurrency, most))


def plan(workload: Workload, facts: Facts) -> list[Candidate]:
    """The default, a guess, and neighbours of the guess, the most promising first.

    Args:
        workload: what will be sent; lengths that the model's context cannot hold are shortened, see `Workload.fitted`.
        facts: model and machine.

    Raises:
        ModelDoesNotFitError: not even one slot fits; then only `lltm-ray up` can serve it, with layers on the CPU.
    """
    workload = workload.fitted(facts.n_ctx_train)
    guess = _guess(workload, facts)
    found = [_default(workload, facts), guess]
    for candidate in _neighbours(guess, workload, facts):
        known = any((each.changes, each.engines) == (candidate.changes, candidate.engines) for each in found)
        if not known and candidate.fits(facts):
            found.append(candidate)
    return found


def _default(workload: Workload, facts: Facts) -> Candidate:
    share = min(1.0, facts.gpus)
    engines = max(1, int(facts.gpus))
    changes = {"embeddings": True} if workload.name == "embed" else {}
    return Candidate(
        name="default", changes=changes, engines=engines, gpu_share=share, tries="What `lltm-ray up` does by itself."
    )


def _guess(workload: Workload, facts: Facts) -> Candidate:
    rungs = list(_ladder(workload, facts))
    for candidate in rungs:
        if candidate.fits(facts):
            return candidate
    least = min(rungs, key=lambda rung: rung.bytes_needed(facts) - rung.bytes_given(facts))
    remedy = "take a smaller quantization or model, or more GPUs; `lltm-ray up` can put some layers on the CPU"
    raise ModelDoesNotFitError(facts.model, least.bytes_needed(facts), least.bytes_given(facts), remedy)


def _ladder(workload: Workload, facts: Facts) -> Iterator[Candidate]:
    """From the best to the least: slots, then the cache's precision, then the number of engines are given up."""
    devices = max(1, int(facts.gpus))
    slots = 1 << min(10, (-(-workload.concurrency // devices) - 1).bit_length())
    while slots:
        for quantize in (False, True) if facts.can_quantize_cache else (False,):
            for engines in _engine_counts(slots, devices, facts):
                yield _candidate("guess", workload, facts, slots=devices * slots, engines=engines, quantize=quantize)
        slots //= 2
    if devices > 1:
        yield _candidate("guess", workload, facts, slots=1, engines=1, quantize=facts.can_quantize_cache)


def _engine_counts(slots: int, devices: int, facts: Facts) -> list[int]:
    """Numbers of engines for so many slots on each device, the best first; the last spans all devices."""
    if facts.gpus:
        wanted = min(MOST_ENGINES_PER_GPU, max(1, slots // SLOTS_PER_GPU_ENGINE))
    else:
        wanted = min(MOST_ENGINES_PER_GPU, max(1, facts.cores // CORES_PER_ENGINE), slots)
    counts = [devices * each for each in (4, 2, 1) if each <= wanted]
    return [*counts, 1] if devices > 1 else counts


def _candidate(
    name: str, workload: Workload, facts: Facts, *, slots: int, engines: int, quantize: bool = False
) -> Candidate:
    """Settings for so many slots in so many engines."""
    each = max(1, -(-slots // engines))
    chosen: dict[str, tuple[Any, str]] = {}
    chosen |= _room(workload, each, quantize=quantize)
    chosen |= _batches(workload, facts)
    chosen |= _caches(workload, facts, engines)
    if not facts.gpus:
        threads = max(1, facts.cores // engines)
        why = f"{facts.cores} cores among {engines} engine(s): threads that share a core spin and starve each other"
        chosen["n_threads"] = threads, why
    if workload.name == "embed":
        chosen["embeddings"] = True, "the fleet serves /v1/embeddings"
    reasons = {field: why for field, (_, why) in chosen.items()} | {"engines": _why_engines(engines, each, facts)}
    return Candidate(
        name=name,
        changes={field: value for field, (value, _) in chosen.items()},
        engines=engines,
        gpu_share=_share(engines, facts),
        reasons=reasons,
        tries=f"The first guess for {workload.name}.",
    )


def _share(engines: int, facts: Facts) -> float:
    """GPUs of each engine, rounded down to what Ray can count."""
    share = facts.gpus / engines
    return float(int(share)) if share >= 1 else int(share * 10_000) / 10_000


def _why_engines(engines: int, slots: int, facts: Facts) -> str:
    if not facts.gpus:
        return f"one engine for about {CORES_PER_ENGINE} cores: more threads in one wait for each other"
    if engines > facts.gpus:
        return f"{slots} slots each: a llama-server samples on one CPU thread, so several fill a GPU better"
    return f"{slots} slots each are few enough for one engine's sampling thread"


def _room(workload: Workload, slots: int, *, quantize: bool) -> dict[str, tuple[Any, str]]:
    tokens = -(-int(workload.longest_tokens / CONTEXT_RATIO) // CTX_MULTIPLE) * CTX_MULTIPLE
    whole = f"{workload.longest_tokens} tokens is the longest prompt with its answer"
    found: dict[str, tuple[Any, str]] = {
        "n_parallel": (slots, f"{workload.concurrency} requests at a time; beyond the slots they wait in the gateway"),
        "n_ctx": (slots * tokens, f"{tokens} a slot: {whole}; more would only take memory"),
        "kv_unified": (False, "each slot owns its context, so no request can take another's"),
    }
    if quantize:
        found["cache_type_k"] = "q8_0", "half the memory of f16 for about the same text; in f16 fewer slots fit"
        found["cache_type_v"] = "q8_0", "as the keys"
        found["flash_attn"] = "on", "a quantized V cache needs it, and auto might leave it off"
    else:
        found["cache_type_k"] = "f16", "it fits, and quantizing costs time"
        found["cache_type_v"] = "f16", "as the keys"
        found["flash_attn"] = "auto", "llama.cpp knows where its kernels exist"
    return found


def _batches(workload: Workload, facts: Facts) -> dict[str, tuple[Any, str]]:
    if workload.name == "embed":
        size = max(512, -(-int(workload.longest_tokens / CONTEXT_RATIO) // CTX_MULTIPLE) * CTX_MULTIPLE)
        why = "a text that is pooled must fit one physical batch"
        return {"n_batch": (size, why), "n_ubatch": (size, why)}
    if workload.goal == "throughput":
        wide = 1024 if facts.gpus else 512
        return {
            "n_batch": (2048, "long logical batches: nobody waits for a single token"),
            "n_ubatch": (wide, "a GPU is filled by wide batches" if facts.gpus else "wider ones do not help a CPU"),
        }
    wide = 1024 if facts.gpus and workload.new_tokens >= 1024 else 512
    return {
        "n_batch": (wide, "a long prompt holds running answers up for one such batch at a time"),
        "n_ubatch": (wide, f"prompts bring about {workload.new_tokens} new tokens"),
    }


def _caches(workload: Workload, facts: Facts, engines: int) -> dict[str, tuple[Any, str]]:
    if workload.turns == 1:
        found: dict[str, tuple[Any, str]] = {
            "cache_ram_mib": (0, "no conversation comes back, so saving prompts in host memory is only work"),
            "slot_prompt_similarity": (LLAMA_CPP_SIMILARITY_RATIO, "without that cache llama.cpp's own rule is best"),
        }
    else:
        sessions = 2 * workload.concurrency
        wanted = sessions * workload.longest_tokens * facts.kv_token_bytes // MIB + 1
        most = facts.host_bytes // 8 // MIB
        why = f"{sessions} conversations of {workload.longest_tokens} tokens, among {engines} engine(s)"
        found = {
            "cache_ram_mib": (min(wanted, most) // engines, why + (", at most an eighth of what is free")),
            "slot_prompt_similarity": (SIMILARITY_RATIO, "a shared beginning must not hide a conversation's own cache"),
        }
    if workload.name in ("rag", "agent"):
        found["cache_reuse"] = (
            256,
            "documents and tool results come again in other places; chunks this long are shifted",
        )
    return found


def _neighbours(guess: Candidate, workload: Workload, facts: Facts) -> Iterator[Candidate]:
    """The guess with one thing changed."""
    slots = guess.engines * guess.changes["n_parallel"]
    quantize = guess.changes["cache_type_k"] == "q8_0"

    def built(name: str, tries: str, *, slots: int = slots, engines: int = guess.engines) -> Candidate:
        made = _candidate(name, workload, facts, slots=slots, engines=engines, quantize=quantize)
        return replace(made, tries=tries)

    per_gpu = guess.engines / max(1, int(facts.gpus))
    for engines in (2 * guess.engines, guess.engines // 2):
        if 1 <= engines <= slots and (not facts.gpus or per_gpu * engines / guess.engines <= 2 * MOST_ENGINES_PER_GPU):
            yield built(f"{engines} engines", f"{engines} engine(s) instead of {guess.engines}.", engines=engines)
    if slots > guess.engines:
        tries = "Fewer requests at once, each faster."
        yield built("half the slots", tries, slots=max(guess.engines, slots // 2))
    yield from _drafting(guess, workload, facts)
    yield from _cache_neighbours(guess, workload, facts)
    if workload.name != "embed":
        other = 256 if not facts.gpus else 2048 if guess.changes["n_ubatch"] < 2048 else 512
        batch = max(other, guess.changes["n_batch"])
        yield _changed(guess, f"ubatch {other}", "Another physical batch for prompts.", n_ubatch=other, n_batch=batch)


def _drafting(guess: Candidate, workload: Workload, facts: Facts) -> Iterator[Candidate]:
    if not workload.answer_tokens or guess.changes["n_parallel"] > 2 * DRAFT_SLOTS:
        return
    if facts.model_draft:
        draft = {"model_draft": facts.model_draft, "draft_max": DRAFT_MAX}
        yield _changed(guess, "draft model", "A small model drafts; what it pays depends on the text.", **draft)
    if workload.name in ("rag", "agent"):
        yield _changed(
            guess, "n-gram drafts", "Answers that quote the prompt are drafted from it.", spec_type="ngram-simple"
        )


def _cache_neighbours(guess: Candidate, workload: Workload, facts: Facts) -> Iterator[Candidate]:
    if facts.can_quantize_cache and guess.changes["cache_type_k"] == "f16":
        half = {"cache_type_k": "q8_0", "cache_type_v": "q8_0", "flash_attn": "on"}
        yield _changed(guess, "q8_0 cache", "Half the cache to read at each token, some work to unpack it.", **half)
    if workload.turns > 1:
        yield _changed(
            guess, "unified cache", "One cache for all slots, for conversations of unlike length.", kv_unified=True
        )


def _changed(guess: Candidate, name: str, tries: str, **changes: Any) -> Candidate:
    reasons = {**guess.reasons, **dict.fromkeys(changes, tries)}
    return replace(guess, name=name, tries=tries, changes={**guess.changes, **changes}, reasons=reasons)
