"""Fresh inputs for the fused kernels, and how far a result is from the reference in float64."""

from __future__ import annotations

SHAPES = {"one": (1, 1), "odd": (3, 777), "row": (7, 130), "wide": (5, 4096)}
OPTIONS = {"rope": ({"style": "halves"}, {"style": "pairs"})}


def arguments(torch, name, shape, dtype, device):
    """Positional tensors for kernel `name`; `shape` is [rows, columns], for rope [2, rows, 3, an even number near]."""

    def make(*size):
        return torch.randn(size, device=device, dtype=torch.float32).to(dtype)

    rows, columns = shape
    if name == "rope":
        half = min(64, -(-columns // 2))
        angle = torch.rand(rows, half, device=device) * 100
        return make(2, rows, 3, 2 * half), angle.cos(), angle.sin()
    vectors = {"softmax": 0, "layernorm": 2, "rmsnorm": 1}.get(name)
    if vectors is None:
        return make(rows, columns), make(rows, columns)
    return (make(rows, columns) * 3, *(make(columns) for _ in range(vectors)))


def error(kernel, found, tensors, options):
    """Largest |error| / max(1, |reference|)."""
    wanted = kernel.reference(*(tensor.double() for tensor in tensors), **options)
    return ((found.double() - wanted).abs() / wanted.abs().clamp(min=1)).max().item()
