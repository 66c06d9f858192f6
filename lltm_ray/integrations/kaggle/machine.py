"""Which service lends this machine, and what it has: GPUs by NVML, cores, memory, folders, the network."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from threading import Thread
from urllib.parse import urlsplit

from lltm_ray.config import read_environment
from lltm_ray.gpu.host import available_ram_bytes, usable_cores
from lltm_ray.gpu.nvml import Inventory, read_inventory, visible
from lltm_ray.records import GpuInfo

KAGGLE_KEPT_BYTES = 20 * 10**9
"""What Kaggle keeps of /kaggle/working with a version of the notebook."""
LEAST_CAPABILITY = (5, 0)
"""The oldest GPUs (Maxwell) that llama.cpp's CUDA builds have kernels for."""
_HUB = "https://huggingface.co"
_KNOCK_S = 3.0
_DEEPEST, _MOST_ENTRIES = 6, 50_000
"""Kaggle mounts models at owner/model/framework/variation/version; data sets of images have millions of files."""


class Service(StrEnum):
    """Who lends the machine."""

    KAGGLE = "kaggle"
    COLAB = "colab"
    PLAIN = "plain"


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What `detect` found."""

    service: Service
    reason: str
    """What it was known by."""
    gpus: tuple[GpuInfo, ...]
    """Devices that this process, and a Ray that it starts, can use."""
    gpu_reason: str = ""
    """One sentence for what is missing or left out; empty when there is nothing to say."""
    cores: int
    ram_bytes: int
    """Available now."""
    kept_dir: Path
    """Where results belong. Kaggle keeps it, Colab does not; elsewhere it is the working folder."""
    kept_limit_bytes: int | None = None
    scratch_dir: Path
    """For what may be lost: downloads, logs."""
    input_dirs: tuple[Path, ...] = ()
    """Read-only data that the service has mounted; models there are used by path."""
    cache_dir: Path
    """Ours, as `LLTM_RAY_CACHE` or the home folder say."""
    hub_dir: Path
    """The hub's, as `HF_HOME` or the home folder say."""
    is_online: bool | None = None
    """Whether the hub's host takes a connection; None: nobody looked."""

    def __str__(self) -> str:
        gpus = ", ".join(f"{gpu.name} {gpu.total_bytes / 2**30:.0f} GiB" for gpu in self.gpus) or "no GPU"
        online = {True: ", online", False: ", offline", None: ""}[self.is_online]
        return f"{self.service} ({self.reason}): {gpus}; {self.cores} cores, {self.ram_bytes / 2**30:.0f} GiB{online}"

    @property
    def cache_environment(self) -> dict[str, str]:
        """Variables to set before Python starts, so that no download lies in a folder of limited size; often none."""
        if self.kept_limit_bytes is None:
            return {}
        wanted = {"LLTM_RAY_CACHE": (self.cache_dir, "lltm_ray"), "HF_HOME": (self.hub_dir, "huggingface")}
        return {
            name: str(self.scratch_dir / folder)
            for name, (now, folder) in wanted.items()
            if now.resolve().is_relative_to(self.kept_dir.resolve())
        }

    def kept_bytes(self) -> int:
        """Size of all files in `kept_dir` now; Kaggle's limit is `kept_limit_bytes`."""
        return sum(_size(entry) for entry in _files(self.kept_dir, 64, 10**7))

    def find_model(self, file: str) -> Path | None:
        """A GGUF of this name among the mounted data, so that it is neither downloaded nor copied; else None."""
        for folder in self.input_dirs:
            for entry in _files(folder, _DEEPEST, _MOST_ENTRIES):
                if entry.name == file:
                    return Path(entry.path)
        return None


def detect(
    *,
    environ: Mapping[str, str] | None = None,
    root: Path = Path("/"),
    inventory: Inventory | None = None,
    look_online: bool = True,
) -> Machine:
    """Measure this machine.

    Args:
        environ: None: this process's.
        root: where the service's folders are looked for.
        inventory: the GPUs; None: asked of NVML.
        look_online: whether to knock at the hub, which takes 3 s at most.
    """
    env = os.environ if environ is None else environ
    service, reason = which_service(env, root)
    gpus, gpu_reason = usable_gpus(inventory or read_inventory(), env.get("CUDA_VISIBLE_DEVICES"))
    kept, scratch, inputs = _folders(service, root)
    usual = Path(env.get("XDG_CACHE_HOME") or Path(env.get("HOME", "~")).expanduser() / ".cache")
    return Machine(
        service=service,
        reason=reason,
        gpus=gpus,
        gpu_reason=gpu_reason,
        cores=usable_cores(),
        ram_bytes=available_ram_bytes(),
        kept_dir=kept,
        kept_limit_bytes=KAGGLE_KEPT_BYTES if service is Service.KAGGLE else None,
        scratch_dir=scratch,
        input_dirs=inputs,
        cache_dir=read_environment(env).cache_dir,
        hub_dir=Path(env.get("HF_HOME") or usual / "huggingface"),
        is_online=reaches_hub(env) if look_online else None,
    )


