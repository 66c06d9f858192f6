"""More hostile GGUF bytes than the tests' 2,000 cases: `python -m tests.peers.hostile [--cases 10000]`."""

from __future__ import annotations

import argparse
import sys
import time

from hypothesis import given, settings

from tests.unit.models.test_gguf import HOSTILE_BYTES, check_hostile


def main() -> int:
    """0 if every case was read or refused in bounded memory and time."""
    parser = argparse.ArgumentParser(prog="python -m tests.peers.hostile", description=__doc__)
    parser.add_argument("--cases", type=int, default=10_000)
    chosen = parser.parse_args()
    begun = time.process_time()
    settings(max_examples=chosen.cases, deadline=None)(given(HOSTILE_BYTES)(check_hostile))()
    print(f"{chosen.cases} cases in {time.process_time() - begun:.1f} s of CPU")
    return 0


if __name__ == "__main__":
    sys.exit(main())
