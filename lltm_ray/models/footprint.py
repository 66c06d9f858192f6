"""How much memory one engine takes: `estimate`. Pure: no I/O; sizes in bytes, contexts in tokens.

The KV cache is computed exactly as llama.cpp allocates it; weights are the file's own; compute buffer and outputs
follow its graph. On the CPU the sum lies within 5 % of llama.cpp's own report, which the tests read. Not counted: LoRA
adapters, a projector, a draft model and `--cache-ram` (host memory, 8 GiB at most by llama-server's default); take
those off the budget first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from lltm_ray.config import EngineConfig
from lltm_ray.errors import ConfigError
from lltm_ray.models.gguf import GgufInfo

MIB = 2**20
MARGIN_RATIO = 0.05
"""Share of everything else kept free: allocator rounding, and what the compute estimate does not know."""
MARGIN_BYTES = 64 * MIB
"""Kept free beside it: cuBLAS workspaces, the server process itself."""
CUDA_CONTEXT_BYTES = 300 * MIB
"""What a CUDA context and llama.cpp's kernels take on each GPU before any model (250-500 MiB by driver and card)."""
CTX_MULTIPLE = 256
"""llama.cpp pads each slot's KV cells to this (`GGML_PAD(n_ctx_seq, 256)`)."""
CACHE_TYPES: Mapping[str, tuple[int, int]] = {
    "f32": (1, 4), "f16": (1, 2), "bf16": (1, 2), "q8_0": (32, 34), "q4_0": (32, 18),
    "q4_1": (32, 20), "iq4_nl": (32, 18), "q5_0": (32, 22), "q5_1": (32, 24),
}  # fmt: skip
"""KV cache type -> elements a block, bytes a block."""
_WINDOW_PERIODS: Mapping[str, int] = {
    "afmoe": 4, "cohere2": 4, "exaone4": 4, "gemma2": 2, "gemma3": 6, "gemma3n": 5, "gpt-oss": 2, "llama4": 4,
    "olmo2": 4,
}  # fmt: skip
"""Architecture -> n, where llama.cpp makes every n-th layer a full one and the others sliding-window
(`hparams.set_swa_pattern`). One that is not listed counts as full throughout: too much rather than too little."""
_LLAMA4_WINDOW = 8192
"""llama.cpp's constant; llama4 files do not carry it."""
_FLASH_HEADS = frozenset((40, 64, 72, 80, 96, 112, 128, 192, 256, 320, 512, 576))
"""K head lengths of the CUDA flash-attention kernels; `auto` falls back to plain attention for others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryEstimate:
    """What one engine takes, in bytes; "device" is the GPU share, "host" the machine's memory."""

    weights_device_bytes: int
    weights_host_bytes: int
    kv_device_bytes: int
    kv_host_bytes: int
    compute_bytes: int
    """Compute buffers, on the devices if any layer is there, else on the host."""
    output_bytes: int
    """Logits and embeddings that llama.cpp hands out; always on the host."""
    margin_bytes: int
    """Safety margin and CUDA contexts, on the same side as the compute buffers."""
    on_device: bool

    @property
    def device_bytes(self) -> int:
        """All that the GPUs must hold together."""
        shared = self.compute_bytes + self.margin_bytes if self.on_device else 0
        return self.weights_device_bytes + self.kv_device_bytes + shared

    @property
    def host_bytes(self) -> int:
        """All that the machine's memory must hold."""
        shared = 0 if self.on_device else self.compute_bytes + self.margin_bytes
        return self.weights_host_bytes + self.kv_host_bytes + self.output_bytes + shared

    @property
    def kv_bytes(self) -> int:
        """The whole KV cache."""
        return self.kv_device_bytes + self.kv_host_bytes


def estimate(info: GgufInfo, *, n_ctx: int, n_parallel: int, n_gpu_layers: int, config: EngineConfig) -> MemoryEstimate:
    """Memory of one engine at given settings.

    Args:
        info: the model (`read_model`).
        n_ctx: tokens of KV cache for all slots together.
        n_parallel: slots.
        n_gpu_layers: as llama.cpp counts them: `n_layer + 1` is everything. 0: nothing on a GPU.
        config: cache types, batch sizes, flash attention, `tensor_split`; its own n_ctx, n_parallel and
            n_gpu_layers are not looked at.

    Raises:
        ConfigError: the cache type's block does not divide the model's head length, which llama.cpp refuses.
    """
    return MemoryModel(info, config).estimate(n_ctx, n_parallel, n_gpu_layers)


@dataclass(frozen=True, slots=True)
class _Layer:
    weights_bytes: int
    cell_bytes: int
    """KV bytes of one token; 0 for a layer without its own KV."""
    windowed: bool


