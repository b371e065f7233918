"""List the best items of every user, or of some, by a published model."""

from __future__ import annotations

import csv
import io
from typing import TYPE_CHECKING, Any

import click

from unlearn_spark.cli import JobContext, job, progress

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

    from unlearn_spark.tables.models import ModelVersion
    from unlearn_spark.tables.store import Store


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
    context: JobContext,
    top: int,
    users: str | None,
    model_version: int | None,
    exclude_seen: bool,
    output: str | None,
) -> dict[str, Any]:
    """The last line on stdout is one JSON object: users, rows, model_version, output."""
    from pyspark.sql import functions as F

    from unlearn_spark.spark.scoring import top_n
    from unlearn_spark.tables import models, recommendations

    if output is not None:
        recommendations.check_export(output)
    store = context.store
    model = models.published(store, model_version)
    queries, candidates = models.read_factors(store, model)
    unknown: list[str] = []
    if users is not None:
        queries, unknown = select_users(queries, users, model)
        if unknown:
            progress(f"not in model version {model.model_version}: {', '.join(unknown)}")
    seen = seen_pairs(store, model) if exclude_seen else None
    lists = top_n(queries, candidates, top, seen)
    rows = recommendations.flatten(lists, model.model_version).persist()
    try:
        counted = rows.agg(F.count_distinct("user_id"), F.count(F.lit(1))).first()
        assert counted is not None
        if output is None:
            output = recommendations.write(store, rows)
        else:
            recommendations.export(rows, output)
    finally:
        rows.unpersist()
    return {
        "users": counted[0],
        "rows": counted[1],
        "model_version": model.model_version,
        "output": output,
        **({"unknown_users": unknown} if unknown else {}),
    }


def select_users(
    factors: DataFrame, users: str, model: ModelVersion
) -> tuple[DataFrame, list[str]]:
    """The factor rows of the named users, and the names that have none."""
    from pyspark.sql import functions as F

    from unlearn_spark.errors import InputError

    lines = csv.reader(io.StringIO(users, newline=""), skipinitialspace=True)
    names = list(dict.fromkeys(name.strip() for line in lines for name in line if name.strip()))
    asked = factors.where(F.col("id").cast("string").isin(names)).persist()
    found = {
        row["name"] for row in asked.select(F.col("id").cast("string").alias("name")).collect()
    }
    unknown = [name for name in names if name not in found]
    if not found:
        raise InputError(
            f"--users {users}: none is in model version {model.model_version}; "
            "name users that have ratings"
        )
    return asked, unknown


def seen_pairs(store: Store, model: ModelVersion) -> DataFrame | None:
    """(query_id, candidate_id) of the ratings that the model was fitted to, where it names them.

    A rating that a request covers does not count as seen: its item may be recommended.
    """
    from pyspark.sql import functions as F

    from unlearn_spark.tables import ratings, tombstones

    if model.ratings_version is None:
        progress(f"model version {model.model_version} names no ratings; no item counts as seen")
        return None
    rated = ratings.retained(
        store, model.ratings_version, tombstones.version(store), model.receipts_version
    )
    return rated.select(F.col("user_id").alias("query_id"), F.col("item_id").alias("candidate_id"))
