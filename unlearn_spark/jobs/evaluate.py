"""Measure held-out quality: of a published model on a file, or of settings on a split."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from unlearn_spark.cli import job
from unlearn_spark.ingestion import rules
from unlearn_spark.recommender import Recommender


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
    recommender: Recommender,
    path: str | None,
    form: str,
    columns: str | None,
    model_version: int | None,
    split: float | None,
    split_seed: int,
    k: int,
    min_rating: float | None,
) -> Mapping[str, Any]:
    """RMSE and MAE are over held-out pairs whose user and item the model knows (ratings_known).
    Rankings leave out what the user has rated in training, and are means over users with a
    relevant held-out item; a user that the model does not know counts with 0."""
    return recommender.evaluate(
        path,
        form,
        rules.parse_columns(columns),
        model_version=model_version,
        split=split,
        split_seed=split_seed,
        k=k,
        min_rating=min_rating,
    )
