"""Batches: rows of several kinds as Arrow columns."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import pyarrow as pa

from lltm_ray.telemetry.rows import KINDS

_TYPES = {"str": pa.string(), "int": pa.int64(), "float": pa.float64(), "bool": pa.bool_(), "bytes": pa.binary()}


def _schema(row: type[Any]) -> pa.Schema:
    notes = {name: note.__forward_arg__.removesuffix(" | None") for name, note in row.__annotations__.items()}
    return pa.schema([(name, _TYPES[note]) for name, note in notes.items()])


SCHEMAS: dict[str, pa.Schema] = {kind: _schema(row) for kind, row in KINDS.items()}

Batch = dict[str, pa.RecordBatch]
"""Rows of several kinds, sent together: kind -> columns as in `SCHEMAS`."""


def forgo_pandas() -> None:
    """Make the first array of a process that is ours alone, and needs no pandas, cheap; before it starts threads.

    pyarrow imports pandas then, wherever it is installed: seconds of CPU and 40 MB in each of a fleet's processes, at
    the moment when its engines have just become ready. It looks once; afterwards pandas can be imported as ever.
    """
    if "pandas" in sys.modules:
        return
    too_old = ModuleType("pandas")
    too_old.__version__ = "0"  # type: ignore[attr-defined] # pyarrow leaves such a one alone
    sys.modules["pandas"] = too_old
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it does
            pack("slots", [])
    finally:
        del sys.modules["pandas"]


def pack(kind: str, noted: Sequence[tuple[Any, ...]]) -> pa.RecordBatch:
    """Rows of one kind as columns.

    Raises:
        pa.ArrowInvalid, pa.ArrowTypeError: a value is not of its column's type.
    """
    schema = SCHEMAS[kind]
    columns = zip(*noted, strict=True) if noted else ((),) * len(schema)
    arrays = [pa.array(values, field.type) for values, field in zip(columns, schema, strict=True)]
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def unpack(kind: str, batch: pa.RecordBatch) -> Iterator[Any]:
    """The rows again, as their row type."""
    make = KINDS[kind]._make
    return map(make, zip(*(column.to_pylist() for column in batch.columns), strict=True))
