"""The whole story on one machine: ratings in, a model, recommendations, forgetting, an audit."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from unlearn_spark.cli import JobContext, job, progress
from unlearn_spark.ingestion import formats
from unlearn_spark.jobs import (
    audit,
    generate_ratings,
    ingest_ratings,
    ingest_tombstones,
    recommend,
    train,
    unlearn,
)


def step(title: str, command: click.Command, arguments: Sequence[str]) -> dict[str, Any]:
    """Run another job in this process, and say what it was and how long it took."""
    progress(f"\n== {title}\n   unlearn-spark {command.name} {' '.join(arguments)}")
    started = time.perf_counter()
    result: dict[str, Any] = command.main(args=list(arguments), standalone_mode=False)
    progress(f"   {time.perf_counter() - started:.1f} s")
    for key, value in result.items():
        progress(f"   {key}: {value}")
    if result.get("exit_code"):
        raise SystemExit(int(result["exit_code"]))
    return result


@job("Ratings in, a model, recommendations, forgetting and an audit, on one machine.")
@click.option("--input", "source", metavar="PATH", help="Your ratings; else generated ones.")
@click.option(
    "--format",
    "kind",
    type=click.Choice(formats.FORMATS, case_sensitive=False),
    default="csv",
    show_default=True,
    help="Format of --input.",
)
def main(context: JobContext, source: str | None, kind: str) -> dict[str, Any]:
    """Leaves its tables, the requests and two pictures (the convergence of the training, the scores
    of forgotten entries) under the root."""
    from unlearn_spark.evaluation.plots import sparkline
    from unlearn_spark.tables import models
    from unlearn_spark.tables.store import check_root

    started = time.perf_counter()
    if context.settings.root is None:
        raise click.UsageError("--root is needed")
    check_root(context.settings)
    if source is not None:
        formats.check_exists(source)
    root = Path(context.settings.root)
    root.mkdir(parents=True, exist_ok=True)
    common = ["--root", str(root), "--set", "als.rank=16", "--set", "als.reg_param=0.1"]
    if source is None:
        source, kind = str(root / "generated.csv"), "csv"
        size = ["--users", "600", "--items", "250", "--ratings", "20000", "--seed", "1"]
        step("Ratings with a long tail", generate_ratings.main, [*size, "--output", source])
    step("Into Delta", ingest_ratings.main, [*common, "--input", source, "--format", kind])
    picture = str(root / "convergence.png")
    step("Train and publish", train.main, [*common, "--plot", picture])
    history = models.published(context.store).metrics["history"]
    progress(f"   residual by sweep (log): {sparkline(history, log=True)}   picture: {picture}")
    step("Top-N for everybody", recommend.main, [*common, "--top", "5"])

    asked = root / "tombstones.csv"
    asked.write_text(requests(context))
    step(
        "Three users, an item, a pair and a window are to be forgotten",
        ingest_tombstones.main,
        [*common, "--input", str(asked)],
    )
    before = models.published(context.store)
    forgot = step("Forget, and mend what that disturbed", unlearn.main, common)
    audited = step("Check every row from the ratings that remain", audit.main, common)
    retrained = step("For comparison, train anew without them", train.main, common)
    scores = draw_scores(
        context,
        before.model_version,
        forgot["model_version"],
        retrained["model_version"],
        root,
    )
    progress(
        f"\nForgetting: {forgot['rows_resolved']} rows re-solved, blocks written "
        f"{forgot['blocks_written']} of {forgot['blocks_total']}, {forgot['work_sweeps']:.3f} "
        f"sweeps of arithmetic, {forgot['seconds']:.0f} s.\n"
        f"Retraining: {retrained['sweeps']} sweeps, {retrained['seconds']:.0f} s.\n"
        f"Certificate: largest residual {audited['max_residual']}, tolerance {audited['tau']}, "
        f"ratings that should be gone: {audited['tombstoned_ratings_found']}.\n"
        f"Scores of what a user asked to be forgotten (means): {scores}"
    )
    return {
        "model_version": forgot["model_version"],
        "work_sweeps": forgot["work_sweeps"],
        "max_residual": audited["max_residual"],
        "seconds": time.perf_counter() - started,
    }


def requests(context: JobContext) -> str:
    """Requests of every deleting scope, as csv. The same ratings give the same requests.

    The window has the later half of the ratings of the user with the most.
    """
    from pyspark.sql import functions as F

    from unlearn_spark.tables import ratings

    table = ratings.read(context.store)
    some = table.orderBy(F.xxhash64("user_id", "item_id")).limit(5).collect()
    times = F.unix_timestamp("rated_at")
    busiest = (
        table.groupBy("user_id")
        .agg(
            F.count(F.lit(1)).alias("n"), F.median(times).alias("middle"), F.max(times).alias("end")
        )
        .orderBy(F.desc("n"), "user_id")
        .first()
    )
    assert busiest is not None
    lines = ["request_id,scope,user_id,item_id,from_ts,to_ts"]
    lines += [f"forget-user-{n},user,{some[n]['user_id']},,," for n in range(3)]
    lines += [f"forget-item,item,,{some[3]['item_id']},,"]
    lines += [f"forget-pair,rating,{some[4]['user_id']},{some[4]['item_id']},,"]
    if busiest["middle"] is not None:  # ratings without times are in no window
        window = f"{int(busiest['middle'])},{busiest['end'] + 1}"
        lines += [f"forget-window,window,{busiest['user_id']},,{window}"]
    return "\n".join(lines) + "\n"


def draw_scores(
    context: JobContext, before: int, unlearned: int, retrained: int, root: Path
) -> dict[str, float] | None:
    """Draw the scores of deleted entries whose user and item all three versions have.

    Returns their means before, unlearned and retrained; None without such entries.
    """
    import numpy as np

    from unlearn_spark.evaluation import plots
    from unlearn_spark.spark.scoring import predict_pairs
    from unlearn_spark.tables import models, ratings

    store = context.store
    older, newer = models.published(store, before), models.published(store, unlearned)
    assert older.ratings_version is not None
    assert newer.ratings_version is not None
    pairs = ["user_id", "item_id"]
    gone = ratings.read(store, older.ratings_version).select(pairs)
    gone = gone.join(ratings.read(store, newer.ratings_version).select(pairs), pairs, "anti")
    for name, version in (
        ("before", older),
        ("unlearned", newer),
        ("retrained", models.published(store, retrained)),
    ):
        users, items = models.read_factors(store, version)
        gone = predict_pairs(gone, users, items, prediction_col=name, cold_start="drop")
    scored = gone.limit(5000).toPandas()
    if scored.empty:
        return None
    columns = {name: scored[name].to_numpy(np.float64) for name in scored.columns[2:]}
    picture = plots.scores(
        columns["before"], columns["unlearned"], columns["retrained"], root / "forgotten.png"
    )
    progress(f"   picture: {picture}")
    return {name: round(float(values.mean()), 3) for name, values in columns.items()}
