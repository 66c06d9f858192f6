"""Batches: rows of several kinds as Arrow columns; and parcels, in which rows travel to where columns are made.

Columns are made by the telemetry actor, not by who sends: a gateway has requests to serve.
"""

from __future__ import annotations

import io
import pickle
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import pyarrow as pa

from lltm_ray.telemetry.rows import KINDS

_TYPES = {"str": pa.string(), "int": pa.int64(), "float": pa.float64(), "bool": pa.bool_(), "bytes": pa.binary()}
_CODEC = "zstd"


def _schema(row: type[Any]) -> pa.Schema:
    notes = {name: note.__forward_arg__.removesuffix(" | None") for name, note in row.__annotations__.items()}
    return pa.schema([(name, _TYPES[note]) for name, note in notes.items()])


SCHEMAS: dict[str, pa.Schema] = {kind: _schema(row) for kind, row in KINDS.items()}

Batch = dict[str, pa.RecordBatch]
"""Rows of several kinds, sent together: kind -> columns as in `SCHEMAS`."""


class Sealed(NamedTuple):
    """Rows of one kind between processes of one release."""

    rows: int
    size: int
    """Bytes before they were compressed."""
    packed: bytes
    """zstd of pickled lists of tuples, one after another."""


Parcel = Mapping[str, Sealed]
"""Rows of several kinds, sent together: kind -> rows."""


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


def seal(rows: int, pickled: Sequence[bytes]) -> Sealed:
    """For the way to another process, and small: Ray sends up to 100 KB along with a call.

    What is more goes through its object store, at a cost of 1.4 ms; 500 requests, which are a quarter of a busy
    gateway's second, take 200 KB as they are and 50 KB compressed.

    Args:
        rows: in all.
        pickled: lists of tuples, as `pickle.dumps` has them.
    """
    joined = b"".join(pickled)
    return Sealed(rows, len(joined), pa.compress(joined, codec=_CODEC, asbytes=True))


def unseal(parcel: Parcel) -> tuple[Batch, Counter[str]]:
    """The rows as columns; and how many, by kind, were not of their kind's types, which are left out.

    Raises:
        KeyError, pa.ArrowInvalid: it is of another release.
    """
    batch: Batch = {}
    unsound: Counter[str] = Counter()
    for kind, sealed in parcel.items():
        rows = list(_unpickle(pa.decompress(sealed.packed, sealed.size, codec=_CODEC)))
        try:
            batch[kind] = pack(kind, rows)
        except _UNSOUND:
            sound = [row for row in rows if _is_sound(kind, row)]
            unsound[kind] = len(rows) - len(sound)
            batch[kind] = pack(kind, sound)
    return batch, unsound


_UNSOUND = (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError, UnicodeError, ValueError)


def _unpickle(joined: pa.Buffer) -> Iterator[tuple[Any, ...]]:
    stream = io.BytesIO(joined)
    while stream.tell() < joined.size:
        yield from pickle.load(stream)  # noqa: S301 - of our own processes, as all that comes by Ray


def _is_sound(kind: str, row: tuple[Any, ...]) -> bool:
    try:
        pack(kind, [row])
    except _UNSOUND:
        return False
    return True
