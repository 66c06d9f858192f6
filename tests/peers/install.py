"""Puts every peer into a private folder of its own, once: virtual environments, a Debian package, compiled C.

Nothing else on the machine is touched. `make bench` calls this on first use.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from .processes import StartError

HERE = Path(__file__).parent
CACHE = HERE.parents[1] / ".bench"


def _run(argv: list[str], cwd: Path | None = None) -> str:
    try:
        done = subprocess.run(argv, cwd=cwd, capture_output=True, text=True, check=False)
    except OSError as error:
        raise StartError(f"cannot run {argv[0]}: {error}") from error
    if done.returncode:
        raise StartError(f"{' '.join(argv[:4])} ... failed: {(done.stderr or done.stdout)[-400:].strip()}")
    return done.stdout


def venv(name: str, pins: tuple[str, ...]) -> Path:
    """The bin folder of a virtual environment with exactly these requirements; made anew when they change."""
    folder = CACHE / name
    marker, wanted = folder / ".pins", "\n".join(pins)
    if not marker.is_file() or marker.read_text() != wanted:
        shutil.rmtree(folder, ignore_errors=True)
        if uv := shutil.which("uv"):
            _run([uv, "venv", "--quiet", "--python", sys.executable, str(folder)])
            _run([uv, "pip", "install", "--quiet", "--python", str(folder / "bin/python"), *pins])
        else:
            _run([sys.executable, "-m", "venv", str(folder)])
            _run([str(folder / "bin/python"), "-m", "pip", "install", "--quiet", *pins])
        marker.write_text(wanted)
    return folder / "bin"


def debian(package: str, program: str) -> Path:
    """A program of a Debian package, unpacked and not installed; its libraries must be on the machine."""
    folder = CACHE / package
    path = folder / "root" / program
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        _run(["apt-get", "download", package], cwd=folder)
        for archive in folder.glob(f"{package}_*.deb"):
            _run(["dpkg", "-x", str(archive), str(folder / "root")])
    return path


def debian_version(package: str) -> str:
    """As its archive's name tells."""
    return next((path.name.split("_")[1] for path in (CACHE / package).glob("*.deb")), "not fetched")


def compiled(source: str) -> Path:
    """A C program of this folder, compiled when it changed."""
    text, program = HERE / source, CACHE / "bin" / Path(source).stem
    if not program.is_file() or program.stat().st_mtime < text.stat().st_mtime:
        program.parent.mkdir(parents=True, exist_ok=True)
        _run(["cc", "-O2", "-Wall", "-Wextra", "-o", str(program), str(text)])
    return program
