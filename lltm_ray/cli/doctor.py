"""`lltm-ray doctor`: what works on this machine, what does not, and what to do about it."""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import typer
from rich.markup import escape

from lltm_ray import _optional
from lltm_ray.cli._output import OUT, JsonFlag, human_bytes, print_json
from lltm_ray.config import EngineConfig, GatewayConfig, read_environment
from lltm_ray.errors import LltmRayError, MissingExtraError
from lltm_ray.gpu.nccl import read_nccl
from lltm_ray.gpu.nvml import read_inventory
from lltm_ray.llamacpp.binary import EMBEDDED, find_server, server_version

_STYLES = {"ok": "green", "warn": "yellow", "off": "dim", "bad": "bold red"}
_LEAST_PYTHON = (3, 11)
_LEAST_FILES = 4096
_LEAST_SHM_BYTES = 2**30
_LEAST_CACHE_BYTES = 5 * 2**30
_PR_GET_PDEATHSIG = 2
_SHM = Path("/dev/shm")  # noqa: S108 - Ray's object store lies there


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One row. `ok`; `warn`: works, with a catch; `off`: an option not there; `bad`: nothing runs without it."""

    state: str
    detail: str
    remedy: str = ""


def doctor(*, as_json: JsonFlag = False) -> None:
    """Check this machine. Exit code 1 when something is bad; what is merely off or warned of runs."""
    findings = {name: run_check(check) for name, check in CHECKS.items()}
    if as_json:
        print_json([{"name": name, **asdict(found)} for name, found in findings.items()])
    else:
        _show(findings)
    if any(found.state == "bad" for found in findings.values()):
        raise typer.Exit(1)


def run_check(check: Callable[[], Finding]) -> Finding:
    """A check's finding; one that raises is bad, with its error."""
    try:
        return check()
    except Exception as error:  # noqa: BLE001 - a doctor reports whatever is broken
        detail = error.message if isinstance(error, LltmRayError) else f"{type(error).__name__}: {error}"
        return Finding(state="bad", detail=detail)


def _show(findings: dict[str, Finding]) -> None:
    width = max(map(len, findings))
    for name, found in findings.items():
        style = _STYLES[found.state]
        OUT.print(f"[{style}]{found.state:4}[/]  {name:{width}}  {escape(found.detail)}", soft_wrap=True)
        if found.remedy:
            OUT.print(f"{'':{width + 8}}→ {found.remedy}", style="dim", markup=False, soft_wrap=True)


def _check_python() -> Finding:
    wanted = ".".join(map(str, _LEAST_PYTHON))
    if sys.version_info < _LEAST_PYTHON:
        return Finding(state="bad", detail=platform.python_version(), remedy=f"install Python {wanted} or later")
    return Finding(state="ok", detail=f"{platform.python_version()} ({sys.executable})")


def _check_platform() -> Finding:
    detail = f"{platform.system()} {platform.release()} {platform.machine()}, {os.cpu_count()} CPUs"
    if sys.platform == "linux":
        return Finding(state="ok", detail=detail)
    return Finding(state="warn", detail=detail, remedy="only Linux is tested; elsewhere use a Linux container")


def _check_machine() -> Finding:
    from lltm_ray.integrations.kaggle.machine import detect
    from lltm_ray.integrations.kaggle.presets import choose

    machine = detect(look_online=False)
    state, remedy = ("warn", machine.gpu_reason) if machine.gpus and machine.gpu_reason else ("ok", "")
    own, unasked = choose(machine=machine), EngineConfig().n_parallel
    detail = f"{machine}; quick_start starts {own}; `lltm-ray up` takes {unasked} slots each unless told"
    return Finding(state=state, detail=detail, remedy=remedy)


def _check_ray() -> Finding:
    address = read_environment().ray_address
    where = f"RAY_ADDRESS={address}" if address else "no RAY_ADDRESS: commands start Ray on this machine"
    found = _required("ray")
    return replace(found, detail=f"{found.detail}; {where}") if found.state == "ok" else found


def _check_server() -> Finding:
    binary = find_server(None, read_environment())
    detail = f"{server_version(binary)} from {binary.origin} ({binary.path})"
    if binary.origin == "embedded" and read_inventory().gpus:
        remedy = "it uses no GPU: `lltm-ray models engine-download --variant cuda-12-x64`, or set LLAMA_SERVER_PATH"
        return Finding(state="warn", detail=detail, remedy=remedy)
    return Finding(state="ok", detail=detail)


def _check_embedded() -> Finding:
    return Finding(state="ok", detail=server_version(find_server(EMBEDDED, read_environment())))


def _check_gpus() -> Finding:
    inventory = read_inventory()
    if not inventory.gpus:
        return Finding(state="off", detail=inventory.reason, remedy="engines run on the CPU")
    names = ", ".join(f"{gpu.index}: {gpu.name}, {human_bytes(gpu.free_bytes)} free" for gpu in inventory.gpus)
    detail = f"{names} (driver {inventory.gpus[0].driver})"
    return Finding(state="warn" if inventory.reason else "ok", detail=detail, remedy=inventory.reason)


def _check_parent_death() -> Finding:
    if sys.platform != "linux":
        remedy = "a killed actor may leave its llama-server behind; end it by hand"
        return Finding(state="warn", detail=f"{sys.platform} has no parent-death signal", remedy=remedy)
    signal_number = ctypes.c_int()
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_GET_PDEATHSIG, ctypes.byref(signal_number)) != 0:
        detail = f"prctl failed: {os.strerror(ctypes.get_errno())}"
        return Finding(state="warn", detail=detail, remedy="a sandbox forbids it; a killed actor may leave its server")
    return Finding(state="ok", detail="servers die with their actors")


