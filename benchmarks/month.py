"""Thirty nights of deletions in a row, without a rescan in between, each followed by an audit.

    python benchmarks/month.py --ratings 1000000 --rank 32

A night starts from the bounds that the night before has left. Whether they stay true, and whether
they stay small enough to keep the work local, shows after many.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import common
from benchmarks.forgetting import NIGHTS_HEAD, job, nights_in_a_row, users_of
from unlearn_spark.evaluation import synthetic


@click.command()
@click.option("--users", default=70_000)
@click.option("--items", default=10_700)
@click.option("--ratings", default=1_000_000)
@click.option("--rank", default=32)
@click.option("--nights", default=30)
@click.option("--share", default=0.001, help="Of the users, a night.")
def main(users: int, items: int, ratings: int, rank: int, nights: int, share: float) -> None:
    """Print the table and save the raw figures."""
    spark = common.session()
    folder = Path(tempfile.mkdtemp(prefix="unlearn-month-"))
    root, source = folder / "tables", str(folder / "ratings.parquet")
    synthetic.write(users, items, ratings, 1, source)
    job("ingest_ratings", root, "--input", source, "--format", "parquet")
    sets = (f"als.rank={rank}",)
    trained = job("train", root, sets=sets)
    everybody = users_of(spark, root)
    a_night = max(1, round(share * len(everybody)))
    rows = nights_in_a_row(root, everybody, nights, a_night, sets)
    spark.stop()
    common.table(NIGHTS_HEAD, rows)
    common.save(f"month-{ratings}-{rank}", {"trained": trained, "nights": rows})


if __name__ == "__main__":
    main()
