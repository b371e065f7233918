"""Read deletion requests into the tombstones table; the job unlearn honours them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from unlearn_spark.cli import job
from unlearn_spark.ingestion.rules import REQUEST_FORMATS
from unlearn_spark.recommender import Recommender


@job("Ingest deletion requests (tombstones).")
@click.option("--input", "path", required=True, metavar="PATH", help="File, folder or glob.")
@click.option(
    "--format",
    type=click.Choice(REQUEST_FORMATS, case_sensitive=False),
    help="What the input is.  [default: by its suffix; a folder with a Delta log is delta]",
)
def main(recommender: Recommender, path: str, format: str | None) -> Mapping[str, Any]:
    """Columns: request_id, scope, user_id, item_id, from_ts, to_ts, requested_at.

    Scopes: user, item, rating (one pair), window (a user's ratings in [from_ts, to_ts)), reinstate
    (lifts the earlier requests of a user_id or item_id). A request without requested_at is made
    now.
    """
    return recommender.ingest_tombstones(path, format)
