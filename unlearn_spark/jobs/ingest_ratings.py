"""Read ratings into the ratings table: bad rows are quarantined, the newest of a pair is kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from unlearn_spark.cli import job
from unlearn_spark.ingestion import rules
from unlearn_spark.recommender import Recommender


@job("Ingest ratings.")
@click.option("--input", "path", required=True, metavar="PATH", help="File, folder or glob.")
@click.option(
    "--format",
    required=True,
    type=click.Choice(rules.FORMATS, case_sensitive=False),
    help="What the input is.",
)
@click.option(
    "--columns",
    metavar="PART=COLUMN,...",
    help="Columns of csv, parquet and delta that are named otherwise, as user_id=uid,item_id=iid.",
)
def main(
    recommender: Recommender, path: str, format: str, columns: str | None
) -> Mapping[str, Any]:
    """Times are ISO 8601 or seconds since 1970, UTC."""
    return recommender.ingest_ratings(path, format, rules.parse_columns(columns))
