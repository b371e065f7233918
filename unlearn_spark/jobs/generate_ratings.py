"""Write long-tailed synthetic ratings: a low-rank taste, noise, times."""

from __future__ import annotations

from typing import Any

import click

from unlearn_spark.cli import job, progress
from unlearn_spark.recommender import Recommender


@job("Generate synthetic ratings.")
@click.option("--users", required=True, type=int)
@click.option("--items", required=True, type=int)
@click.option("--ratings", required=True, type=int)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--output", required=True, metavar="PATH", help="A .csv or .parquet file.")
def main(
    recommender: Recommender, users: int, items: int, ratings: int, seed: int, output: str
) -> dict[str, Any]:
    """Ratings run from 0.5 to 5 in half stars; every user and item occurs if there are enough."""
    from unlearn_spark.evaluation import synthetic

    written = synthetic.write(users, items, ratings, seed, output)
    progress(
        f"{output}: {written.ratings} ratings of {written.users} users and {written.items} items"
    )
    return {"users": written.users, "items": written.items, "ratings": written.ratings}
