"""From ratings in Delta to a model on disk, to one residual, side by side with Spark MLlib.

    python benchmarks/training.py --ratings 10000000 --rank 64
    python benchmarks/training.py --implicit

Ours is the product's training job, certificate and publishing included. MLlib, and in implicit mode
the library implicit, get as many sweeps as plain alternation needs to the same residual; that is
counted beforehand, and the residual and quality that MLlib reached are reported beside ours.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import common
from benchmarks.forgetting import job
from unlearn_spark.config import AlsSettings
from unlearn_spark.evaluation import synthetic

HELD_OUT = 0.02


def mllib(frame: Any, als: AlsSettings, sweeps: int, output: Path) -> float:
    """Seconds that MLlib takes from a table's rows to its saved model."""
    peer = common.mllib_als(als, sweeps)
    return common.timed(lambda: peer.fit(frame).write().overwrite().save(str(output)))


def library(frame: Any, als: AlsSettings, sweeps: int, cg: bool) -> float:
    """Seconds that the library implicit takes from a table's rows to fitted factors."""

    def fit() -> None:
        ratings = common.numbered(frame.toArrow())
        common.library_fit(ratings, als.rank, als.reg_param, als.alpha, cg)(sweeps)

    return common.timed(fit)


def quality(root: Path, held_out: Any) -> dict[str, float]:
    """RMSE and NDCG@10 of the newest model there on ratings that nobody was fitted to."""
    from unlearn_spark.spark.metrics import held_out_metrics

    read = held_out.sparkSession.read.format("delta")
    users, items = (
        read.load(str(root / f"{side}_factors")).select("id", "factors")
        for side in ("user", "item")
    )
    found = held_out_metrics(users, items, held_out, None, k=10)
    return {"rmse": found["rmse"], "ndcg_at_10": found["ndcg_at_10"]}


@click.command()
@click.option("--users", default=70_000)
@click.option("--items", default=10_700)
@click.option("--ratings", default=1_000_000)
@click.option("--rank", default=64)
@click.option("--tol", default=1e-3, help="Largest relative residual at the end.")
@click.option("--rounds", default=1)
@click.option("--implicit/--explicit", default=False)
def main(
    users: int, items: int, ratings: int, rank: int, tol: float, rounds: int, implicit: bool
) -> None:
    """Print the table and save the raw figures."""
    from unlearn_spark.spark.metrics import split_by_hash
    from unlearn_spark.spark.training.training import fit_factors

    spark = common.session()
    folder = Path(tempfile.mkdtemp(prefix="unlearn-bench-"))
    root = folder / "root"
    made = str(folder / "made.parquet")
    synthetic.write(users, items, ratings, 1, made)
    train, held_out = split_by_hash(spark.read.parquet(made), HELD_OUT)
    train.write.parquet(str(folder / "train"))
    job("ingest_ratings", root, "--input", str(folder / "train"), "--format", "parquet")
    columns = ("cast(user_id AS int) user_id", "cast(item_id AS int) item_id", "rating")
    frame = spark.read.format("delta").load(str(root / "ratings")).selectExpr(*columns)
    als = common.als_settings(rank, implicit, tol=tol, max_sweeps=400)
    sets = tuple(
        f"als.{name}={str(getattr(als, name)).lower()}"
        for name in ("rank", "reg_param", "implicit_prefs", "alpha", "tol", "max_sweeps")
    )
    plain = fit_factors(frame, als.model_copy(update={"memory": 0}))
    needed = plain.summary.sweeps
    plain.release()
    click.echo(f"plain alternation: {needed} sweeps to {tol:.1e}", err=True)
    saved = folder / "mllib"
    trained: dict[str, Any] = {}

    def ours() -> float:
        trained.update(job("train", root, sets=sets))
        return float(trained["seconds"])

    contestants: dict[str, Callable[[], float]] = {
        "ours": ours,
        "MLlib": lambda: mllib(frame, als, needed, saved),
    }
    if implicit:
        contestants["implicit, Cholesky"] = lambda: library(frame, als, needed, False)
        contestants["implicit, 3 CG steps"] = lambda: library(frame, als, needed, True)
    ours()  # compiled kernels and a warm JVM
    mllib(frame, als, 1, saved)
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, fit in contestants.items():
            seconds[name].append(fit())
            click.echo(f"{name}: {seconds[name][-1]:.1f} s", err=True)
    other = folder / "imported"
    shutil.copytree(root, other)
    judged = job("import_model", other, "--input", str(saved), "--format", "mllib", sets=sets)
    reached = {
        "ours": {"sweeps": trained["sweeps"], "residual": trained["max_residual"]},
        "MLlib": {"sweeps": needed, "residual": judged["max_residual"]},
    }
    for name, where in (("ours", root), ("MLlib", other)):
        reached[name].update(quality(where, held_out))
    spark.stop()
    shutil.rmtree(folder)
    medians = {name: float(np.median(found)) for name, found in seconds.items()}
    head = ["who", "s", "of ours", "sweeps", "residual", "rmse", "ndcg_at_10"]
    rows = [
        [
            name,
            median,
            median / medians["ours"],
            *[reached.get(name, {"sweeps": needed}).get(key, "") for key in head[3:]],
        ]
        for name, median in medians.items()
    ]
    common.table(head, rows)
    common.save(
        f"training-{'implicit' if implicit else 'explicit'}-{ratings}-{rank}",
        {
            "data": {"users": users, "items": items, "ratings": ratings},
            "als": als.model_dump(),
            "seconds": seconds,
            "reached": reached,
        },
    )


if __name__ == "__main__":
    main()
