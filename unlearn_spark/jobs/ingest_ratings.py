"""Read ratings into the ratings table: bad rows are quarantined, the newest of a pair is kept."""

from __future__ import annotations

from typing import Any

import click

from unlearn_spark.cli import JobContext, job, progress
from unlearn_spark.ingestion import formats
from unlearn_spark.ingestion.ratings import ingest_ratings


@job("Ingest ratings.")
@click.option("--input", "path", required=True, metavar="PATH", help="File, folder or glob.")
@click.option(
    "--format",
    required=True,
    type=click.Choice(formats.FORMATS, case_sensitive=False),
    help="What the input is.",
)
@click.option(
    "--columns",
    metavar="PART=COLUMN,...",
    help="Columns of csv, parquet and delta that are named otherwise, as user_id=uid,item_id=iid.",
)
def main(context: JobContext, path: str, format: str, columns: str | None) -> dict[str, Any]:
    """Times are ISO 8601 or seconds since 1970, UTC."""
    named = formats.parse_columns(columns)
    formats.check_exists(path)
    store = context.store
    raw = formats.read_ratings(context.spark, path, format, named)
    report = ingest_ratings(store, raw)
    progress(
        f"{path}: {report.read} ratings read, {report.written} written, "
        f"{report.superseded} superseded, {report.quarantined} quarantined"
    )
    return {
        "ratings_read": report.read,
        "ratings_written": report.written,
        "superseded": report.superseded,
        "quarantined": report.quarantined,
        "ratings_version": report.version,
    }
