"""Five nights of deletions on real ratings, each audited, and a comparison with retraining.

    python benchmarks/five_nights.py --input ../shared/data/ml-latest-small/ratings.csv

Holds a tenth of the ratings out, trains on the others, has 1% of the users forgotten on each of
five nights, audits every night, and in the end compares with models trained from scratch on what
remains. Prints what docs/five-nights.md shows, and writes its picture and raw figures.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import common
from benchmarks.forgetting import NIGHTS_HEAD, job, nights_in_a_row

DOCS = Path(__file__).resolve().parent.parent / "docs"
SETTINGS = {
    "explicit": ("als.rank=16", "als.reg_param=0.1"),
    "implicit": (
        "als.rank=16",
        "als.reg_param=0.05",
        "als.implicit_prefs=true",
        "als.alpha=10",
    ),
}


@click.command()
@click.option("--input", "path", type=click.Path(exists=True), required=True, help="MovieLens csv.")
@click.option("--mode", type=click.Choice(sorted(SETTINGS)), default="explicit")
@click.option("--seeds", default=3, help="Models trained from scratch.")
@click.option("--nights", default=5)
@click.option("--share", default=0.01, help="Of the users, a night.")
def main(path: str, mode: str, seeds: int, nights: int, share: float) -> None:
    """Print the tables and write the report."""
    from unlearn_spark.spark.metrics import split_by_hash

    spark = common.session()
    sets = SETTINGS[mode]
    root = Path(tempfile.mkdtemp(prefix="unlearn-nights-"))
    columns = ("userId AS user_id", "movieId AS item_id", "cast(rating AS float) rating")
    ratings = spark.read.csv(path, header=True, inferSchema=True).selectExpr(
        *columns, "timestamp_seconds(timestamp) AS rated_at"
    )
    kept, held_out = split_by_hash(ratings, 0.1, 0)
    for name, frame in (("kept", kept), ("held_out", held_out)):
        frame.write.parquet(str(root / name))
    tables = root / "tables"
    job("ingest_ratings", tables, "--input", str(root / "kept"), "--format", "parquet")
    trained = job("train", tables, sets=sets)
    everybody = [row[0] for row in kept.select("user_id").distinct().toLocalIterator()]
    a_night = max(1, round(share * len(everybody)))
    rows = nights_in_a_row(tables, everybody, nights, a_night, sets)
    picture = DOCS / f"five-nights-{mode}.png"
    compared = job(
        "audit",
        tables,
        "--retrain",
        "--seeds",
        str(seeds),
        "--held-out",
        str(root / "held_out"),
        "--held-out-format",
        "parquet",
        "--plot",
        str(picture),
        sets=sets,
    )
    spark.stop()
    common.table(NIGHTS_HEAD, rows)
    common.save(
        f"five-nights-{mode}",
        {"settings": sets, "trained": trained, "nights": rows, "comparison": compared},
    )


if __name__ == "__main__":
    main()
