"""One sweep, the preparation before it and the memory of both, side by side with Spark MLlib.

    python benchmarks/sweep.py --ratings 10000000 --rank 64 --rounds 3
    python benchmarks/sweep.py --implicit --no-memory

The contestants alternate on the same Delta table in the same session; seconds are noisy, ratios
less so. In implicit mode the library implicit sweeps the same ratings, already in its memory.
A contestant's sweep is the difference of a longer and a one-sweep fit, divided by the sweeps in
between; what is left of the short fit is its preparation. Memory is measured apart, in a process
for each contestant, and as often: how much of its heap a JVM gives back differs from run to run.
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
from unlearn_spark.config import ExecutionSettings


def contestants(
    frame: Any, rank: int, implicit: bool, part_ratings: int
) -> dict[str, Callable[[int], float]]:
    """By name: fits with so many sweeps and returns the seconds."""
    from unlearn_spark.spark.training.training import fit_factors

    execution = ExecutionSettings(part_ratings=part_ratings)

    def ours(sweeps: int) -> float:
        als = common.als_settings(rank, implicit, max_sweeps=sweeps, tol=1e-12)
        fitted = fit_factors(frame, als, execution)
        history = fitted.summary.history
        fitted.release()
        # The scan of every row after it, which MLlib does not do, is not counted.
        return fitted.summary.encode_seconds + sum(report["seconds"] for report in history)

    def mllib(sweeps: int) -> float:
        als = common.mllib_als(common.als_settings(rank, implicit), sweeps)

        def fit() -> None:
            model = als.fit(frame)
            model.itemFactors.count()
            model.userFactors.count()

        return common.timed(fit)

    return {"ours": ours, "mllib": mllib}


def of_the_library(frame: Any, rank: int) -> dict[str, Callable[[int], float]]:
    """The same of the library implicit, on the ratings in this process's memory."""
    ratings = common.numbered(frame.toArrow())
    return {
        name: common.library_fit(ratings, rank, common.REG_PARAM, common.ALPHA, cg)
        for name, cg in (("library, Cholesky", False), ("library, 3 CG steps", True))
    }


@click.command()
@common.sweep_options
@click.option("--rounds", default=3)
@click.option("--sweeps", default=3, help="More than one, in the longer fit.")
@click.option("--implicit/--explicit", default=False)
@click.option("--memory/--no-memory", default=True)
@click.option("--only", help="Fit this contestant alone, once; for the memory.")
def main(
    rounds: int, sweeps: int, implicit: bool, memory: bool, only: str | None, **swept: int
) -> None:
    """Print the table and save the raw figures."""
    spark = common.session()
    frame = common.generated(spark, swept["users"], swept["items"], swept["ratings"])
    fits = contestants(frame, swept["rank"], implicit, swept["part_ratings"])
    if only:
        fits[only](1 + sweeps)
        return
    if implicit:  # not before: it would count into a Spark contestant's memory
        fits.update(of_the_library(frame, swept["rank"]))
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
        command = [sys.executable, __file__, "--implicit" if implicit else "--explicit"]
        command += common.as_options(swept)
        for _ in range(rounds):
            for name in ("ours", "mllib"):
                peak = common.peak_memory([*command, f"--only={name}"])
                raw[name].setdefault("memory", []).append(peak)
        for name in ("ours", "mllib"):
            figures[name]["peak memory, GiB"] = statistics.median(raw[name]["memory"])
    ratios = {
        name: {key: theirs[key] / value for key, value in figures["ours"].items() if key in theirs}
        for name, theirs in figures.items()
        if name != "ours"
    }
    common.table(
        ["figure", *figures, *[f"{name} / ours" for name in ratios]],
        [
            [key, *[found.get(key, "") for found in (*figures.values(), *ratios.values())]]
            for key in figures["ours"]
        ],
    )
    name = "sweep-{mode}-{ratings}-{rank}-{part_ratings}"
    common.save(
        name.format(mode="implicit" if implicit else "explicit", **swept),
        {
            "data": {**swept, "rounds": rounds},
            "raw": raw,
            "figures": figures,
            "over_ours": ratios,
        },
    )


if __name__ == "__main__":
    main()