def _check_uvloop() -> Finding:
    return _required("uvloop")


def _check_httptools() -> Finding:
    return _required("httptools")


def _required(package: str, distribution: str = "") -> Finding:
    """A package that comes with ours and must import."""
    if find_spec(package) is None:
        return Finding(state="bad", detail="not installed", remedy="the installation is damaged: pip install lltm_ray")
    import_module(package)
    return Finding(state="ok", detail=version(distribution or package))


def _check_otlp() -> Finding:
    return _required("opentelemetry.exporter.otlp", "opentelemetry-exporter-otlp")


def _check_nvml() -> Finding:
    found = _required("pynvml", "nvidia-ml-py")
    reason = read_inventory().reason
    if found.state == "ok" and reason:
        return Finding(state="off", detail=f"{found.detail} is installed, but {reason}")
    return found


def _check_nccl() -> Finding:
    found = read_nccl()
    told = "".join(f", {name}={value}" for name, value in found.environment.items())
    if found.version:
        return Finding(state="ok", detail=f"{found.version_text} from {found.origin}{told}")
    if found.path:
        return Finding(state="warn", detail=found.reason + told, remedy="reinstall it; GPU collectives need it")
    return Finding(state="off", detail=found.reason + told)


def _check_rapids() -> Finding:
    return _extra("rapids", "cugraph-cu13", "cugraph")


def _check_torch() -> Finding:
    found = _extra("torch", "torch", "torch")
    if found.state == "ok" and not _optional.load("torch", extra="torch").cuda.is_available():
        return Finding(state="warn", detail=f"{found.detail}, but it sees no CUDA device", remedy="kernels need one")
    return found


def _check_graphistry() -> Finding:
    return _extra("graphistry", "graphistry", "graphistry")


def _extra(extra: str, distribution: str, module: str) -> Finding:
    """An optional package: off when absent, warned of when it is there and does not import (a broken CUDA, say)."""
    try:
        _optional.load(module, extra=extra)
        return Finding(state="ok", detail=version(distribution))
    except (MissingExtraError, PackageNotFoundError):
        return Finding(state="off", detail="not installed", remedy=f"pip install 'lltm_ray[{extra}]'")
    except Exception as error:  # noqa: BLE001 - installed is not usable, whatever the package's reason
        detail = f"installed, but not usable: {type(error).__name__}: {error}"
        return Finding(state="warn", detail=detail, remedy=f"reinstall it: pip install --force 'lltm_ray[{extra}]'")


def _check_cache() -> Finding:
    folder = read_environment().cache_dir
    remedy = "set LLTM_RAY_CACHE to a folder you may write"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            free_bytes = shutil.disk_usage(folder).free
    except OSError as error:
        return Finding(state="bad", detail=f"{folder} is not writable: {error.strerror}", remedy=remedy)
    detail = f"{folder}, {human_bytes(free_bytes)} free"
    if free_bytes < _LEAST_CACHE_BYTES:
        return Finding(state="warn", detail=detail, remedy="models take gigabytes; " + remedy)
    return Finding(state="ok", detail=detail)


def _check_shared_memory() -> Finding:
    if not _SHM.is_dir():
        return Finding(state="warn", detail=f"no {_SHM}", remedy="Ray falls back to slow files in its temporary folder")
    usage = shutil.disk_usage(_SHM)
    detail = f"{_SHM}: {human_bytes(usage.free)} of {human_bytes(usage.total)} free"
    if usage.free < _LEAST_SHM_BYTES:
        return Finding(state="warn", detail=detail, remedy="give the container more: docker run --shm-size=2g")
    return Finding(state="ok", detail=detail)


def _check_open_files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    shown_hard = "unlimited" if hard == resource.RLIM_INFINITY else f"{hard:,}"
    unlimited = soft == resource.RLIM_INFINITY
    detail = f"{'unlimited' if unlimited else f'{soft:,}'} (hard limit {shown_hard})"
    if not unlimited and soft < _LEAST_FILES:
        remedy = "each stream holds two sockets, Ray many more: ulimit -n 65536 before `lltm-ray up`"
        return Finding(state="warn", detail=detail, remedy=remedy)
    return Finding(state="ok", detail=detail)


def _check_port() -> Finding:
    gateway = GatewayConfig()
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((gateway.host, gateway.port))
        except OSError as error:
            detail = f"port {gateway.port} on {gateway.host}: {error.strerror}"
            return Finding(state="warn", detail=detail, remedy="a fleet may be up; else `lltm-ray up --port` another")
    return Finding(state="ok", detail=f"port {gateway.port} on {gateway.host} is free")


CHECKS: dict[str, Callable[[], Finding]] = {
    "python": _check_python,
    "platform": _check_platform,
    "machine": _check_machine,
    "ray": _check_ray,
    "llama-server": _check_server,
    "embedded engine": _check_embedded,
    "GPUs": _check_gpus,
    "parent-death signal": _check_parent_death,
    "uvloop": _check_uvloop,
    "httptools": _check_httptools,
    "otlp": _check_otlp,
    "nvml": _check_nvml,
    "nccl": _check_nccl,
    "extra rapids": _check_rapids,
    "extra torch": _check_torch,
    "extra graphistry": _check_graphistry,
    "cache folder": _check_cache,
    "shared memory": _check_shared_memory,
    "open files": _check_open_files,
    "gateway port": _check_port,
}
"""Name -> check; one that raises becomes a bad row."""
