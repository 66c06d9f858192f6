"""A Ray that ends before the fleet in it: nothing of it can be asked any more, and what it leaves is ended by hand.

A signal to a whole process group, or to a whole unit of systemd, reaches the Ray that this process started, too. Its
GCS stops listening at once. All else waits for the GCS for 60 s: the raylet with its workers, and every call that needs
it, whose process Ray then ends.
"""

from __future__ import annotations

import logging
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


def is_lost() -> bool:
    """Whether this process is in a Ray that it started, and whose GCS does not listen any more."""
    address = _gcs_address()
    if address and not _refuses(address):
        _lost.discard(address)  # another one's now
    elif address and _daemons() and ray.is_initialized():  # `ray.shutdown` leaves it before it ends it
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
    daemons = _daemons()
    raylets = {str(each.pid) for each in daemons}
    others = psutil.process_iter(["environ"])  # some daemons may be dead, and not their children's parents any more
    doomed = [*daemons, *(each for each in others if (each.info["environ"] or {}).get(_RAYLET) in raylets)]
    for process in doomed:
        try:
            process.kill()
        except psutil.Error as error:
            log.info("gone by itself: %s", error)
    psutil.wait_procs(doomed, timeout=_KILLED_S)


def _daemons() -> list[psutil.Process]:
    return [each for each in psutil.Process().children() if each.name() in _DAEMONS]


def _gcs_address() -> str:
    try:
        return str(ray.get_runtime_context().gcs_address) if ray.is_initialized() else ""
    except (ray.exceptions.RayError, AttributeError) as error:  # another thread has just left it
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
