"""The roofline that plans and tuning share (Pope et al. 2022, "Efficiently Scaling Transformer Inference"). Pure.

A decoding step reads the weights and the running slots' caches once, and computes: the longer of the two hides the
other. llama-server then samples one stream after the other on one CPU thread, while engines beside it use the GPU. A
prompt is compute: 2 operations a weight and token.
"""

from __future__ import annotations

from collections.abc import Sequence

LAYER_S = 70e-6
"""Kernel launches of a layer. Measured on an H200: 1.28 ms a token at 16 layers, less 0.16 ms of reading 0.8 GB."""
BATCHED, STREAM = 1.4, 0.035
"""A GPU's step of n > 1 streams takes `BATCHED + n * STREAM` times that of one: matrix kernels instead of matrix-vector
ones, then attention and output rows. Measured on H200s, as multiples of one stream's step: 1.6, 1.7 and 2.0 at 4, 8
and 16 streams (5.3 B parameters, F16), 1.7, 2.6 and 3.9 at 8, 32 and 64 (1.3 B, Q4_K_M)."""
SAMPLE_S = 3.9e-9
"""Of a stream, for each entry of the vocabulary, on the CPU. Measured: 0.59 ms a token at 152,000 entries, which is
what 64 streams of one engine on an H200 took beyond the step that is reckoned for them."""
PIPELINE = 4
"""Physical batches of a prompt in flight: llama.cpp's n_batch / n_ubatch by default."""


def compute_s(n_params: float, tokens: float, flops: float) -> float:
    """Seconds that the weights' operations for so many tokens take."""
    return 2.0 * n_params * tokens / flops


def decode_s(read_s: float, *, computed_s: float = 0.0, layers: int = 0, streams: int = 1) -> float:
    """One decoding step on the device; `layers`: those whose kernels a GPU launches, for so many `streams` at once."""
    batched = BATCHED + streams * STREAM if streams > 1 else 1.0
    return batched * (max(read_s, computed_s) + layers * LAYER_S)


def cycle_s(step_s: float, *, n_vocab: int, streams: float, beside: int = 1) -> float:
    """From one token of each stream to the next: the step and its sampling, or the turns of all engines on the GPU."""
    return max(step_s + streams * n_vocab * SAMPLE_S, beside * step_s)


def prefill_s(stages_s: Sequence[float]) -> float:
    """A physical batch of a prompt whose layers lie on several devices, which work on `PIPELINE` batches at once."""
    return (sum(stages_s) + (PIPELINE - 1) * max(stages_s)) / PIPELINE
