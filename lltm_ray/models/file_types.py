"""llama.cpp's file types by falling quality, and how large a model is in each. Pure.

Which type a tensor gets is said by `quantize.mixtures`; the tests compare the sizes with llama-quantize's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from lltm_ray.errors import ConfigError
from lltm_ray.models.gguf import GgufInfo, bytes_by_type
from lltm_ray.models.gguf_header import TensorInfo
from lltm_ray.models.quantize.kinds import row_bytes

_ALIGNMENT = 32
"""Of the data that llama-quantize writes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FileType:
    """One way to write a model's weights."""

    name: str
    base: str
    """Type of most tensors."""
    bits: float
    """A weight, over the file of an 8 B Llama."""
    loss: float | None
    """How much perplexity grows for Llama 3 8B, as llama-quantize's own help says; None where it does not."""
    imatrix: bool = False
    """Whether llama-quantize asks for an importance matrix."""


FILE_TYPES: Mapping[str, FileType] = {
    each.name: each
    for each in (
        FileType(name="F16", base="F16", bits=16.00, loss=0.0),
        FileType(name="Q8_0", base="Q8_0", bits=8.50, loss=0.0026),
        FileType(name="Q6_K", base="Q6_K", bits=6.56, loss=0.0217),
        FileType(name="Q5_K_M", base="Q5_K", bits=5.70, loss=0.0569),
        FileType(name="Q5_K_S", base="Q5_K", bits=5.57, loss=0.1049),
        FileType(name="Q4_K_M", base="Q4_K", bits=4.89, loss=0.1754),
        FileType(name="Q4_K_S", base="Q4_K", bits=4.67, loss=0.2689),
        FileType(name="IQ4_XS", base="IQ4_XS", bits=4.46, loss=None),
        FileType(name="Q3_K_L", base="Q3_K", bits=4.30, loss=0.5562),
        FileType(name="Q3_K_M", base="Q3_K", bits=4.00, loss=0.6569),
        FileType(name="IQ3_M", base="IQ3_S", bits=3.76, loss=None),
        FileType(name="IQ3_XS", base="IQ3_S", bits=3.50, loss=None, imatrix=True),
        FileType(name="Q3_K_S", base="Q3_K", bits=3.64, loss=1.6321),
        FileType(name="IQ3_XXS", base="IQ3_XXS", bits=3.25, loss=None, imatrix=True),
        FileType(name="Q2_K", base="Q2_K", bits=3.16, loss=3.5199),
        FileType(name="IQ2_M", base="IQ2_S", bits=2.93, loss=None, imatrix=True),
    )
}
"""By falling quality."""


def quantized(info: GgufInfo, file_type: str) -> GgufInfo:
    """The model as llama-quantize would write it, in one file; with an importance matrix only where one is needed.

    Args:
        info: the model in any type; what is not requantized keeps its own.
        file_type: one of `FILE_TYPES`.

    Raises:
        ConfigError: no such file type.
    """
    if file_type not in FILE_TYPES:
        raise ConfigError("file_type", file_type, f"must be one of {', '.join(FILE_TYPES)}")
    from lltm_ray.models.quantize.plan import Options, choose_types  # NumPy

    known = {tensor.name: tensor for tensor in info.tensors}
    kinds = choose_types(info, Options(kind=file_type), has_imatrix=FILE_TYPES[file_type].imatrix)
    at, tensors = min((tensor.offset_bytes for tensor in info.tensors), default=0), []
    for name, kind in kinds.items():
        nbytes = row_bytes(kind, known[name].n_elements)
        tensors.append(TensorInfo(name, known[name].shape, kind, at, nbytes))
        at += -(-nbytes // _ALIGNMENT) * _ALIGNMENT
    return replace(info, tensors=tuple(tensors), file_bytes=at, quantization=bytes_by_type(tensors), split_count=0)


def file_type_of(info: GgufInfo) -> str:
    """The file type that a model has by its tensors: of those with its main type the one nearest in size."""
    main = next(iter(info.quantization), "F16")
    near = {
        each.name: abs(quantized(info, each.name).tensor_bytes - info.tensor_bytes)
        for each in FILE_TYPES.values()
        if each.base == main
    }
    return min(near, key=near.__getitem__) if near else main
