"""Conversion between Arrow tables and NumPy arrays, for functions that Spark runs in workers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

_KINDS = {
    "key": pa.int32(),
    "part": pa.int32(),
    "missing": pa.int32(),
    "scalar": pa.float64(),
    "quadratic": pa.float64(),
    "penalty": pa.float64(),
    "worst": pa.float64(),
}


def arrays_of(table: pa.Table | pa.RecordBatch) -> list[dict[str, Any]]:
    """Rows as dictionaries. Binary values are buffers of the table, not copies."""
    columns = [_values(table.column(name)) for name in table.schema.names]
    return [dict(zip(table.schema.names, row, strict=True)) for row in zip(*columns, strict=True)]


def _values(column: pa.Array | pa.ChunkedArray) -> list[Any]:
    if not pa.types.is_binary(column.type):
        return column.to_pylist()
    values: list[Any] = []
    for chunk in column.chunks if isinstance(column, pa.ChunkedArray) else [column]:
        # Slice the chunk's own buffer, because `chunk[i].as_buffer()` would copy.
        _, ends, data = chunk.buffers()
        data = data or pa.py_buffer(b"")  # may be absent if every value is empty
        bounds = np.frombuffer(ends, np.int32)[chunk.offset :][: len(chunk) + 1].tolist()
        valid = chunk.is_valid().to_pylist()
        values += [
            data.slice(first, last - first) if there else None
            for (first, last), there in zip(pairwise(bounds), valid, strict=True)
        ]
    return values


def binary_table(rows: Iterable[Mapping[str, Any]], **kinds: pa.DataType) -> pa.Table:
    """Rows as an Arrow table; columns are binary unless `_KINDS` or `kinds` says otherwise.

    The first row must have the schema's order: Spark takes columns of `mapInArrow` by position.
    """
    rows = list(rows)
    columns = {}
    for name in rows[0]:
        kind = kinds.get(name) or _KINDS.get(name) or pa.binary()
        values = [row[name] for row in rows]
        columns[name] = (
            _binary_array(values) if kind == pa.binary() else pa.array(values, type=kind)
        )
    return pa.table(columns)


def _binary_array(values: list[Any]) -> pa.Array:
    """A binary column from buffers; a single value is not copied."""
    if len(values) == 1 and values[0] is not None:
        return one_binary(values[0])
    return pa.array([None if v is None else bytes(v) for v in values], type=pa.binary())


def one_binary(value: Any) -> pa.Array:
    """A column of one binary value, which shares the given buffer."""
    data = pa.py_buffer(value)
    offsets = pa.py_buffer(np.array([0, data.size], np.int32))
    return pa.Array.from_buffers(pa.binary(), 1, [None, offsets, data])


def pieces_table(rows: Iterable[Mapping[str, Any]], **kinds: pa.DataType) -> pa.Table:
    """Like `binary_table`, but with one batch per row: nothing is copied, and the JVM holds one row
    at a time."""
    return pa.concat_tables([binary_table([row], **kinds) for row in rows])


def list_of(values: pa.Array) -> pa.Array:
    """A column of one list."""
    return pa.ListArray.from_arrays(pa.array([0, len(values)], pa.int32()), values)


def list_column(matrix: np.ndarray) -> pa.Array:
    """A float32 (n, rank) matrix as a column of type array<float>, without a copy."""
    n, rank = matrix.shape
    flat = pa.array(np.ascontiguousarray(matrix, np.float32).reshape(-1))
    return pa.ListArray.from_arrays(pa.array(np.arange(n + 1, dtype=np.int32) * rank), flat)


def matrix_of(column: pa.Array | pa.ChunkedArray, rank: int) -> np.ndarray:
    """A column of array<float> values of equal length as a float32 (n, rank) matrix."""
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    if isinstance(column, pa.ChunkedArray):  # pyarrow keeps an empty chunked array chunked
        return np.zeros((0, rank), np.float32)
    return column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), rank)


def vectors_of(column: pa.Array, rank: int) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """A column array<float> as float32 (n, rank) with zeros for nulls, and a mask of the non-nulls.

    A missing number inside a vector becomes NaN.
    """
    valid = column.is_valid().to_numpy(zero_copy_only=False)
    vectors = np.zeros((len(column), rank), np.float32)
    vectors[valid] = column.flatten().to_numpy(zero_copy_only=False).reshape(-1, rank)
    return vectors, valid


_TYPES = {
    "string": pa.string(),
    "int": pa.int32(),
    "long": pa.int64(),
    "boolean": pa.bool_(),
    "binary": pa.binary(),
}


def _arrow_kinds(schema: str) -> dict[str, pa.DataType]:
    """The Arrow types of the columns of a Spark schema, for `pieces_table`."""
    return {name: _TYPES[kind] for name, kind in (each.split() for each in schema.split(", "))}


def _table_of(schema: str, rows: list[dict[str, Any]]) -> pa.Table:
    """Rows as a table of a schema; there may be none."""
    kinds = _arrow_kinds(schema)
    return pieces_table(rows, **kinds) if rows else pa.schema(kinds).empty_table()


def _mapped(
    function: Callable[[dict[str, Any]], Iterator[dict[str, Any]]],
    schema: str,
    one_batch: bool = False,
) -> Callable[[Iterable[pa.RecordBatch]], Iterable[pa.RecordBatch]]:
    """Turn a function from one row to rows of `schema` into a function for `mapInArrow`;
    `one_batch`, for many small rows, puts all rows that come from one into one batch."""

    def apply(batches: Iterable[pa.RecordBatch]) -> Iterable[pa.RecordBatch]:
        for batch in batches:
            for row in arrays_of(batch):
                table = _table_of(schema, list(function(row)))
                yield from (table.combine_chunks() if one_batch else table).to_batches()

    return apply
