"""One sweep and the preparation before it, side by side with Spark MLlib in one session.

    python benchmarks/sweep.py --ratings 10000000 --rank 64 --rounds 3

The contestants alternate on the same DataFrame and session; seconds are noisy, ratios less so.
A contestant's sweep is the difference of a fit with more and a fit with one iteration, divided by
the iterations in between; what is left of the short fit is its preparation.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from unlearn_spark.config import AlsSettings, Settings, SparkSettings
from unlearn_spark.evaluation import synthetic
from unlearn_spark.session import get_spark

RESULTS = Path(__file__).resolve().parent / "results"


@click.command()
@click.option("--users", default=70_000)
@click.option("--items", default=10_700)
@click.option("--ratings", default=10_000_000)
@click.option("--rank", default=64)
@click.option("--rounds", default=3)
@click.option("--sweeps", default=3, help="Sweeps of the longer fit.")
def main(users: int, items: int, ratings: int, rank: int, rounds: int, sweeps: int) -> None:
    """Print the table and save the raw figures."""
    from pyspark.ml.recommendation import ALS as Peer  # noqa: N811

    from unlearn_spark.als.training import fit_factors

    spark = get_spark(Settings(spark=SparkSettings(driver_memory="8g")))
    folder = tempfile.mkdtemp()
    path = str(Path(folder) / "ratings.parquet")
    synthetic.write(users, items, ratings, 1, path)
    frame = spark.read.parquet(path).selectExpr(
        "cast(user_id AS int) user_id", "cast(item_id AS int) item_id", "rating"
    )
    table = str(Path(folder) / "delta")
    frame.write.format("delta").save(table)
    frame = spark.read.format("delta").load(table)

    def ours(count: int) -> float:
        fitted = fit_factors(
            frame, AlsSettings(rank=rank, reg_param=0.05, max_sweeps=count, tol=1e-12)
        )
        seconds = fitted.summary.encode_seconds + sum(
            report["seconds"] for report in fitted.summary.history
        )
        fitted.release()
        return seconds

    def peer(count: int) -> float:
        started = time.perf_counter()
        model = Peer(
            rank=rank,
            maxIter=count,
            regParam=0.05,
            userCol="user_id",
            itemCol="item_id",
            ratingCol="rating",
        ).fit(frame)
        model.itemFactors.count()
        model.userFactors.count()
        return time.perf_counter() - started

    raw: dict[str, dict[str, list[float]]] = {
        name: {"short": [], "long": []} for name in ("ours", "mllib")
    }
    ours(1)  # compiled kernels and a warm JVM for both
    for _ in range(rounds):
        for name, fit in (("ours", ours), ("mllib", peer)):
            raw[name]["short"].append(fit(1))
            raw[name]["long"].append(fit(1 + sweeps))
    figures: dict[str, Any] = {}
    for name, runs in raw.items():
        each = [(b - a) / sweeps for a, b in zip(runs["short"], runs["long"], strict=True)]
        sweep = statistics.median(each)
        figures[name] = {
            "sweep_seconds": sweep,
            "preparation_seconds": statistics.median(runs["short"]) - sweep,
        }
    ratio = {key: figures["mllib"][key] / figures["ours"][key] for key in figures["ours"]}
    result = {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}",
        "versions": {"python": platform.python_version(), "spark": spark.version},
        "data": {"users": users, "items": items, "ratings": ratings, "rank": rank},
        "raw": raw,
        "figures": figures,
        "mllib_over_ours": ratio,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"sweep-{ratings}-{rank}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: result[key] for key in ("machine", "data", "figures")}))
    print(json.dumps({"mllib_over_ours": ratio}))


if __name__ == "__main__":
    main()
