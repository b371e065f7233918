"""Held-out quality against Spark MLlib with the same parameters, over several seeds.

python benchmarks/quality.py --input ../shared/data/ml-latest-small/ratings.csv
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path
from typing import Any

import click

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import common

SWEEPS = 20
RANK = 16
MODES: dict[str, dict[str, Any]] = {
    "explicit": {"regParam": 0.1},
    "implicit": {"regParam": 0.05, "implicitPrefs": True, "alpha": 10.0},
}


@click.command()
@click.option("--input", "path", type=click.Path(exists=True), required=True, help="MovieLens csv.")
@click.option("--seeds", default=5)
def main(path: str, seeds: int) -> None:
    """RMSE of explicit and NDCG@10 of implicit models on a tenth of the ratings."""
    from pyspark.ml.recommendation import ALS as Peer  # noqa: N811
    from pyspark.sql import functions as F

    from unlearn_spark.als import ALS
    from unlearn_spark.spark.metrics import held_out_metrics, split_by_hash

    spark = common.session()
    columns = ("userId AS user_id", "movieId AS item_id", "cast(rating AS float) rating")
    ratings = spark.read.csv(path, header=True, inferSchema=True).selectExpr(*columns)
    raw: dict[str, Any] = {}
    rows = []
    for mode, settings in MODES.items():
        found: dict[str, list[float]] = {"ours": [], "mllib": []}
        for seed in range(seeds):
            train, held_out = (part.cache() for part in split_by_hash(ratings, 0.1, seed))
            for name, kind in (("ours", ALS), ("mllib", Peer)):
                model = kind(
                    rank=RANK,
                    maxIter=SWEEPS,
                    seed=seed,
                    userCol="user_id",
                    itemCol="item_id",
                    ratingCol="rating",
                    **settings,
                ).fit(train)
                users, items = (
                    side.select("id", F.col("features").cast("array<float>").alias("factors"))
                    for side in (model.userFactors, model.itemFactors)
                )
                metrics = held_out_metrics(users, items, held_out, train, k=10)
                found[name].append(metrics["rmse" if mode == "explicit" else "ndcg_at_10"])
            train.unpersist()
            held_out.unpersist()
        means = {name: statistics.mean(values) for name, values in found.items()}
        gaps = [a / b - 1 for a, b in zip(found["ours"], found["mllib"], strict=True)]
        figure = "RMSE" if mode == "explicit" else "NDCG@10"
        spread = statistics.stdev(found["mllib"])
        rows.append(
            [
                f"{mode}, {figure}",
                means["ours"],
                means["mllib"],
                spread,
                f"{max(gaps, key=abs):+.2%}",
            ]
        )
        raw[mode] = found
    common.table(["figure", "ours", "MLlib", "spread of MLlib", "widest gap of a seed"], rows)
    common.save("quality", {"rank": RANK, "sweeps": SWEEPS, "modes": MODES, "raw": raw})


if __name__ == "__main__":
    main()
