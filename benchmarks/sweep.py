"""One sweep, the preparation before it and the memory of both, side by side with Spark MLlib.

    python benchmarks/sweep.py --ratings 10000000 --rank 64 --rounds 3

The contestants alternate on the same Delta table in the same session; seconds are noisy, ratios
less so. A contestant's sweep is the difference of a longer and a one-sweep fit, divided by the
sweeps in between; what is left of the short fit is its preparation. Memory is measured apart, in a
process for each contestant.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import common
from unlearn_spark.config import AlsSettings

REG_PARAM = 0.05


def contestants(frame: Any, rank: int) -> dict[str, Callable[[int], float]]:
    """By name: fits with so many sweeps and returns the seconds."""
    from pyspark.ml.recommendation import ALS as Peer  # noqa: N811

    from unlearn_spark.als.training import fit_factors

    def ours(sweeps: int) -> float:
        als = AlsSettings(rank=rank, reg_param=REG_PARAM, max_sweeps=sweeps, tol=1e-12)
        fitted = fit_factors(frame, als)
        history = fitted.summary.history
        fitted.release()
        # The scan of every row after it, which MLlib does not do, is not counted.
        return fitted.summary.encode_seconds + sum(report["seconds"] for report in history)

    def mllib(sweeps: int) -> float:
        als = Peer(
            rank=rank,
            maxIter=sweeps,
            regParam=REG_PARAM,
            userCol="user_id",
            itemCol="item_id",
            ratingCol="rating",
        )

        def fit() -> None:
            model = als.fit(frame)
            model.itemFactors.count()
            model.userFactors.count()

        return common.timed(fit)

    return {"ours": ours, "mllib": mllib}


@click.command()
@click.option("--users", default=70_000)
@click.option("--items", default=10_700)
@click.option("--ratings", default=10_000_000)
@click.option("--rank", default=64)
@click.option("--rounds", default=3)
@click.option("--sweeps", default=3, help="More than one, in the longer fit.")
@click.option("--memory/--no-memory", default=True)
@click.option("--only", help="Fit this contestant alone, once; for the memory.")
def main(
    users: int,
    items: int,
    ratings: int,
    rank: int,
    rounds: int,
    sweeps: int,
    memory: bool,
    only: str | None,
) -> None:
    """Print the table and save the raw figures."""
    spark = common.session()
    frame = common.generated(spark, users, items, ratings)
    fits = contestants(frame, rank)
    if only:
        fits[only](1 + sweeps)
        return
    raw: dict[str, Any] = {name: {"short": [], "long": []} for name in fits}
    for fit in fits.values():  # compiled kernels and a warm JVM for both
        fit(1)
    for _ in range(rounds):
        for name, fit in fits.items():
            raw[name]["short"].append(fit(1))
            raw[name]["long"].append(fit(1 + sweeps))
    spark.stop()
    figures: dict[str, dict[str, float]] = {}
    for name, runs in raw.items():
        pairs = zip(runs["short"], runs["long"], strict=True)
        sweep = statistics.median((long - short) / sweeps for short, long in pairs)
        figures[name] = {
            "sweep, s": sweep,
            "preparation, s": statistics.median(runs["short"]) - sweep,
        }
        if memory:
            options = {"--users": users, "--items": items, "--ratings": ratings, "--rank": rank}
            command = [sys.executable, __file__, "--only", name]
            command += [str(word) for pair in options.items() for word in pair]
            figures[name]["peak memory, GiB"] = common.peak_memory(command)
    ratio = {key: figures["mllib"][key] / value for key, value in figures["ours"].items()}
    common.table(
        ["figure", "ours", "MLlib", "MLlib / ours"],
        [[key, value, figures["mllib"][key], ratio[key]] for key, value in figures["ours"].items()],
    )
    data = {"users": users, "items": items, "ratings": ratings, "rank": rank, "rounds": rounds}
    common.save(
        f"sweep-{ratings}-{rank}",
        {"data": data, "raw": raw, "figures": figures, "mllib_over_ours": ratio},
    )


if __name__ == "__main__":
    main()