def which_service(environ: Mapping[str, str], root: Path = Path("/")) -> tuple[Service, str]:
    """The service, and what it was known by.

    Kaggle comes first: its images are made from Colab's and carry Colab's variables. `KAGGLE_USERNAME` and
    `KAGGLE_KEY` mean nothing: anybody who uses Kaggle's command line has them.
    """
    run_type = environ.get("KAGGLE_KERNEL_RUN_TYPE")
    if run_type:
        return Service.KAGGLE, f"KAGGLE_KERNEL_RUN_TYPE={run_type}"
    if (root / "kaggle" / "working").is_dir() and (root / "kaggle" / "input").is_dir():
        return Service.KAGGLE, "/kaggle/working and /kaggle/input are there"
    tag = environ.get("COLAB_RELEASE_TAG")
    if tag and (root / "content").is_dir():
        return Service.COLAB, f"COLAB_RELEASE_TAG={tag}, and /content is there"
    return Service.PLAIN, "no sign of Kaggle or Colab"


def has_tpu(environ: Mapping[str, str]) -> bool:
    """Whether the service gave this session a TPU; we do not use it, but its sessions are shorter."""
    return any(name in environ for name in ("TPU_NAME", "TPU_WORKER_ID", "TPU_ACCELERATOR_TYPE"))


def usable_gpus(inventory: Inventory, cuda_visible_devices: str | None) -> tuple[tuple[GpuInfo, ...], str]:
    """Devices that engines can get from a Ray that this process starts, and a sentence for those they cannot.

    Ray counts GPUs, not MIG devices, unless CUDA_VISIBLE_DEVICES lists them; of a GPU that is given by its index CUDA
    takes the first MIG device.
    """
    seen, said = list(visible(inventory, cuda_visible_devices)), [inventory.reason] if inventory.reason else []
    if inventory.gpus and not seen:
        said.append(f"CUDA_VISIBLE_DEVICES={cuda_visible_devices!r} hides all {len(inventory.gpus)} GPUs")
    if cuda_visible_devices is None:
        first = {gpu.index: gpu for gpu in reversed(seen)}
        if len(first) < len(seen):
            uuids = ",".join(gpu.uuid for gpu in seen)
            said.append(f"of each GPU only its first MIG device is used: set CUDA_VISIBLE_DEVICES={uuids} for all")
        seen = [gpu for gpu in seen if first[gpu.index] is gpu]
    old = [gpu for gpu in seen if (0, 0) < gpu.compute_capability < LEAST_CAPABILITY]
    if old:
        names = ", ".join(f"{gpu.name} ({'.'.join(map(str, gpu.compute_capability))})" for gpu in old)
        said.append(f"too old for llama.cpp's CUDA builds: {names}")
    return tuple(gpu for gpu in seen if gpu not in old), "; ".join(said)


def is_mig(gpus: Sequence[GpuInfo]) -> bool:
    """Whether there are MIG devices among them: CUDA gives a process only one, so no model is split over several."""
    return any(gpu.uuid.startswith("MIG-") for gpu in gpus)


def reaches_hub(environ: Mapping[str, str]) -> bool:
    """Whether the hub's host, or the proxy on the way to it, takes a connection; false with `HF_HUB_OFFLINE`."""
    if read_environment(environ).hf_offline:
        return False
    target = urlsplit(environ.get("HF_ENDPOINT") or _HUB)
    proxy = environ.get(f"{target.scheme.upper()}_PROXY") or environ.get(f"{target.scheme}_proxy")
    if proxy:
        target = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    reached: list[bool] = []

    def knock() -> None:
        try:
            address = (target.hostname or "", target.port or (443 if target.scheme == "https" else 80))
            socket.create_connection(address, timeout=_KNOCK_S).close()
            reached.append(True)
        except (OSError, ValueError):  # ValueError: no such port
            reached.append(False)

    knocker = Thread(target=knock, daemon=True)  # a name that nobody resolves takes longer than any timeout
    knocker.start()
    knocker.join(_KNOCK_S)
    return reached == [True]


def _folders(service: Service, root: Path) -> tuple[Path, Path, tuple[Path, ...]]:
    """Kept, scratch, inputs."""
    if service is Service.KAGGLE:
        kaggle = root / "kaggle"
        scratch = next((kaggle / name for name in ("temp", "tmp") if (kaggle / name).is_dir()), root / "tmp")
        return kaggle / "working", scratch, (kaggle / "input",)
    if service is Service.COLAB:
        return root / "content", root / "tmp", ()
    return Path.cwd(), Path(tempfile.gettempdir()), ()


def _files(folder: Path, deepest: int, most: int) -> Iterator[os.DirEntry[str]]:
    """Files below a folder, level by level, at most so deep and so many; what cannot be read is passed over."""
    level = [os.fspath(folder)]
    for _ in range(deepest + 1):
        deeper: list[str] = []
        for name in level:
            for entry in _entries(name):
                most -= 1
                if most < 0:
                    return
                if entry.is_dir(follow_symlinks=False):
                    deeper.append(entry.path)
                else:
                    yield entry
        level = deeper


def _size(entry: os.DirEntry[str]) -> int:
    try:
        return entry.stat(follow_symlinks=False).st_size
    except OSError:  # removed since the folder was read
        return 0


def _entries(folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError:
        return []
