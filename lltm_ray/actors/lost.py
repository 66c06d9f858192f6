"""A Ray that ends before the fleet in it: nothing of it can be asked any more, and what it leaves is ended by hand.

A signal to a whole process group, or to a whole unit of systemd, reaches the Ray that this process started, too. Its
GCS stops listening at once. All else waits for the GCS for 60 s: the raylet with its workers, and every call that needs
it, whose process Ray then ends.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable

import psutil
import ray

log = logging.getLogger(__name__)

LOOK_EVERY_S = 0.5
_CONNECT_S = 5.0
_KILLED_S = 10.0
"""How long the kernel may take to end what was killed."""
_DAEMONS = ("gcs_server", "raylet")
_RAYLET = "RAY_RAYLET_PID"
"""In the environment of all that a raylet started, and of what that started."""
_lost: set[str] = set()
"""GCS addresses at which nobody listened any more."""
_sessions: dict[str, str] = {}
"""GCS address -> name of the session there, for all that this process was in: in `ray.shutdown` nobody tells it."""


def is_lost() -> bool:
    """Whether this process is in a Ray that it started, and whose GCS does not listen any more."""
    address = _gcs_address()
    if address and not _refuses(address):
        _lost.discard(address)  # another one's now
    elif address and ray.is_initialized() and _daemons():  # `ray.shutdown` leaves it before it ends it
        _lost.add(address)
    return address in _lost


def watch_ray(on_lost: Callable[[], None]) -> None:
    """From a thread of its own, call this once when the Ray is lost that this process starts.

    Never where the process leaves it in good order.
    """

    def look() -> None:
        while not ray.is_initialized():
            time.sleep(LOOK_EVERY_S)
        address = _gcs_address()
        while not is_lost() and address not in _lost:
            if not ray.is_initialized():
                return
            time.sleep(LOOK_EVERY_S)
        on_lost()

    threading.Thread(target=look, name="watch-ray", daemon=True).start()


def end_lost() -> None:
    """Kill the daemons of a lost Ray that this process started, their workers, and the llama-servers of these."""
    _gcs_address()
    found = (*_daemons(), *_helpers(), *_orphans())
    doomed = {each for first in found for each in (first, *_below(first))}
    for process in doomed:
        try:
            process.kill()
        except psutil.Error as error:
            log.info("gone by itself: %s", error)
    psutil.wait_procs(doomed, timeout=_KILLED_S)


def _children(is_meant: Callable[[psutil.Process], bool]) -> list[psutil.Process]:
    return [each for each in psutil.Process().children() if _holds(is_meant, each)]


def _daemons() -> list[psutil.Process]:
    return _children(lambda each: each.name() in _DAEMONS)


def _helpers() -> list[psutil.Process]:
    """Ray's monitors and its dashboard: their command lines name both the GCS and its session."""
    own = tuple(_sessions.items())
    return _children(lambda each: any(_names(each.cmdline(), *pair) for pair in own))


def _names(words: list[str], *wanted: str) -> bool:
    return all(any(each in word for word in words) for each in wanted)


def _below(process: psutil.Process) -> list[psutil.Process]:
    try:
        return list(process.children(recursive=True))
    except psutil.Error as error:
        log.debug("ended just now: %s", error)
        return []


def _orphans() -> list[psutil.Process]:
    """Those whom a raylet of this process started, and who may not be its children any more, for it is dead.

    Its number alone tells nothing: others may have had it, also in another namespace of processes.
    """
    raylets = {str(each.pid): each.create_time() for each in _daemons()}

    def is_orphan(each: psutil.Process) -> bool:
        began_s = raylets.get(each.environ().get(_RAYLET, "")) if each.uids().real == os.getuid() else None
        return began_s is not None and each.create_time() >= began_s and _logs_to_own(each)

    return [each for each in psutil.process_iter() if raylets and _holds(is_orphan, each)]


def _logs_to_own(process: psutil.Process) -> bool:
    """Whether it has a log of one of this process's sessions open, as each worker has."""
    return any(f"/{name}/logs/" in file.path for file in process.open_files() for name in _sessions.values())


def _holds(is_meant: Callable[[psutil.Process], bool], process: psutil.Process) -> bool:
    """False also of one that has just ended, or is somebody else's."""
    try:
        return is_meant(process)
    except psutil.Error as error:
        log.debug("not to be asked: %s", error)
        return False


def _gcs_address() -> str:
    try:
        if not ray.is_initialized():
            return ""
        context = ray.get_runtime_context()
        address = str(context.gcs_address)
        _sessions[address] = context.get_session_name()
        return address
    except (ray.exceptions.RayError, RuntimeError, AttributeError) as error:  # another thread has just left it
        log.debug("no GCS: %s", error)
        return ""


def _refuses(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S).close()
    except ConnectionRefusedError:
        return True
    except OSError as error:  # it may just be busy
        log.debug("the GCS at %s: %s", address, error)
    return False
