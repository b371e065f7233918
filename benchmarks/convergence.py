"""Sweeps to a residual, accelerated against plain alternation, by the product's own training.

python benchmarks/convergence.py --input ../shared/data/ml-latest-small/ratings.csv
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import common
from unlearn_spark.config import AlsSettings

TARGETS = (1e-3, 2.5e-4)


def first_below(history: list[dict[str, Any]], target: float) -> int | None:
    """The sweep that first found a residual at or below the target."""
    return next((step["sweep"] for step in history if step["max_residual"] <= target), None)


@click.command()
@click.option("--input", "path", type=click.Path(exists=True), help="MovieLens ratings.csv.")
@click.option("--cap", default=400, help="Most sweeps of a run.")
@click.option("--ratings", default=1_000_000, help="Generated ratings, beside those of --input.")
def main(path: str | None, cap: int, ratings: int) -> None:
    """Print the table and save the raw figures."""
    from unlearn_spark.spark.training.training import fit_factors

    spark = common.session()
    sets: dict[str, tuple[Any, dict[str, Any]]] = {}
    if path:
        columns = ("userId AS user_id", "movieId AS item_id", "cast(rating AS float) rating")
        real = spark.read.csv(path, header=True, inferSchema=True).selectExpr(*columns).cache()
        for name, more in (
            ("explicit", {}),
            ("implicit, alpha 10", {"implicit_prefs": True, "alpha": 10.0}),
        ):
            sets[f"{real.count()} real, rank 16, {name}"] = (real, {"rank": 16, **more})
    if ratings:
        made = common.generated(spark, 6040, 3700, ratings)
        sets[f"{ratings} generated, rank 32, explicit"] = (made, {"rank": 32})
    rows, raw = [], {}
    for name, (frame, more) in sets.items():
        histories = {}
        for kind, memory in (("accelerated", 1), ("plain", 0)):
            als = AlsSettings(
                reg_param=0.05, memory=memory, max_sweeps=cap, tol=min(TARGETS), **more
            )
            fitted = fit_factors(frame, als)
            histories[kind] = fitted.summary.history
            fitted.release()
        for target in TARGETS:
            found = {kind: first_below(history, target) for kind, history in histories.items()}
            fast, slow = found["accelerated"], found["plain"]
            share = fast / slow if fast and slow else float("nan")
            rows.append([name, f"{target:.1e}", fast, slow or f"over {cap}", share])
        raw[name] = {
            kind: [step["max_residual"] for step in history] for kind, history in histories.items()
        }
    common.table(["data", "residual", "accelerated", "plain", "share"], rows)
    common.save("convergence", {"rows": rows, "residuals": raw})


if __name__ == "__main__":
    main()
