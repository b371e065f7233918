"""Scores (user, item) pairs, and finds the n best candidates of every query row.

`top_n` packs both sides into blocks of bounded size. For each pair of blocks one task computes a
matrix product and keeps the n best of every query. So neither side has to fit into a task.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyspark.sql import functions as F
from pyspark.sql.pandas.types import to_arrow_schema
from pyspark.sql.types import (
    ArrayType,
    DataType,
    FloatType,
    NumericType,
    StringType,
    StructField,
    StructType,
)

from unlearn_spark.core.ranking import best
from unlearn_spark.errors import InputError
from unlearn_spark.spark.arrow import arrays_of, binary_table, matrix_of
from unlearn_spark.spark.placement import balanced_keys
from unlearn_spark.spark.sql import block_of
from unlearn_spark.tables.delta_spark import quoted

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame

QUERY_ROWS = 4096
"""Query rows in a block."""

CANDIDATES_PER_QUERY_ROW = 8
"""Rows of a candidate block per row of a query block; more than 1, because merging partial lists
costs more than multiplying."""

BLOCK_BYTES = 64 << 20
"""Largest size of a block's factors; bounds its rows at high ranks."""

MAX_PARTITIONS = 4096

_BLOCK_SCHEMA = "block int, ids binary, factors binary"


