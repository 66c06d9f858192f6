"""Names of quantizations: what `--type` takes, what a file says of itself, and the type that most tensors get."""

from __future__ import annotations

from lltm_ray.errors import ConfigError
from lltm_ray.models.gguf_header import TENSOR_TYPES

KINDS: dict[str, tuple[int, str]] = {
    "F32": (0, "F32"), "F16": (1, "F16"), "BF16": (32, "BF16"),
    "Q4_0": (2, "Q4_0"), "Q4_1": (3, "Q4_1"), "Q5_0": (8, "Q5_0"), "Q5_1": (9, "Q5_1"), "Q8_0": (7, "Q8_0"),
    "Q2_K": (10, "Q2_K"), "Q2_K_S": (21, "Q2_K"),
    "Q3_K_S": (11, "Q3_K"), "Q3_K_M": (12, "Q3_K"), "Q3_K_L": (13, "Q3_K"),
    "Q4_K_S": (14, "Q4_K"), "Q4_K_M": (15, "Q4_K"), "Q5_K_S": (16, "Q5_K"), "Q5_K_M": (17, "Q5_K"),
    "Q6_K": (18, "Q6_K"),
    "IQ1_S": (24, "IQ1_S"), "IQ1_M": (31, "IQ1_M"),
    "IQ2_XXS": (19, "IQ2_XXS"), "IQ2_XS": (20, "IQ2_XS"), "IQ2_S": (28, "IQ2_XS"), "IQ2_M": (29, "IQ2_S"),
    "IQ3_XXS": (23, "IQ3_XXS"), "IQ3_XS": (22, "IQ3_S"), "IQ3_S": (26, "IQ3_S"), "IQ3_M": (27, "IQ3_S"),
    "IQ4_NL": (25, "IQ4_NL"), "IQ4_XS": (30, "IQ4_XS"),
}  # fmt: skip
"""Name -> `general.file_type`, type of most tensors: llama.h's `llama_ftype` and `llama_ftype_get_default_type` of
llama.cpp's src/llama-quant.cpp."""
ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}
"""As tools/quantize/quantize.cpp has them."""
BLOCKS = {name: (elements, nbytes) for name, elements, nbytes in TENSOR_TYPES.values()}
"""Type of a tensor -> elements a block, bytes a block."""
PLAIN = frozenset(("F32", "F16", "BF16"))
"""Types that are not quantized and can be."""
NUMBERS = frozenset((*PLAIN, "F64", "I8", "I16", "I32", "I64"))


def find_kind(text: str) -> str:
    """The name as `KINDS` has it; upper and lower case are one.

    Raises:
        ConfigError: there is none of that name.
    """
    name = ALIASES.get(text.upper(), text.upper())
    if name not in KINDS:
        raise ConfigError("type", text, f"must be one of {', '.join(sorted(KINDS))}")
    return name


def row_bytes(kind: str, n_elements: int) -> int:
    """Bytes of whole blocks, as ggml's `ggml_row_size`."""
    elements, nbytes = BLOCKS[kind]
    return n_elements // elements * nbytes


def is_quantized(kind: str) -> bool:
    """As ggml's `ggml_is_quantized`."""
    return kind not in NUMBERS
