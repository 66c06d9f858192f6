"""Arrow columns as arrays of numbers: codes for names, integers for ids, seconds for times."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

Floats = np.ndarray[Any, np.dtype[np.float64]]
Ints = np.ndarray[Any, np.dtype[np.int64]]
NONE = -1
"""The code of a name that is empty or missing."""
_HEX = np.full(256, 255, dtype=np.uint8)
_HEX[np.frombuffer(b"0123456789abcdef", np.uint8)] = np.arange(16)
_HEX[np.frombuffer(b"ABCDEF", np.uint8)] = np.arange(10, 16)
_ID_DIGITS = 16


def floats(column: Any) -> Floats:
    """Numbers, or booleans, as float64; NaN for null."""
    found: Floats = pc.fill_null(pc.cast(column, pa.float64()), np.nan).to_numpy()
    return found


def ints(column: Any) -> Ints:
    """Numbers as int64; -1 for null."""
    found: Ints = pc.fill_null(pc.cast(column, pa.int64(), safe=False), NONE).to_numpy()
    return found


def seconds(column: Any, zero_unix_nano: int) -> Floats:
    """Moments in nanoseconds since the epoch as seconds since `zero_unix_nano`; exact to a nanosecond for 100 days."""
    found: Floats = (ints(column) - zero_unix_nano) / 1e9
    return found


def request_ends(rows: pa.Table) -> Ints:
    """When requests ended, in nanoseconds since the epoch; one without a duration ended as it arrived."""
    total = np.nan_to_num(floats(rows["total_s"]))
    return ints(rows["arrived_unix_nano"]) + np.rint(total * 1e9).astype(np.int64)


def encode(columns: Iterable[Any], known: Sequence[str] = ()) -> tuple[tuple[str, ...], list[Ints]]:
    """Names of several columns as codes of one list.

    Args:
        columns: of strings; null and empty ones have no code.
        known: names that have codes already, from 0 on.

    Returns:
        All names: those known, then the new ones sorted; and the codes of each column, -1 for none.
    """
    arrays = [pc.fill_null(column, "") for column in columns]
    new = {name for each in arrays for name in pc.unique(each).to_pylist()} - {"", *known}
    names = (*known, *sorted(new))
    among = pa.array(names, pa.string())
    return names, [pc.fill_null(pc.index_in(each, among), NONE).to_numpy().astype(np.int64) for each in arrays]


def span_ids(column: Any) -> Ints:
    """Span ids of 16 hex digits as integers; 0 for one that is none."""
    if not len(column):
        return np.empty(0, np.int64)
    is_id = pc.fill_null(pc.equal(pc.binary_length(column), _ID_DIGITS), False)
    chunks = pc.if_else(is_id, column, "0" * _ID_DIGITS)
    array = chunks.combine_chunks() if isinstance(chunks, pa.ChunkedArray) else chunks
    text = pc.cast(array, pa.binary(_ID_DIGITS)).buffers()[1]
    digits = _HEX[np.frombuffer(text, np.uint8, count=len(column) * _ID_DIGITS)].reshape(-1, _ID_DIGITS)
    packed = (digits[:, ::2] << 4 | digits[:, 1::2] & 15).astype(np.uint8)
    found: Ints = np.ascontiguousarray(packed).view(">i8").ravel().astype(np.int64)
    return np.where((digits == 255).any(axis=1), 0, found)


def find(keys: Ints, wanted: Ints) -> Ints:
    """For each wanted number the index of its first place among `keys`; -1 for none, and for 0, which is no id."""
    if not len(keys):
        return np.full(len(wanted), NONE, np.int64)
    order = np.argsort(keys, kind="stable")
    at = np.minimum(np.searchsorted(keys, wanted, sorter=order), len(keys) - 1)
    found = order[at]
    return np.where((keys[found] == wanted) & (wanted != 0), found, NONE).astype(np.int64)


def empty(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Columns without rows."""
    return {name: np.empty(0, kind) for name, kind in schema.items()}
