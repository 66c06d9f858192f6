"""Batches cost no more than they must."""

import subprocess
import sys

PROGRAM = """
import sys
from lltm_ray.telemetry.batch import forgo_pandas, pack
{first}
assert pack("slots", [(1, "e", 0, True, 7, 3, 2, 64)]).num_rows == 1
print("pandas" in sys.modules)
import pandas
print(pandas.DataFrame({{"a": [1]}}).shape)
"""


def run(first: str) -> list[str]:
    program = PROGRAM.format(first=first)
    return subprocess.run((sys.executable, "-c", program), capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )


def test_a_process_of_ours_packs_without_pandas_and_can_import_it_later() -> None:
    assert run("forgo_pandas()")[:2] == ["False", "(1, 1)"]


def test_without_that_pyarrow_imports_it() -> None:
    assert run("")[0] == "True"
