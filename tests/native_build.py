"""Builds csrc/ for tests and benches, once for each state of its files: `python -m tests.native_build [--cuda]`.

The module is kept in a folder of the user's temporary files, named by the digest of csrc/ and of the tools, and loaded
under its real name. The command prints the path. `LLTM_RAY_NATIVE=1 pip install .` is how users build it.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import importlib.machinery
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from types import ModuleType

import pybind11

import lltm_ray.kernels

NAME = "lltm_ray.kernels._native"
SOURCES = Path(__file__).parents[1] / "csrc"
KEPT_BUILDS = 4


def _digest(cuda: bool) -> str:
    digest = hashlib.sha256(f"{cuda} {sys.implementation.cache_tag} {pybind11.__version__}".encode())
    for path in sorted(SOURCES.iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _run(*command: str) -> None:
    scripts = sysconfig.get_path("scripts")  # where pip puts cmake and ninja; not on the path of `.venv/bin/python`
    environment = os.environ | {"PATH": os.pathsep.join((scripts, os.environ.get("PATH", os.defpath)))}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        need = "csrc/ needs a C++17 compiler and Python's headers (Debian: apt-get install g++ python3-dev)"
        raise RuntimeError(f"{need}\n{' '.join(command)}\n{done.stdout[-8000:]}\n{done.stderr[-8000:]}")


def _compile(folder: Path, cuda: bool) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    _run(
        *("cmake", "-S", str(SOURCES), "-B", str(folder), "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release"),
        *(f"-DLLTM_RAY_CUDA={'ON' if cuda else 'OFF'}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"),
        f"-DPython_EXECUTABLE={sys.executable}",
    )
    _run("cmake", "--build", str(folder))


def _forget_old(root: Path) -> None:
    builds = sorted((path for path in root.iterdir() if path.is_dir()), key=lambda path: path.stat().st_mtime)
    for path in builds[:-KEPT_BUILDS]:
        shutil.rmtree(path, ignore_errors=True)


def build(*, cuda: bool = False) -> Path:
    """The shared library of csrc/ as it is now; compiles it when nobody has yet, one process at a time."""
    root = Path(tempfile.gettempdir()) / f"lltm-ray-native-{os.getuid()}"
    root.mkdir(mode=0o700, exist_ok=True)
    if root.stat().st_uid != os.getuid():
        raise PermissionError(f"{root} is another user's: nothing from there is run")
    folder = root / _digest(cuda)
    with (root / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "done").exists():
            _compile(folder, cuda)
            (folder / "done").touch()
            _forget_old(root)
    return next(folder.glob("_native*.so"))


def load(*, cuda: bool = False) -> ModuleType:
    """The module, as `import lltm_ray.kernels._native` finds it afterwards; a process has one."""
    if NAME in sys.modules:
        return sys.modules[NAME]
    path = build(cuda=cuda)
    spec = importlib.util.spec_from_file_location(
        NAME, path, loader=importlib.machinery.ExtensionFileLoader(NAME, str(path))
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[NAME] = module
    lltm_ray.kernels._native = module
    return module


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cuda", action="store_true", help="fail without a CUDA toolkit")
    print(build(cuda=parser.parse_args().cuda))
