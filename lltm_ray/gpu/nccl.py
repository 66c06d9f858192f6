"""Which NCCL this Python would use, its version, and what the environment tells it. Changes nothing."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

_FILE = "libnccl.so.2"
_WHEELS = ("nvidia-nccl-cu13", "nvidia-nccl-cu12", "nvidia-nccl-cu11")
_SYSTEM = (
    "/usr/lib/x86_64-linux-gnu",
    "/usr/lib/aarch64-linux-gnu",
    "/usr/local/nccl/lib",
    "/usr/local/lib",
    "/usr/lib64",
)
_NEW_SCHEME = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Nccl:
    """What was found; `path` is empty without a library, and `reason` says why there is no version."""

    path: str = ""
    origin: str = ""
    """The wheel, variable or folder it is from."""
    version: tuple[int, int, int] | None = None
    reason: str = ""
    environment: dict[str, str] = field(default_factory=dict)
    """Every `NCCL_*` variable, as it is set."""

    @property
    def version_text(self) -> str:
        """E.g. `2.27.5`; empty without one."""
        return ".".join(map(str, self.version or ()))


def read_nccl(environ: Mapping[str, str] = os.environ) -> Nccl:
    """Find the library and ask it for its version.

    Looked for where PyTorch and CuPy take it from: the pip wheels `nvidia-nccl-cu*` first, then `LD_LIBRARY_PATH`,
    `CONDA_PREFIX` and the system's folders. Needs neither a GPU nor PyTorch.
    """
    settings = {name: environ[name] for name in sorted(environ) if name.startswith("NCCL_")}
    for path, origin in _places(environ):
        if path.is_file():
            version, reason = ask_version(path)
            return Nccl(path=str(path), origin=origin, version=version, reason=reason, environment=settings)
    reason = f"no {_FILE}: PyTorch for CUDA brings one (pip install 'lltm_ray[torch]'), or pip install {_WHEELS[0]}"
    return Nccl(reason=reason, environment=settings)


def ask_version(path: Path) -> tuple[tuple[int, int, int] | None, str]:
    """`ncclGetVersion` of a library: (version, "") or (None, why not)."""
    try:
        library = ctypes.CDLL(str(path), mode=os.RTLD_LOCAL | os.RTLD_LAZY)
        call = library.ncclGetVersion
    except (OSError, AttributeError) as error:
        return None, f"{path} is not usable: {error}"
    code = ctypes.c_int()
    call.restype, call.argtypes = ctypes.c_int, [ctypes.POINTER(ctypes.c_int)]
    status = call(ctypes.byref(code))
    if status:
        return None, f"{path}: ncclGetVersion failed with {status}"
    return decode_version(code.value), ""


def decode_version(code: int) -> tuple[int, int, int]:
    """NCCL_VERSION_CODE as (major, minor, patch): M*1000+m*100+p up to 2.8, M*10000+m*100+p since (nccl.h)."""
    unit = _NEW_SCHEME if code >= _NEW_SCHEME else 1000
    return code // unit, code % unit // 100, code % 100


def _places(environ: Mapping[str, str]) -> Iterator[tuple[Path, str]]:
    for name in _WHEELS:
        found = _distribution(name)
        if found is not None:
            yield Path(str(found.locate_file(f"nvidia/nccl/lib/{_FILE}"))), f"wheel {name} {found.version}"
    for folder in filter(None, environ.get("LD_LIBRARY_PATH", "").split(":")):
        yield Path(folder) / _FILE, "LD_LIBRARY_PATH"
    if conda := environ.get("CONDA_PREFIX"):
        yield Path(conda) / "lib" / _FILE, "CONDA_PREFIX"
    for folder in _SYSTEM:
        yield Path(folder) / _FILE, folder


def _distribution(name: str) -> Distribution | None:
    try:
        return distribution(name)
    except PackageNotFoundError:
        return None
