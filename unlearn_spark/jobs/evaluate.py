"""Measure held-out quality: of a published model on a file, or of settings on a split."""

from __future__ import annotations

from typing import Any

import click

from unlearn_spark.cli import JobContext, job, progress


@job("Measure held-out errors and ranking quality.")
@click.option("--input", "path", metavar="F", help="Held-out ratings, for a published model.")
@click.option("--format", "form", default="csv", show_default=True, help="Of --input.")
@click.option("--columns", metavar="PART=COLUMN,...", help="Of --input, as user_id=uid.")
@click.option("--model-version", type=int, help="A published version.  [default: the newest]")
@click.option(
    "--split",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    metavar="FRACTION",
    help="Instead of --input: hold out this share of the ratings table, and fit the rest with the "
    "settings. Nothing is published.",
)
@click.option("--split-seed", type=int, default=0, show_default=True, help="Which pairs.")
@click.option(
    "--k", type=click.IntRange(min=1), default=10, show_default=True, help="Places that count."
)
@click.option(
    "--min-rating",
    type=float,
    metavar="R",
    help="Held-out ratings from R up are relevant to rankings.  [default: all]",
)
def main(
    context: JobContext,
    path: str | None,
    form: str,
    columns: str | None,
    model_version: int | None,
    split: float | None,
    split_seed: int,
    k: int,
    min_rating: float | None,
) -> dict[str, Any]:
    """RMSE and MAE are over held-out pairs whose user and item the model knows (ratings_known).
    Rankings leave out what the user has rated in training, and are means over users with a
    relevant held-out item; a user that the model does not know counts with 0."""
    from unlearn_spark.errors import SettingsError

    if (path is None) == (split is None):
        raise SettingsError("give exactly one of --input and --split")
    if split is not None and model_version is not None:
        raise SettingsError("--split fits a model of its own; leave out --model-version")
    if path is not None:
        return of_published(context, path, form, columns, model_version, k, min_rating)
    assert split is not None
    return of_split(context, split, split_seed, k, min_rating)


def of_published(
    context: JobContext,
    path: str,
    form: str,
    columns: str | None,
    model_version: int | None,
    k: int,
    min_rating: float | None,
) -> dict[str, Any]:
    """Metrics of a published model on ratings from a file."""
    from unlearn_spark.evaluation.metrics import held_out_metrics
    from unlearn_spark.ingestion import formats
    from unlearn_spark.tables import models, ratings, tombstones

    renamed = formats.parse_columns(columns)
    store = context.store
    model = models.published(store, model_version)
    # Ids are compared as text: a cast to the model's type would turn unknown ids into null.
    users, items = (
        rows.withColumn("id", rows["id"].cast("string"))
        for rows in models.read_factors(store, model)
    )
    pair = ["cast(user_id AS string) AS user_id", "cast(item_id AS string) AS item_id"]
    read = formats.read_ratings(context.spark, path, form, renamed)
    usable = read.frame.where("problem IS NULL").selectExpr(*pair, "float(rating) AS rating")
    seen = None
    if model.ratings_version is not None:
        seen = ratings.retained(
            store, model.ratings_version, tombstones.version(store), model.receipts_version
        )
        seen = seen.selectExpr(*pair)
    with formats.explained(path, form):
        metrics = held_out_metrics(users, items, usable, seen, k=k, min_rating=min_rating)
    return {"model_version": model.model_version, **metrics}


def of_split(
    context: JobContext, fraction: float, seed: int, k: int, min_rating: float | None
) -> dict[str, Any]:
    """Metrics of a model that is fitted to one share of the ratings table, on the other share."""
    from unlearn_spark.evaluation.metrics import held_out_metrics, split_by_hash
    from unlearn_spark.spark.training.training import fit_factors
    from unlearn_spark.tables import models, ratings, tombstones

    store = context.store
    newest = models.newest(store)
    receipts_version = newest.receipts_version if newest else None
    stored = ratings.retained(store, None, tombstones.version(store), receipts_version)
    table = stored.select("user_id", "item_id", "rating")
    train, held_out = split_by_hash(table, fraction, seed)
    result = fit_factors(
        train,
        context.settings.als,
        context.settings.execution,
        on_sweep=lambda report: progress(report.line()),
    )
    try:
        metrics = held_out_metrics(
            result.user_factors, result.item_factors, held_out, train, k=k, min_rating=min_rating
        )
    finally:
        result.release()
    summary = result.summary
    return {
        "model_version": None,
        **metrics,
        "ratings_fitted": summary.ratings,
        "sweeps": summary.sweeps,
        "max_residual": summary.max_residual,
    }
