"""Checks a published model's certificate independently of the jobs that wrote it.

The audit reads ratings, factors, ledger, tombstones and receipts at the versions that the models
row names. It computes every row's residual ||A x - b|| / max(||b||, floor) in float64 from the
ratings table and the factor tables. It uses neither the packed ratings nor the code of the solvers
and the ledger, so a mistake there cannot hide itself here. The floors come from the certificate.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pyspark.sql import functions as F

from unlearn_spark.audit.equations import ABSOLUTE_SLACK, OTHER, RELATIVE_SLACK, Equations
from unlearn_spark.spark import factors, ratings
from unlearn_spark.spark.arrow import vectors_of
from unlearn_spark.spark.requests import with_requests
from unlearn_spark.tables import requests
from unlearn_spark.tables.audits import Audit

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

    from unlearn_spark.tables.delta_spark import SparkStore
    from unlearn_spark.tables.models import ModelVersion

_ROW_SCHEMA = "id string, copies int, n_ratings bigint, unmatched bigint, residual double"


def audit(store: SparkStore, model: ModelVersion) -> Audit:
    """Scan a published version, the newest or an earlier one; write nothing.

    Workers stream the ratings of a row. The scan shuffles all ratings twice, each with a vector.

    Raises
    ------
    InputError
        The model names no ratings, so there is nothing to check it against.
    """
    retained = ratings.fitted(store, model)
    stored = ratings.read(store, model.ratings_version).where(
        F.col("ingest_id") <= (model.ratings_ingest_id or 0)
    )
    usable = dict(zip(OTHER, factors.read_factors(store, model), strict=True))
    usable = {side: _usable(rows, model.als.rank) for side, rows in usable.items()}
    scanned = [_residuals(retained, usable, side, model) for side in OTHER]
    ledger = store.read(factors.LEDGER, model.ledger_version)
    found = _compare(scanned[0].unionByName(scanned[1]), ledger)

    def of_side(name: str, empty: Any) -> dict[str, Any]:
        return {side: found.get(side, {}).get(name) or empty for side in OTHER}

    def total(name: str) -> int:
        return sum(int(counts[name] or 0) for counts in found.values())

    return Audit(
        model_version=model.model_version,
        tau=float(model.certificate["tau"]),
        max_residual=of_side("max_residual", 0.0),
        floor=model.floors,
        rows=of_side("rows", 0),
        ledger_below=total("ledger_below"),
        ledger_missing=total("ledger_missing"),
        ledger_extra=total("ledger_extra"),
        tombstoned_ratings_found=_tombstoned(store, model, stored),
        rows_without_ratings=total("rows_without_ratings"),
        # Both scans see every rating with both of its rows: count it in one of them.
        ratings_without_rows=of_side("unmatched", 0)["user"],
    )


def _tombstoned(store: SparkStore, model: ModelVersion, stored: DataFrame) -> int:
    """How many stored ratings a request with a receipt covers."""
    if model.receipts_version is None or model.tombstones_version is None:
        return 0
    every = requests.asked(store, model.tombstones_version, model.receipts_version)
    honoured = every.filter(pc.invert(every["pending"]))
    marked = with_requests(stored, requests.rules(honoured, guard=True))
    return marked.where(F.size("request_ids") > 0).count()


def _usable(rows: DataFrame, rank: int) -> DataFrame:
    """id and vector array<float>, which is null if the stored vector's length is not rank."""
    return rows.select("id", F.when(F.size("factors") == rank, F.col("factors")).alias("vector"))


def _residuals(
    retained: DataFrame, usable: dict[str, DataFrame], side: str, model: ModelVersion
) -> DataFrame:
    """Residuals (side and `_ROW_SCHEMA`) of one side's factor rows, and of rated ids without one.

    `copies` counts the id's factor rows, `unmatched` its ratings whose user or item has no usable
    row.
    """
    als = model.als
    others = usable[OTHER[side]].withColumnRenamed("id", f"{OTHER[side]}_id")
    rated = retained.join(others, f"{OTHER[side]}_id", "left").select(
        F.col(f"{side}_id").alias("id"), F.lit(True).alias("is_rating"), "rating", "vector"
    )
    own = usable[side].select(
        "id",
        F.lit(False).alias("is_rating"),
        F.lit(None).cast("float").alias("rating"),
        "vector",
    )
    # Sorted, a row's own vector comes first and its ratings follow: a worker streams them.
    records = (
        own.unionByName(rated)
        .withColumn("id", F.col("id").cast("string"))
        .repartition("id")
        .sortWithinPartitions("id", "is_rating")
    )
    gram = _gram(usable[OTHER[side]], als.rank) if als.implicit_prefs else None
    stream = Stream(als.rank, Equations.of(als, gram, model.floors[side]))
    return records.mapInArrow(stream.scan, _ROW_SCHEMA).withColumn("side", F.lit(side))