def top_n(
    queries: DataFrame,
    candidates: DataFrame,
    n: int,
    exclude: DataFrame | None = None,
    *,
    query_rows: int = QUERY_ROWS,
) -> DataFrame:
    """Find the n candidates with the largest scalar products for every query.

    Parameters
    ----------
    queries, candidates
        id (distinct, of any orderable type), factors array<float> of one length.
    n
        At least 1.
    exclude
        query_id, candidate_id: pairs that must not be chosen, for example existing ratings. Ids
        may be unknown to `queries` and `candidates`.
    query_rows
        Query rows in a block.

    Returns
    -------
    DataFrame
        id, recommendations array<struct<id, rating float>> by falling rating, equal ones by id.
        Every query has a row. Its array is shorter than n if fewer candidates are left.

    Raises
    ------
    InputError
        n is below 1.
    """
    if n < 1:
        raise InputError(f"{n} recommendations were asked for; ask for 1 or more")
    types = {"id": queries.schema["id"].dataType, "candidate": candidates.schema["id"].dataType}
    result = _result_type(types["id"], types["candidate"])
    shape = to_arrow_schema(result)
    queries, candidates = queries.select("id", "factors"), candidates.select("id", "factors")
    sizes = candidates.agg(F.count(F.lit(1)), F.max(F.size("factors"))).first()
    assert sizes is not None
    n_queries, n_candidates = queries.count(), int(sizes[0])
    if n_candidates == 0 or n_queries == 0:
        empty = F.array().cast(result["recommendations"].dataType)
        return queries.select("id", empty.alias("recommendations"))
    limit = max(1, BLOCK_BYTES // (4 * max(1, int(sizes[1]))))
    n_query_blocks = -(-n_queries // min(query_rows, limit))
    n_blocks = -(-n_candidates // min(query_rows * CANDIDATES_PER_QUERY_ROW, limit))

    messages = _paired(queries, n_query_blocks, n_blocks, is_query=True).unionByName(
        _paired(candidates, n_blocks, n_query_blocks, is_query=False)
    )
    if exclude is None:
        parts = (
            _placed(messages, n_query_blocks, n_blocks)
            .groupBy("key")
            .applyInArrow(_block_scorer(n, shape), result)
        )
    else:
        pairs = exclude.select(
            _exactly("query_id", types["id"]), _exactly("candidate_id", types["candidate"])
        ).dropna()
        if n_query_blocks == 1:
            # The queries are few: do not shuffle everybody's pairs.
            asked = queries.select(F.col("id").alias("query_id"))
            pairs = pairs.join(F.broadcast(asked), "query_id", "left_semi")
        pairs = pairs.withColumns(
            {
                "query_block": block_of("query_id", n_query_blocks),
                "block": block_of("candidate_id", n_blocks),
            }
        )
        parts = (
            _placed(messages, n_query_blocks, n_blocks)
            .groupBy("key")
            .cogroup(_placed(pairs, n_query_blocks, n_blocks).groupBy("key"))
            .applyInArrow(_excluding_block_scorer(n, shape), result)
        )
    return parts if n_blocks == 1 else _merged(parts, n, result)


def _exactly(column: str, kind: DataType) -> Column:
    """A column cast to this type; null where the cast changes the value."""
    value = F.col(column).try_cast(kind)
    return F.when(value == F.col(column), value).alias(column)


def _result_type(query_type: DataType, candidate_type: DataType) -> StructType:
    one = StructType([StructField("id", candidate_type), StructField("rating", FloatType())])
    return StructType(
        [StructField("id", query_type), StructField("recommendations", ArrayType(one))]
    )


def _packed(rows: DataFrame, n_blocks: int) -> DataFrame:
    """Rows packed into blocks (`_BLOCK_SCHEMA`), in each by rising id."""

    def pack(table: pa.Table) -> pa.Table:
        table = table.sort_by("id").combine_chunks()
        rank = len(table["factors"][0])
        return binary_table(
            [
                {
                    "block": table["block"][0].as_py(),
                    "ids": _to_bytes(table.select(["id"])),
                    "factors": np.ascontiguousarray(
                        matrix_of(table["factors"], rank), np.float32
                    ).data.cast("B"),
                }
            ],
            block=pa.int32(),
        )

    blocks = rows.withColumn("block", block_of("id", n_blocks))
    return blocks.groupBy("block").applyInArrow(pack, _BLOCK_SCHEMA)


def _paired(rows: DataFrame, n_blocks: int, n_others: int, *, is_query: bool) -> DataFrame:
    """The blocks of one side, each repeated for every block of the other."""
    own, other = ("query_block", "block") if is_query else ("block", "query_block")
    packed = _packed(rows, n_blocks).withColumnRenamed("block", own)
    others = F.explode(F.sequence(F.lit(0), F.lit(n_others - 1)))
    return packed.select(
        "*",
        F.lit(is_query).alias("is_query"),
        others.alias(other) if n_others > 1 else F.lit(0).alias(other),
    )


def _placed(rows: DataFrame, n_query_blocks: int, n_blocks: int) -> DataFrame:
    """Rows keyed by their pair of blocks, with one partition per pair up to `MAX_PARTITIONS`."""
    pairs = n_query_blocks * n_blocks
    pair = F.col("query_block") * F.lit(n_blocks) + F.col("block")
    if pairs <= 512:
        keys = F.array(*[F.lit(key) for key in balanced_keys(pairs)])
        pair = F.element_at(keys, pair + 1)
    keyed = rows.withColumn("key", pair).drop("query_block", "block")
    return keyed.repartition(min(pairs, MAX_PARTITIONS), "key")


def _block_scorer(n: int, result: pa.Schema) -> Callable[[pa.Table], pa.Table]:
    def score(messages: pa.Table) -> pa.Table:
        return _scored(messages, None, n, result)

    return score


def _excluding_block_scorer(n: int, result: pa.Schema) -> Callable[[pa.Table, pa.Table], pa.Table]:
    def score(messages: pa.Table, pairs: pa.Table) -> pa.Table:
        return _scored(messages, pairs, n, result)

    return score


def _scored(messages: pa.Table, pairs: pa.Table | None, n: int, result: pa.Schema) -> pa.Table:
    """The n best candidates of one candidate block for every query of one query block."""
    one = result.field("recommendations").type.value_type
    sides = {
        True: (pa.array([], result.field("id").type), np.zeros((0, 1), np.float32)),
        False: (pa.array([], one.field("id").type), np.zeros((0, 1), np.float32)),
    }
    # If no id hashes to a block, its message is missing.
    for message in arrays_of(messages.select(["is_query", "ids", "factors"])):
        ids = _from_bytes(message["ids"])
        factors = np.frombuffer(message["factors"], np.float32)
        sides[message["is_query"]] = (ids, factors.reshape(len(ids), -1))
    (query_ids, queries), (candidate_ids, candidates) = sides[True], sides[False]
    excluded = None
    if pairs is not None and pairs.num_rows:
        rows = pc.index_in(pairs["query_id"].combine_chunks(), query_ids)
        columns = pc.index_in(pairs["candidate_id"].combine_chunks(), candidate_ids)
        known = pc.and_(rows.is_valid(), columns.is_valid())
        excluded = (rows.filter(known).to_numpy(), columns.filter(known).to_numpy())
    counts, chosen, scores = best(queries, candidates, n, excluded)
    offsets = np.zeros(len(counts) + 1, np.int32)
    np.cumsum(counts, out=offsets[1:])
    named = pa.StructArray.from_arrays(
        [candidate_ids.take(pa.array(chosen)).cast(one.field("id").type), pa.array(scores)],
        fields=list(one),
    )
    lists = pa.ListArray.from_arrays(
        pa.array(offsets), named, type=result.field("recommendations").type
    )
    return pa.table([query_ids.cast(result.field("id").type), lists], schema=result)


def _merged(parts: DataFrame, n: int, result: StructType) -> DataFrame:
    """The n best of every query's partial lists."""
    one = result["recommendations"].dataType.elementType  # type: ignore[attr-defined]
    # Spark's own order of structs sorts by (-rating, id); a comparator would be interpreted.
    falling = F.transform(
        "recommendations",
        lambda entry: F.struct((-entry["rating"]).alias("falling"), entry["id"].alias("id")),
    )
    merged = F.slice(F.sort_array(F.flatten(F.collect_list(falling))), 1, n)
    rising = F.transform(
        merged,
        lambda entry: F.struct(entry["id"].alias("id"), (-entry["falling"]).alias("rating")),
    )
    return parts.groupBy("id").agg(rising.cast(ArrayType(one)).alias("recommendations"))


def _to_bytes(ids: pa.Table) -> pa.Buffer:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, ids.schema) as writer:
        writer.write_table(ids)
    return sink.getvalue()


def _from_bytes(data: pa.Buffer) -> pa.Array:
    column = pa.ipc.open_stream(data).read_all()["id"].combine_chunks()
    return column


def dot_products(left: pa.Array, right: pa.Array) -> pa.Array:
    """Row-wise scalar products of two columns.

    Parameters
    ----------
    left, right : array<float> (n,)
        Lists of equal length, or null.

    Returns
    -------
    pa.Array
        float (n,); NaN where either list is null.
    """
    known = pc.and_(left.is_valid(), right.is_valid()).to_numpy(zero_copy_only=False)
    products = np.full(len(known), np.nan, np.float32)
    if known.any():
        mask = pa.array(known)
        flat = left.filter(mask).flatten().to_numpy(zero_copy_only=False)
        x = flat.reshape(int(known.sum()), -1)
        y = right.filter(mask).flatten().to_numpy(zero_copy_only=False).reshape(x.shape)
        products[known] = np.einsum("ij,ij->i", x, y)
    return pa.array(products)


def predict_pairs(
    pairs: DataFrame,
    user_factors: DataFrame,
    item_factors: DataFrame,
    *,
    user_col: str = "user_id",
    item_col: str = "item_id",
    prediction_col: str = "prediction",
    cold_start: str = "nan",
) -> DataFrame:
    """Add the predicted rating to every (user, item) row.

    Parameters
    ----------
    pairs
        Any columns, among them the two ids.
    user_factors, item_factors
        id, factors array<float>.
    cold_start
        What to do with rows whose user or item the model does not know: `nan` or `drop`.

    Returns
    -------
    DataFrame
        The columns of `pairs` and `prediction_col` (float).

    Raises
    ------
    InputError
        An id column is missing, the prediction column exists already, the model's ids are of
        another kind, or `cold_start` is neither of the two.
    """
    if cold_start not in ("nan", "drop"):
        raise InputError(f"cold start strategy {cold_start!r} is unknown; use 'nan' or 'drop'")
    if prediction_col in pairs.columns:
        raise InputError(f"column {prediction_col} exists already; name another for predictions")
    require_ids(pairs, user_col, user_factors)
    require_ids(pairs, item_col, item_factors)
    how = "left" if cold_start == "nan" else "inner"
    joined = pairs
    for side, column, factors in (
        ("user", user_col, user_factors),
        ("item", item_col, item_factors),
    ):
        renamed = factors.select(
            F.col("id").alias(f"__{side}_id"), F.col("factors").alias(f"__{side}_factors")
        )
        joined = joined.join(renamed, F.col(quoted(column)) == F.col(f"__{side}_id"), how)
    # pyspark reads the kind of function from its annotations, which its own stubs do not know.
    dot = F.arrow_udf(dot_products, FloatType())  # type: ignore[call-overload]
    kept = [F.col(quoted(name)) for name in pairs.columns]
    product = dot("__user_factors", "__item_factors").alias(prediction_col)
    return joined.select(*kept, product)


def require_ids(frame: DataFrame, column: str, factors: DataFrame) -> None:
    """Check that a column exists and that its ids can match a model's.

    Raises
    ------
    InputError
        The column is missing, or one of the two has numbers and the other has text.
    """
    if column not in frame.columns:
        raise InputError(f"column {column} is missing; there are {', '.join(frame.columns)}")
    found, known = frame.schema[column].dataType, factors.schema["id"].dataType
    for one, other in ((found, known), (known, found)):
        if isinstance(one, StringType) and isinstance(other, NumericType):
            raise InputError(
                f"column {column} is {found.simpleString()} and the model's ids are "
                f"{known.simpleString()}; cast the column"
            )
