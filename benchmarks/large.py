"""The shape of the Netflix prize on one machine: preparation, sweeps, peak memory, and predictions.

    python benchmarks/large.py

The sizes are fitted in ascending order in one session. What a size costs is first predicted from
the two before it, as a line in the number of ratings, and then measured.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import click

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import common
from unlearn_spark.spark.training.training import fit_factors

SHAPES = (
    (48_000, 10_700, 3_000_000),
    (160_000, 14_000, 10_000_000),
    (480_189, 17_770, 100_500_000),
)
"""Users, items, ratings; the last shape is that of the Netflix prize."""


def line(xs: list[int], ys: list[float], x: int) -> float:
    """The value at x of the line through the last two points."""
    (x0, x1), (y0, y1) = xs[-2:], ys[-2:]
    return y1 + (y1 - y0) / (x1 - x0) * (x - x1)


@click.command()
@click.option("--rank", default=64)
@click.option("--sweeps", default=4)
@click.option("--largest", default=SHAPES[-1][2], help="Leave larger sizes out.")
def main(rank: int, sweeps: int, largest: int) -> None:
    """Print the table and save the raw figures."""
    spark = common.session()
    raw: list[dict[str, Any]] = []
    for users, items, ratings in SHAPES:
        if ratings > largest:
            continue
        frame = common.generated(spark, users, items, ratings)
        als = common.als_settings(rank, False, max_sweeps=sweeps, tol=1e-12)
        with common.PeakMemory() as memory:
            started = time.perf_counter()
            fitted = fit_factors(frame, als)
            seconds = time.perf_counter() - started
        summary = fitted.summary
        fitted.release()
        sizes = [run["ratings"] for run in raw]
        found = {
            "preparation": summary.encode_seconds,
            "sweep": min(report["seconds"] for report in summary.history),
        }
        run = {"users": users, "items": items, "ratings": ratings, "seconds": seconds, **found}
        run["peak memory, GiB"] = memory.gib
        run["history"] = summary.history
        if len(raw) >= 2:
            for name in found:
                run[f"predicted {name}"] = line(sizes, [old[name] for old in raw], ratings)
        raw.append(run)
        print({name: value for name, value in run.items() if name != "history"}, flush=True)
    spark.stop()
    head = ["ratings", "preparation", "sweep", "predicted preparation", "predicted sweep"]
    head.append("peak memory, GiB")
    common.table(head, [[run.get(name, "") for name in head] for run in raw])
    common.save(f"large-{rank}", {"rank": rank, "raw": raw})


if __name__ == "__main__":
    main()
