"""The engine for what one machine cannot hold, for catalogs, and for sessions that run already."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from pyspark.sql import functions as F

from unlearn_spark import adoption, publishing
from unlearn_spark.core.blocks import SIDES
from unlearn_spark.core.training import Progress
from unlearn_spark.errors import InputError
from unlearn_spark.spark import factors, ratings
from unlearn_spark.spark.session import get_spark
from unlearn_spark.tables import models, recommendations, tombstones
from unlearn_spark.tables.delta_spark import SparkStore

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from pyspark.sql import DataFrame, SparkSession

    from unlearn_spark.config import Settings
    from unlearn_spark.core.training import TrainingSummary
    from unlearn_spark.ingestion.rules import IngestReport, TombstoneReport
    from unlearn_spark.publishing import Basis
    from unlearn_spark.tables.audits import Audit
    from unlearn_spark.tables.models import ModelVersion


class SparkEngine:
    """Works in a Spark session, which opens on first use; see `engine.Engine`."""

    name = "spark"

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    @cached_property
    def spark(self) -> SparkSession:
        """The session."""
        return get_spark(self.settings)

    @cached_property
    def store(self) -> SparkStore:
        return SparkStore(self.spark, root=self.settings.root, catalog=self.settings.catalog)

    def ingest_ratings(self, source: Any, format: str, columns: Mapping[str, str]) -> IngestReport:
        from unlearn_spark.spark.ingest.formats import read_ratings
        from unlearn_spark.spark.ingest.ratings import ingest_ratings

        return ingest_ratings(self.store, read_ratings(self.spark, source, format, columns))

    def ingest_requests(self, source: Any, format: str | None) -> TombstoneReport:
        from unlearn_spark.spark.ingest.requests import ingest_requests

        return ingest_requests(self.store, source, format, ratings.id_types(self.store))

    def train(self, progress: Progress) -> tuple[ModelVersion, TrainingSummary]:
        from unlearn_spark.spark.training.training import fit_factors
        from unlearn_spark.spark.training.writes import write_fit

        store, als = self.store, self.settings.als
        basis = publishing.basis(store)
        warm = None
        if als.warm_start is not None:
            wanted = None if als.warm_start == "latest" else int(als.warm_start)
            warm = factors.read_factors(store, models.published(store, wanted))
        fitted = fit_factors(
            self._retained(basis).select("user_id", "item_id", "rating"),
            als,
            self.settings.execution,
            warm_start=warm,
            on_sweep=lambda report: progress(report.line()),
        )
        version = publishing.publish_fit(
            store,
            fitted.fit,
            write_fit(store, fitted),
            als,
            kind="train",
            basis=basis,
            ratings_ingest_id=ratings.newest_ingest(store, basis.ratings_version),
        )
        fitted.release()
        return version, fitted.summary

    def import_factors(
        self, path: str, format: str, converge: bool, progress: Progress
    ) -> dict[str, Any]:
        from unlearn_spark.spark.ingest.factors import read_factors
        from unlearn_spark.spark.training.adoption import adopt_factors
        from unlearn_spark.spark.training.writes import write_fit

        store, settings = self.store, self.settings
        basis = publishing.basis(store)
        stored = self._retained(basis)
        kinds = {side: stored.schema[f"{side}_id"].dataType for side in SIDES}
        given = read_factors(self.spark, path, format, kinds)
        n_rows = {"user": given.n_users, "item": given.n_items}
        als = adoption.announced(path, n_rows, given.rank, settings.als, progress)
        adopted = adopt_factors(
            stored.select("user_id", "item_id", "rating"),
            given.user,
            given.item,
            als,
            settings.execution,
            converge=converge,
            on_scan=lambda residual: progress(adoption.scan_line(residual, als)),
            on_sweep=lambda report: progress(report.line()),
        )
        tau = settings.unlearn.resolved(0.0).tau
        rows_over_tau = adopted.rows_over(tau)
        progress(adoption.verdict(adopted.summary, als, tau, rows_over_tau, converge))
        version = publishing.publish_fit(
            store,
            adopted.fit,
            write_fit(store, adopted),
            als,
            kind="import",
            basis=basis,
            ratings_ingest_id=ratings.newest_ingest(store, basis.ratings_version),
        )
        adopted.release()
        return adoption.figures(
            version.model_version,
            given.rank,
            adopted.summary,
            adopted.residual_before,
            adopted.without_factors,
            adopted.without_ratings,
            rows_over_tau,
            converge,
        )

    def run_night(self, kind: str, progress: Progress) -> dict[str, Any]:
        from unlearn_spark.spark.night.night import run_night

        return run_night(self.store, self.settings, progress, kind=kind)

    def audit(self, model: ModelVersion) -> Audit:
        from unlearn_spark.spark.audit import audit

        return audit(self.store, model)

    def prepare_comparison(
        self,
        model: ModelVersion,
        held_out: str | None,
        held_out_format: str,
        plot: str | None,
        progress: Progress,
    ) -> Callable[[int], dict[str, Any]]:
        from unlearn_spark.audit import membership, report
        from unlearn_spark.audit.comparison import compare
        from unlearn_spark.preconditions import require_picture
        from unlearn_spark.spark.comparison.comparison import SparkContestants
        from unlearn_spark.spark.comparison.deletion import find_deletion, held_out_ratings

        membership.require_sklearn()
        if plot is not None:
            require_picture(plot)
        store, execution = self.store, self.settings.execution
        deletion = find_deletion(store, model, execution.checkpoint)
        judged = None
        if held_out is not None:
            judged = held_out_ratings(store, model, held_out, held_out_format)
        else:
            progress("no --held-out ratings: quality on held-out ratings is left out")

        def comparing(seeds: int) -> dict[str, Any]:
            contestants = SparkContestants.of(store, deletion, execution, judged, progress)
            found = compare(contestants, seeds, progress)
            report.show(found, plot)
            return found.figures

        return comparing

    def recommend(
        self,
        model: ModelVersion,
        top: int,
        users: Sequence[str] | None,
        exclude_seen: bool,
        output: str | None,
        progress: Progress,
    ) -> dict[str, Any]:
        from unlearn_spark.spark import lists
        from unlearn_spark.spark.scoring import top_n

        store = self.store
        queries, candidates = factors.read_factors(store, model)
        unknown: list[str] = []
        if users is not None:
            queries, unknown = _named(queries, users, model)
            if unknown:
                progress(f"not in model version {model.model_version}: {', '.join(unknown)}")
        seen = None
        if exclude_seen:
            seen = self._seen(model)
            if seen is None:
                progress(
                    f"model version {model.model_version} names no ratings; no item counts as seen"
                )
        pairs = seen and seen.select(
            F.col("user_id").alias("query_id"), F.col("item_id").alias("candidate_id")
        )
        rows = lists.flatten(top_n(queries, candidates, top, pairs), model.model_version).persist()
        try:
            counted = rows.agg(F.count_distinct("user_id"), F.count(F.lit(1))).first()
            assert counted is not None
            if output is None:
                lists.write(store, rows)
                output = store.location(recommendations.TABLE)
            else:
                lists.export(rows, output)
        finally:
            rows.unpersist()
        return {
            "users": counted[0],
            "rows": counted[1],
            "output": output,
            **({"unknown_users": unknown} if unknown else {}),
        }

    def predict(self, model: ModelVersion, pairs: pa.Table) -> NDArray[np.float64]:
        from unlearn_spark.spark.scoring import predict_pairs

        users, items = self._factors_by_text(model)
        named = {name: pairs[name].cast(pa.string()) for name in ("user_id", "item_id")}
        rows = self.store.frame(pa.table({"place": np.arange(pairs.num_rows), **named}))
        found = predict_pairs(rows, users, items).select("place", "prediction").toArrow()
        return found.sort_by("place")["prediction"].to_numpy().astype(np.float64)

    def sample(self, n: int) -> pa.Table:
        rows = ratings.read(self.store).select("user_id", "item_id", "rating", "rated_at")
        pair = ("user_id", "item_id")
        return rows.orderBy(F.xxhash64(*pair), *pair).limit(n).toArrow()

    def evaluate(
        self,
        model: ModelVersion,
        source: Any,
        format: str,
        columns: Mapping[str, str],
        k: int,
        min_rating: float | None,
    ) -> dict[str, Any]:
        from unlearn_spark.spark.ingest.formats import explained, read_ratings
        from unlearn_spark.spark.metrics import held_out_metrics

        users, items = self._factors_by_text(model)
        pair = ["cast(user_id AS string) AS user_id", "cast(item_id AS string) AS item_id"]
        read = read_ratings(self.spark, source, format, columns)
        usable = read.frame.where("problem IS NULL").selectExpr(*pair, "float(rating) AS rating")
        seen = self._seen(model)
        seen = seen and seen.selectExpr(*pair)
        with explained(read.source, format):
            return held_out_metrics(users, items, usable, seen, k=k, min_rating=min_rating)

    def evaluate_split(
        self,
        fraction: float,
        seed: int,
        k: int,
        min_rating: float | None,
        progress: Progress,
    ) -> dict[str, Any]:
        from unlearn_spark.spark.metrics import held_out_metrics, split_by_hash
        from unlearn_spark.spark.training.training import fit_factors

        table = self._retained(publishing.basis(self.store)).select("user_id", "item_id", "rating")
        train, held_out = split_by_hash(table, fraction, seed)
        result = fit_factors(
            train,
            self.settings.als,
            self.settings.execution,
            on_sweep=lambda report: progress(report.line()),
        )
        try:
            metrics = held_out_metrics(
                result.user_factors,
                result.item_factors,
                held_out,
                train,
                k=k,
                min_rating=min_rating,
            )
        finally:
            result.release()
        summary = result.summary
        return {
            **metrics,
            "ratings_fitted": summary.ratings,
            "sweeps": summary.sweeps,
            "max_residual": summary.max_residual,
        }

    def _retained(self, basis: Basis) -> DataFrame:
        """The ratings that a new model may learn from."""
        return ratings.retained(
            self.store, basis.ratings_version, basis.tombstones_version, basis.receipts_version
        )

    def _factors_by_text(self, model: ModelVersion) -> tuple[DataFrame, DataFrame]:
        """User and item factors with ids as text: to cast other ids to the model's type would turn
        unknown ones into null."""
        users, items = (
            rows.withColumn("id", rows["id"].cast("string"))
            for rows in factors.read_factors(self.store, model)
        )
        return users, items

    def _seen(self, model: ModelVersion) -> DataFrame | None:
        """The ratings that the model was fitted to; None where it names none.

        A rating that a request covers does not count as seen: its item may be recommended.
        """
        if model.ratings_version is None:
            return None
        newest = tombstones.version(self.store)
        return ratings.retained(self.store, model.ratings_version, newest, model.receipts_version)


def _named(
    rows: DataFrame, users: Sequence[str], model: ModelVersion
) -> tuple[DataFrame, list[str]]:
    """The factor rows of the named users, and the names that have none."""
    name = F.col("id").cast("string")
    asked = rows.where(name.isin(list(users))).persist()
    found = {row["name"] for row in asked.select(name.alias("name")).collect()}
    if not found:
        raise InputError(
            f"--users {','.join(users)}: none is in model version {model.model_version}; "
            "name users that have ratings"
        )
    return asked, [user for user in users if user not in found]