@dataclass(slots=True)
class MemoryModel:
    """Sizes of one model, summed once, for as many estimates as a plan needs."""

    info: GgufInfo
    config: EngineConfig
    _layers: tuple[_Layer, ...] = field(init=False)
    _input_bytes: int = field(init=False)
    _output_bytes: int = field(init=False)
    _tied: bool = field(init=False)

    def __post_init__(self) -> None:
        blocks = [0] * self.info.n_layer
        self._input_bytes = self._output_bytes = 0
        for tensor in self.info.tensors:
            index = _block_of(tensor.name)
            if index is not None and index < len(blocks):
                blocks[index] += tensor.nbytes
            elif tensor.name.startswith(("token_", "position_embd", "per_layer_token_embd")):
                self._input_bytes += tensor.nbytes
            else:
                self._output_bytes += tensor.nbytes
        names = {tensor.name for tensor in self.info.tensors}
        self._tied = not self.info.is_encoder and "output.weight" not in names
        self._layers = tuple(
            _Layer(weights, self._cell_bytes(index), _is_windowed(self.info, index))
            for index, weights in enumerate(blocks)
        )

    @property
    def n_all_layers(self) -> int:
        """`n_gpu_layers` that puts everything on the GPU: the repeating layers and the output."""
        return self.info.n_layer + 1

    def estimate(self, n_ctx: int, n_parallel: int, n_gpu_layers: int) -> MemoryEstimate:
        """As the function `estimate`."""
        on_device = n_gpu_layers > 0
        n_gpu = min(n_gpu_layers, self.n_all_layers)
        weights = self._weights_device(n_gpu)
        kv = [self._kv_bytes(layer, n_ctx, n_parallel) for layer in self._layers]
        state = self._state_bytes() * n_parallel
        kv_device = sum(kv[max(len(kv) - n_gpu, 0) :]) + state if on_device else 0
        kv_host = sum(kv) + state - kv_device
        n_devices = max(1, sum(part > 0 for part in self.config.tensor_split)) if on_device else 1
        compute = self._compute_bytes(n_ctx, n_parallel, on_device=on_device) * n_devices
        whole = self._input_bytes + self._output_bytes + sum(layer.weights_bytes for layer in self._layers)
        # A tied output is the embeddings once more on the GPU; the host keeps its own.
        host = whole - max(weights - (self._input_bytes if self._tied else 0), 0)
        taken = weights + kv_device if on_device else whole + kv_host
        n_out = self.info.n_vocab + self.info.n_embd * self.config.embeddings
        margin = int((taken + compute) * MARGIN_RATIO) + MARGIN_BYTES + CUDA_CONTEXT_BYTES * n_devices * on_device
        return MemoryEstimate(
            weights_device_bytes=weights,
            weights_host_bytes=host,
            kv_device_bytes=kv_device,
            kv_host_bytes=kv_host,
            compute_bytes=compute,
            output_bytes=4 * n_parallel * n_out,
            margin_bytes=margin,
            on_device=on_device,
        )

    def _weights_device(self, n_gpu: int) -> int:
        """The last layers and the output: builds differ in whether the output is counted first or last; the larger."""
        if n_gpu == 0:
            return 0
        blocks = [layer.weights_bytes for layer in self._layers]
        output = self._output_bytes + (self._input_bytes if self._tied else 0)
        output_first = output + sum(blocks[len(blocks) - (n_gpu - 1) :])
        output_last = sum(blocks[max(len(blocks) - n_gpu, 0) :]) + (output if n_gpu > len(blocks) else 0)
        return max(output_first, output_last)

    def _cell_bytes(self, index: int) -> int:
        """KV bytes of one token in one layer: heads times length, in blocks of the cache types."""
        info = self.info
        n_own = info.n_layer - info.number("attention.shared_kv_layers")
        interval = info.number("full_attention_interval")
        if info.is_encoder or index >= n_own or (interval and (index + 1) % interval):
            return 0
        heads = info.n_head_kv[index] if isinstance(info.n_head_kv, tuple) else info.n_head_kv
        suffix = "_swa" if _is_windowed(info, index) else ""
        key = info.number(f"attention.key_length{suffix}", info.key_length)
        value = info.number(f"attention.value_length{suffix}", info.value_length)
        return heads * (
            _row_bytes("cache_type_k", self.config.cache_type_k, key)
            + _row_bytes("cache_type_v", self.config.cache_type_v, value)
        )

    def _kv_bytes(self, layer: _Layer, n_ctx: int, n_parallel: int) -> int:
        """Cells as llama.cpp makes them: a stream a slot, or one for all with `kv_unified`.

        A sliding-window layer keeps the window and one physical batch (`llama_kv_cache_iswa`), unless `swa_full`.
        """
        n_streams = 1 if self.config.kv_unified else n_parallel
        cells = self._stream_cells(n_ctx, n_parallel)
        if layer.windowed and not self.config.swa_full:
            cells = min(cells, self._window_cells(n_parallel))
        return layer.cell_bytes * cells * n_streams

    def _stream_cells(self, n_ctx: int, n_parallel: int) -> int:
        return _pad(_pad(n_ctx) // (1 if self.config.kv_unified else n_parallel))

    def _window_cells(self, n_parallel: int) -> int:
        return _pad(self._window() * (n_parallel if self.config.kv_unified else 1) + self.config.n_ubatch)

    def _window(self) -> int:
        return _LLAMA4_WINDOW if self.info.architecture == "llama4" else self.info.sliding_window

    def _state_bytes(self) -> int:
        """Recurrent state of one slot (Mamba and hybrids): convolution and SSM state, float32, taken for every layer.

        Sizes as llama.cpp's `n_embd_r` and `n_embd_s`.
        """
        number = self.info.number
        inner, state = number("ssm.inner_size"), number("ssm.state_size")
        convolution = max(number("ssm.conv_kernel") - 1, 0) * (inner + 2 * number("ssm.group_count") * state)
        short = max(number("shortconv.l_cache") - 1, 0) * self.info.n_embd
        return 4 * (convolution + inner * state + short) * self.info.n_layer

    def _compute_bytes(self, n_ctx: int, n_parallel: int, *, on_device: bool) -> int:
        """Largest graph that llama.cpp reserves: one physical batch, float32, buffers reused from layer to layer.

        Beside the inputs live the hidden state, its norm and what their predecessors left too small to reuse: five rows
        of `n_embd` a token. On top comes the widest of three places: feed-forward (gate, up and their product),
        attention (Q before and after rope, its result, K and V; without flash attention the scores of all heads
        against all cells), and the logits.
        """
        info, config = self.info, self.config
        n_batch = min(config.n_batch, config.n_ubatch, _pad(n_ctx))
        cells = n_batch if info.is_encoder else self._stream_cells(n_ctx, n_parallel)
        heads, heads_kv = _most(info.n_head), _most(info.n_head_kv)
        flash = config.flash_attn != "off" and (config.flash_attn == "on" or info.key_length in _FLASH_HEADS)
        attention = 3 * heads * info.key_length + heads_kv * (info.key_length + info.value_length)
        attention += -4 * info.n_embd if flash else heads * cells
        # Builds that reserve logits for a whole batch are met on GPUs, where a server of one's own is the rule.
        n_rows = n_batch if on_device or config.embeddings else n_parallel
        logits = -(-info.n_vocab * n_rows // n_batch) + info.n_embd
        widest = max(self._feed_forward_width(), attention, logits)
        return 4 * n_batch * (5 * info.n_embd + widest) + n_batch * self._input_width(cells, n_parallel, flash=flash)

    def _feed_forward_width(self) -> int:
        """float32 values of a token: gate, up and product; with experts those of all in use, or their outputs."""
        info = self.info
        n_expert_ff = info.number("expert_feed_forward_length") or info.n_ff
        return max(3 * info.n_ff, info.n_expert_used * max(3 * n_expert_ff, 2 * info.n_embd))

    def _input_width(self, cells: int, n_parallel: int, *, flash: bool) -> int:
        """Bytes of a token among the inputs: its masks (float16 for flash attention) and its numbers."""
        masks = cells
        if any(layer.windowed for layer in self._layers):
            masks += min(cells, self._window_cells(n_parallel)) if not self.config.swa_full else cells
        return masks * (2 if flash else 4) + 64


def _block_of(name: str) -> int | None:
    """Index of the layer a tensor belongs to: `blk.12.ffn_up.weight` -> 12."""
    prefix, _, rest = name.partition(".")
    digits = rest.partition(".")[0]
    return int(digits) if prefix == "blk" and digits.isascii() and digits.isdigit() and len(digits) < 6 else None


def _is_windowed(info: GgufInfo, index: int) -> bool:
    pattern = info.metadata.get(f"{info.architecture}.attention.sliding_window_pattern")
    if info.architecture != "llama4" and not info.sliding_window:
        return False
    if isinstance(pattern, tuple):
        return index < len(pattern) and bool(pattern[index])
    period = _WINDOW_PERIODS.get(info.architecture, 1)
    if isinstance(pattern, int) and pattern > 0 and period > 1:
        period = pattern
    return index % period < period - 1


def _row_bytes(setting: str, cache_type: str, length: int) -> int:
    block, block_bytes = CACHE_TYPES[cache_type]
    if length % block:
        why = f"its blocks of {block} do not divide this model's heads of {length}; use f16"
        raise ConfigError(setting, cache_type, why)
    return length // block * block_bytes


def _most(counts: int | tuple[int, ...]) -> int:
    return max(counts) if isinstance(counts, tuple) else counts


def _pad(count: int) -> int:
    return -(-count // CTX_MULTIPLE) * CTX_MULTIPLE
