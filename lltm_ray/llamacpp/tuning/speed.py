"""What a candidate's speed should be, before anything is measured: `expected_tokens_per_s`. Pure, and rough.

By the roofline that `lltm-ray plan` uses; a prompt's new tokens are computed between the steps. Engines on one GPU take
turns, and sample beside each other; without a GPU they divide the cores. All experts of a mixture count as used. Only
ratios of two candidates are meant to be used, and only to be held against a measurement.
"""

from __future__ import annotations

from lltm_ray._roofline import compute_s, cycle_s, decode_s, prefill_s
from lltm_ray.llamacpp.tuning.plan import Candidate, Facts, Workload

GPU_BYTES_S, GPU_FLOPS = 2e12, 2e14
"""Of a data centre's GPU, half of what the data sheet says."""
CORE_BYTES_S, CORE_FLOPS = 1e10, 3e10
"""Of one core; more than two do not read faster."""
READING_CORES = 2


def expected_gain(candidate: Candidate, default: Candidate, workload: Workload, facts: Facts) -> float | None:
    """How many times as many tokens/s as the default; None where it depends on what no plan knows.

    That is: the time to the first token (on arrivals), and drafts (on the text).
    """
    if workload.goal != "throughput" or not workload.answer_tokens or not _is_plain(candidate):
        return None
    return expected_tokens_per_s(candidate, workload, facts) / expected_tokens_per_s(default, workload, facts)


def expected_tokens_per_s(candidate: Candidate, workload: Workload, facts: Facts) -> float:
    """Of the whole fleet, with `workload.concurrency` requests at a time."""
    workload = workload.fitted(facts.n_ctx_train)
    engine = candidate.engine
    busy = max(1.0, min(engine.n_parallel, workload.concurrency / candidate.engines))
    cache_bytes = facts.kv_token_bytes * (34 / 64 if engine.cache_type_k == "q8_0" else 1.0)
    read_bytes = facts.model_bytes + busy * cache_bytes * workload.longest_tokens
    step_s, token_s = (_on_gpus if facts.gpus else _on_cores)(candidate, facts, busy, read_bytes)
    answer_s = workload.answer_tokens * step_s / busy + workload.new_tokens * token_s
    return candidate.engines * workload.answer_tokens / answer_s


def _on_gpus(candidate: Candidate, facts: Facts, busy: float, read_bytes: float) -> tuple[float, float]:
    """Seconds from one token of each slot to the next, and of a prompt's token."""
    beside, width = max(1, round(1 / candidate.gpu_share)), max(1, int(candidate.gpu_share))
    token_s = compute_s(facts.n_params, 1, GPU_FLOPS)
    step_s = decode_s(read_bytes / GPU_BYTES_S, computed_s=busy * token_s, layers=facts.n_layer)
    cycle = cycle_s(step_s, n_vocab=facts.n_vocab, streams=busy, beside=beside)
    return cycle, beside * prefill_s([token_s / width] * width)


def _on_cores(candidate: Candidate, facts: Facts, busy: float, read_bytes: float) -> tuple[float, float]:
    """The same, for an engine that has its part of the cores."""
    reading = min(facts.cores, READING_CORES) / candidate.engines
    token_s = compute_s(facts.n_params, 1, CORE_FLOPS * facts.cores / candidate.engines)
    step_s = decode_s(read_bytes / (CORE_BYTES_S * reading), computed_s=busy * token_s)
    return cycle_s(step_s, n_vocab=facts.n_vocab, streams=busy), token_s


def _is_plain(candidate: Candidate) -> bool:
    return candidate.engine.model_draft is None and candidate.engine.spec_type is None
