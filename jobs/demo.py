"""The whole story on one machine: ratings in, a model, recommendations, forgetting, an audit.

python jobs/demo.py --root demo-output
"""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from unlearn_spark.cli import JobContext, job, progress, run


def step(title: str, name: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Run another job in this process, and say what it was and how long it took."""
    progress(f"\n== {title}\n   jobs/{name}.py {' '.join(arguments)}")
    started = time.perf_counter()
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    command: click.Command = importlib.import_module(name).main
    result: dict[str, Any] = command.main(args=list(arguments), standalone_mode=False)
    progress(f"   {time.perf_counter() - started:.1f} s")
    for key, value in result.items():
        progress(f"   {key}: {value}")
    if result.get("exit_code"):
        raise SystemExit(int(result["exit_code"]))
    return result


@job("Ratings in, a model, recommendations, forgetting and an audit, on one machine.")
@click.option("--input", "source", metavar="PATH", help="Your ratings; else generated ones.")
@click.option("--format", "kind", default="csv", show_default=True, help="Format of --input.")
def main(context: JobContext, source: str | None, kind: str) -> dict[str, Any]:
    """Leaves its tables, a convergence picture and the requests under the root."""
    from pyspark.sql import functions as F

    from unlearn_spark.evaluation.plots import sparkline
    from unlearn_spark.tables import models, ratings

    started = time.perf_counter()
    if context.settings.root is None:
        raise click.UsageError("--root is needed")
    root = Path(context.settings.root)
    root.mkdir(parents=True, exist_ok=True)
    common = ["--root", str(root), "--set", "als.rank=16", "--set", "als.reg_param=0.1"]
    if source is None:
        source, kind = str(root / "generated.csv"), "csv"
        size = ["--users", "600", "--items", "250", "--ratings", "20000", "--seed", "1"]
        step("Ratings with a long tail", "generate_ratings", [*size, "--output", source])
    step("Into Delta", "ingest_ratings", [*common, "--input", source, "--format", kind])
    picture = str(root / "convergence.png")
    trained = step("Train and publish", "train", [*common, "--plot", picture])
    history = models.published(context.store).metrics["history"]
    progress(f"   residual by sweep (log): {sparkline(history, log=True)}   picture: {picture}")
    step("Top-N for everybody", "recommend", [*common, "--top", "5"])

    stored = ratings.read(context.store).orderBy(F.xxhash64("user_id", "item_id")).limit(5)
    some = stored.select("user_id", "item_id").collect()
    asked = root / "tombstones.csv"
    lines = ["request_id,scope,user_id,item_id,from_ts,to_ts"]
    lines += [f"forget-user-{n},user,{some[n]['user_id']},,," for n in range(3)]
    lines += [f"forget-pair,rating,{some[3]['user_id']},{some[3]['item_id']},,"]
    lines += [f"forget-window,window,{some[4]['user_id']},,2015-01-01,2023-01-01"]
    asked.write_text("\n".join(lines) + "\n")
    step("Five people ask to be forgotten", "ingest_tombstones", [*common, "--input", str(asked)])
    forgot = step("Forget, and mend what that disturbed", "unlearn", common)
    audited = step("Check every row from the ratings that remain", "audit", common)
    progress(
        f"\nForgetting took {forgot['work_sweeps']:.3f} sweeps of arithmetic and "
        f"{forgot['seconds']:.0f} s; training took {trained['sweeps']} sweeps and "
        f"{trained['seconds']:.0f} s.\nLargest residual of any row: {audited['max_residual']}"
    )
    return {
        "model_version": forgot["model_version"],
        "work_sweeps": forgot["work_sweeps"],
        "max_residual": audited["max_residual"],
        "seconds": time.perf_counter() - started,
    }


if __name__ == "__main__":
    run(main)
