"""The embedded engine against its own kernel, Spark MLlib and the library implicit.

    python benchmarks/one_process.py                 # one sweep: ours, the kernel alone
    python benchmarks/one_process.py --mllib         # and MLlib's
    python benchmarks/one_process.py --implicit      # a whole fit of implicit data, to one residual

The kernel alone solves the same rows in as many processes as there are cores, without acceleration,
residuals and scattering (`kernels.py`). A whole fit is from ratings in Arrow to factors. The
library gets as many sweeps as plain alternation needs to our residual, counted beforehand.
"""

from __future__ import annotations

import os
import statistics
import sys
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyarrow as pa
from threadpoolctl import threadpool_limits

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import common, kernels
from unlearn_spark.embedded import training


def our_sweeps(ratings: pa.Table, rank: int, implicit: bool, n: int) -> list[float]:
    """Seconds of sweeps of a fit, after one to warm up."""
    als = common.als_settings(rank, implicit, tol=1e-12, max_sweeps=n + 1)
    fitted = training.fit(ratings, als, os.cpu_count() or 1)
    return [report["seconds"] for report in fitted.summary.history][1:]


def mllib_sweep(ratings: pa.Table, rank: int, implicit: bool) -> float:
    """Seconds of one sweep of Spark MLlib: a longer fit less a shorter one."""
    spark = common.session()
    frame = spark.createDataFrame(ratings).selectExpr(
        "cast(user_id AS int) user_id", "cast(item_id AS int) item_id", "rating"
    )
    frame = common.in_delta(frame).persist()
    frame.count()
    als = common.als_settings(rank, implicit)

    def fit(sweeps: int) -> float:
        return common.timed(lambda: common.mllib_als(als, sweeps).fit(frame))

    fit(1)  # a warm JVM
    seconds = (fit(4) - fit(1)) / 3
    spark.stop()
    return seconds


def whole_fit(ratings: pa.Table, rank: int, tol: float, rounds: int) -> dict[str, Any]:
    """Seconds of whole fits of implicit data, ours and the library's, by turns."""
    als = common.als_settings(rank, True, tol=tol, max_sweeps=1000)
    threads = os.cpu_count() or 1
    plain = training.fit(ratings, als.model_copy(update={"memory": 0}), threads).summary
    click.echo(f"plain alternation: {plain.sweeps} sweeps to {tol:.1e}", err=True)

    def library(cg: bool) -> None:
        numbered = common.numbered(ratings)
        common.library_fit(numbered, rank, als.reg_param, als.alpha, cg)(plain.sweeps)

    sweeps = []

    def ours() -> None:
        sweeps.append(training.fit(ratings, als, threads).summary.sweeps)

    contestants = {
        "ours": ours,
        "library, Cholesky": lambda: library(False),
        "library, 3 CG steps": lambda: library(True),
    }
    found: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, fit in contestants.items():
            found[name].append(common.timed(fit))
            click.echo(f"{name}: {found[name][-1]:.1f} s", err=True)
    return {"seconds": found, "sweeps": sweeps[-1], "plain_sweeps": plain.sweeps}


@click.command()
@click.option("--users", default=70_000)
@click.option("--items", default=10_000)
@click.option("--ratings", default=10_000_000)
@click.option("--rank", default=64)
@click.option("--rounds", default=3)
@click.option("--tol", default=1e-3, help="Of the whole fits.")
@click.option("--mllib/--no-mllib", default=False)
@click.option("--implicit/--explicit", default=False)
def main(
    users: int,
    items: int,
    ratings: int,
    rank: int,
    rounds: int,
    tol: float,
    mllib: bool,
    implicit: bool,
) -> None:
    """Print the table and save the raw figures."""
    u, i, values = kernels.entries(users, items, ratings)
    table = pa.table({"user_id": u.astype(np.int64), "item_id": i.astype(np.int64)})
    table = table.append_column("rating", pa.array(values))
    data = {"users": users, "items": items, "ratings": ratings, "rank": rank}
    if implicit:
        with threadpool_limits(1, "blas"):
            raw = whole_fit(table, rank, tol, rounds)
        medians = {name: statistics.median(found) for name, found in raw["seconds"].items()}
        name = f"whole-fit-implicit-{ratings}-{rank}"
    else:
        sides = kernels.sides_of(u, i, values)
        fixed = kernels.some_factors(sides, rank, np.random.default_rng(1))
        raw = {"ours": [], "kernel alone": []}
        with threadpool_limits(1, "blas"):
            for _ in range(rounds):
                raw["kernel alone"] += kernels.sweeps("ours", sides, fixed, False, 3)
                raw["ours"] += our_sweeps(table, rank, False, 3)
        if mllib:
            raw["MLlib"] = [mllib_sweep(table, rank, False)]
        medians = {name: statistics.median(found) for name, found in raw.items()}
        name = f"one-process-{ratings}-{rank}"
    common.table(
        ["who", "s", "of ours"],
        [[who, seconds, seconds / medians["ours"]] for who, seconds in medians.items()],
    )
    common.save(name, {"data": data, "raw": raw, "medians": medians})


if __name__ == "__main__":
    main()
