"""Runs as `python _child.py PARENT_PID ARGV...`: becomes ARGV, and dies when its parent dies.

Linux sends the parent-death signal when the *thread* that made the child ends; `process.py` therefore waits for the
child on the thread that made it. Kept free of imports from the package: it must start in milliseconds.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    """Set the signal, make sure that the parent was not gone before that, and become the server."""
    parent, argv = int(sys.argv[1]), sys.argv[2:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            sys.exit("the parent is gone")
    os.execvp(argv[0], argv)  # noqa: S606


if __name__ == "__main__":
    main()
