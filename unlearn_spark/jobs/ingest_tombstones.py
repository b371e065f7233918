"""Read deletion requests into the tombstones table; `jobs/unlearn.py` honours them."""

from __future__ import annotations

from typing import Any

import click

from unlearn_spark.cli import JobContext, job, progress
from unlearn_spark.ingestion import formats
from unlearn_spark.ingestion.requests import FORMATS, ingest_requests
from unlearn_spark.tables import ratings


@job("Ingest deletion requests (tombstones).")
@click.option("--input", "path", required=True, metavar="PATH", help="File, folder or glob.")
@click.option(
    "--format",
    type=click.Choice(FORMATS, case_sensitive=False),
    help="What the input is.  [default: by its suffix; a folder with a Delta log is delta]",
)
def main(context: JobContext, path: str, format: str | None) -> dict[str, Any]:
    """Columns: request_id, scope, user_id, item_id, from_ts, to_ts, requested_at.

    Scopes: user, item, rating (one pair), window (a user's ratings in [from_ts, to_ts)), reinstate
    (lifts the earlier requests of a user_id or item_id). A request without requested_at is made
    now.
    """
    formats.check_exists(path)
    store = context.store
    report = ingest_requests(store, path, format, ratings.id_types(store))
    progress(
        f"{path}: {report.read} requests read, {report.accepted} accepted, "
        f"{report.duplicates} duplicates, {report.quarantined} quarantined"
    )
    return {
        "read": report.read,
        "accepted": report.accepted,
        "duplicates": report.duplicates,
        "quarantined": report.quarantined,
        "tombstones_version": report.version,
    }
