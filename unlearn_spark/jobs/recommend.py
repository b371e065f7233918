"""List the best items of every user, or of some, by a published model."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from typing import Any

import click

from unlearn_spark.cli import job
from unlearn_spark.recommender import Recommender


@job("Recommend items by a published model.")
@click.option("--top", type=click.IntRange(min=1), required=True, help="Items for each user.")
@click.option(
    "--users",
    metavar="ID,ID,...",
    help='Only these users; as in CSV, an id with a comma or quote is quoted: 7,"a,b".  '
    "[default: all]",
)
@click.option("--model-version", type=int, help="A published version.  [default: the newest]")
@click.option(
    "--exclude-seen/--include-seen",
    default=True,
    show_default=True,
    help="Leave out items that the user has a rating of, among those that the model knows.",
)
@click.option(
    "--output",
    metavar="PATH",
    help="Directory to write: x.csv, x.parquet, or else Delta.  [default: table recommendations]",
)
def main(
    recommender: Recommender,
    top: int,
    users: str | None,
    model_version: int | None,
    exclude_seen: bool,
    output: str | None,
) -> Mapping[str, Any]:
    """The last line on stdout is one JSON object: users, rows, model_version, output."""
    named = None
    if users is not None:
        lines = csv.reader(io.StringIO(users, newline=""), skipinitialspace=True)
        named = [name.strip() for line in lines for name in line if name.strip()]
    return recommender.recommend(top, named, model_version, exclude_seen, output)