def _gram(rows: DataFrame, rank: int) -> NDArray[np.float64]:
    """Y'Y of factor rows, float64 (rank, rank); only partial sums reach the driver."""

    def add_up(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        total = np.zeros((rank, rank))
        for batch in batches:
            part = vectors_of(batch.column("vector"), rank)[0].astype(np.float64)
            total += part.T @ part
        yield pa.RecordBatch.from_arrays([pa.array([total.tobytes()], pa.binary())], ["gram"])

    partial = rows.select("vector").mapInArrow(add_up, "gram binary").collect()
    total = np.zeros((rank, rank))
    for row in partial:
        total += np.frombuffer(row["gram"]).reshape(rank, rank)
    return total


def _compare(scanned: DataFrame, ledger: DataFrame) -> dict[str, dict[str, Any]]:
    """The scan's figures by side, and how its residuals compare with the ledger's bounds."""
    entries = ledger.groupBy("side", "id").agg(
        F.count(F.lit(1)).alias("entries"), F.min("bound").alias("bound")
    )
    rows, kept = F.coalesce("copies", F.lit(0)), F.coalesce("entries", F.lit(0))
    enough = F.col("bound") * (1 + RELATIVE_SLACK) + ABSOLUTE_SLACK >= F.col("residual")
    enough = F.coalesce(enough & ~F.isnan("bound"), F.lit(False))
    counted = {
        "ledger_below": ((rows > 0) & (kept > 0) & ~enough).cast("int"),
        "ledger_missing": F.greatest(rows - kept, F.lit(0)),
        "ledger_extra": F.greatest(kept - rows, F.lit(0)),
        "rows_without_ratings": ((rows > 0) & (F.col("n_ratings") == 0)).cast("int"),
        "unmatched": F.col("unmatched"),
        "rows": rows,
    }
    figures = (
        scanned.join(entries, ["side", "id"], "full_outer")
        .groupBy("side")
        .agg(
            F.max(F.when(rows > 0, F.col("residual"))).alias("max_residual"),
            *[F.sum(column).alias(name) for name, column in counted.items()],
        )
    )
    return {row["side"]: row.asDict() for row in figures.collect()}


@dataclass
class _Row:
    """Running sums of one row while its ratings are streamed.

    Attributes
    ----------
    gradient, b : float64 (rank,)
        A x - b without the penalty and the global term, and b.
    penalised
        The number of ratings that multiplies lambda.
    """

    id: str
    gradient: NDArray[np.float64]
    b: NDArray[np.float64]
    x: NDArray[np.float64] | None = None
    copies: int = 0
    n_ratings: int = 0
    unmatched: int = 0
    penalised: int = 0


@dataclass(frozen=True)
class Stream:
    """Computes the residuals of the rows of one side from a stream of records."""

    rank: int
    equations: Equations

    def scan(self, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """Compute one result per id from records that are sorted by (id, is_rating).

        Parameters
        ----------
        batches
            id string; is_rating; rating float; vector array<float>: for a rating, the other side's
            row, else the row itself; null if there is none. An id's records may span batches.

        Returns
        -------
        Batches of `_ROW_SCHEMA`.
        """
        row: _Row | None = None
        for batch in batches:
            ids = batch.column("id").to_numpy(zero_copy_only=False)
            is_rating = batch.column("is_rating").to_numpy(zero_copy_only=False)
            values = batch.column("rating").to_numpy(zero_copy_only=False)
            vectors, valid = vectors_of(batch.column("vector"), self.rank)
            cuts = [0, *(np.flatnonzero(ids[1:] != ids[:-1]) + 1), len(ids)]
            done: list[_Row] = []
            for first, last in pairwise(cuts):
                if first == last:  # an empty batch
                    continue
                if row is None or row.id != ids[first]:
                    if row is not None:
                        done.append(row)
                    row = _Row(ids[first], np.zeros(self.rank), np.zeros(self.rank))
                split = first + int(np.count_nonzero(~is_rating[first:last]))
                if split > first:
                    row.copies += split - first
                    row.x = vectors[first].astype(np.float64) if valid[first] else None
                part = slice(split, last)
                self._add(row, values[part], vectors[part], valid[part])
            if done:
                yield self._results(done)
        if row is not None:
            yield self._results([row])

    def _add(
        self,
        row: _Row,
        values: NDArray[np.float32],
        vectors: NDArray[np.float32],
        valid: NDArray[np.bool_],
    ) -> None:
        """Add some ratings of a row to its sums; `vectors` are float32 (n, rank)."""
        row.n_ratings += len(values)
        if row.x is None:
            row.unmatched += len(values)
            return
        row.unmatched += int(np.count_nonzero(~valid))
        r = values[valid].astype(np.float64)
        y = vectors[valid].astype(np.float64)
        gradient, wanted, penalised = self.equations.terms(r, y @ row.x)
        row.gradient += y.T @ gradient
        row.b += y.T @ wanted
        row.penalised += int(np.count_nonzero(penalised))

    def residual(self, row: _Row) -> float:
        """`Equations.residuals` of one row; infinite if x is not usable."""
        if row.x is None or row.copies != 1:
            return math.inf
        one = np.array([row.penalised], np.float64)
        found = self.equations.residuals(row.x[None], row.gradient[None], row.b[None], one)
        return float(found[0])

    def _results(self, rows: list[_Row]) -> pa.RecordBatch:
        return pa.RecordBatch.from_arrays(
            [
                pa.array([row.id for row in rows], pa.string()),
                pa.array([row.copies for row in rows], pa.int32()),
                pa.array([row.n_ratings for row in rows], pa.int64()),
                pa.array([row.unmatched for row in rows], pa.int64()),
                pa.array([self.residual(row) for row in rows], pa.float64()),
            ],
            ["id", "copies", "n_ratings", "unmatched", "residual"],
        )
