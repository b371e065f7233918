"""What blocks look like as Spark rows: schemas, Arrow conversion, and how they are placed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

if TYPE_CHECKING:
    pass

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
    """Rows as dictionaries; binary values as buffers of the table, not copies."""
    columns = [_values(table.column(name)) for name in table.schema.names]
    return [dict(zip(table.schema.names, row, strict=True)) for row in zip(*columns, strict=True)]


def _values(column: pa.Array | pa.ChunkedArray) -> list[Any]:
    if not pa.types.is_binary(column.type):
        return column.to_pylist()
    values: list[Any] = []
    for chunk in column.chunks if isinstance(column, pa.ChunkedArray) else [column]:
        # Slices of the chunk's own buffer: a scalar of it (`chunk[i].as_buffer()`) is a copy.
        _, ends, data = chunk.buffers()
        data = data or pa.py_buffer(b"")  # may be absent where every value is empty
        bounds = np.frombuffer(ends, np.int32)[chunk.offset :][: len(chunk) + 1].tolist()
        valid = chunk.is_valid().to_pylist()
        values += [
            data.slice(first, last - first) if there else None
            for (first, last), there in zip(pairwise(bounds), valid, strict=True)
        ]
    return values


def binary_table(rows: Iterable[Mapping[str, Any]], **kinds: pa.DataType) -> pa.Table:
    """An Arrow table of such rows; columns are binary unless `_KINDS` or `kinds` says otherwise.

    The column order is that of the first row, and must be the schema's: Spark takes the columns
    of `mapInArrow` by position.
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
    """A binary column from buffers; a single value is wrapped without a copy."""
    if len(values) == 1 and values[0] is not None:
        return one_binary(values[0])
    return pa.array([None if v is None else bytes(v) for v in values], type=pa.binary())


def one_binary(value: Any) -> pa.Array:
    """A column of one binary value that stands on the given buffer."""
    data = pa.py_buffer(value)
    offsets = pa.py_buffer(np.array([0, data.size], np.int32))
    return pa.Array.from_buffers(pa.binary(), 1, [None, offsets, data])


def pieces_table(rows: Iterable[Mapping[str, Any]], **kinds: pa.DataType) -> pa.Table:
    """The same as `binary_table`, but of one batch a row, so that nothing is copied and the JVM
    holds no more than a row at a time."""
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
    """The reverse: array<float> values of equal length as a float32 (n, rank) matrix."""
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    if isinstance(column, pa.ChunkedArray):  # pyarrow keeps an empty chunked array chunked
        return np.zeros((0, rank), np.float32)
    return column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), rank)


def vectors_of(column: pa.Array, rank: int) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """A column array<float> as float32 (n, rank), zeros where it is null, and where it is not.

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
    """The Arrow types of a schema, for `spark.pieces_table`."""
    return {name: _TYPES[kind] for name, kind in (each.split() for each in schema.split(", "))}


def _table_of(schema: str, rows: list[dict[str, Any]]) -> pa.Table:
    """Rows of a schema, also none."""
    kinds = _arrow_kinds(schema)
    return pieces_table(rows, **kinds) if rows else pa.schema(kinds).empty_table()


def _mapped(
    function: Callable[[dict[str, Any]], Iterator[dict[str, Any]]],
    schema: str,
    one_batch: bool = False,
) -> Callable[[Iterable[pa.RecordBatch]], Iterable[pa.RecordBatch]]:
    """For `mapInArrow`: a function that makes rows of a schema from one row; `one_batch` where they
    are many and small."""

    def apply(batches: Iterable[pa.RecordBatch]) -> Iterable[pa.RecordBatch]:
        for batch in batches:
            for row in arrays_of(batch):
                table = _table_of(schema, list(function(row)))
                yield from (table.combine_chunks() if one_batch else table).to_batches()

    return apply
