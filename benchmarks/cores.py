"""A sweep on one core and on all: how much of it runs in parallel.

    python benchmarks/cores.py --ratings 10000000 --rank 64

Every number of cores has a process of its own, which is bound to so many, its JVM and workers with
it. They alternate. In the same minutes our kernel without Spark sweeps the same ratings, in as many
processes: how much faster that gets is what the machine has to give. (Of a virtual machine's cores,
two may be one.)
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import click
import numpy as np
from threadpoolctl import threadpool_limits

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import common, kernels
from unlearn_spark.config import ExecutionSettings


def sweep_seconds(
    cores: int, users: int, items: int, ratings: int, rank: int, part_ratings: int
) -> dict[str, float]:
    """The least of eight sweeps, of the kernel alone and of a second fit in a session, both bound
    to so many cores."""
    from unlearn_spark.spark.training.training import fit_factors

    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    sides = kernels.sides_of(*kernels.entries(users, items, ratings))
    fixed = kernels.some_factors(sides, rank, np.random.default_rng(1))
    with threadpool_limits(1, "blas"):
        alone = min(kernels.sweeps("ours", sides, fixed, False, 8))
    spark = common.session(**{"spark.master": f"local[{cores}]"})
    frame = common.generated(spark, users, items, ratings)
    als = common.als_settings(rank, False, max_sweeps=8, tol=1e-12)
    for _ in range(2):
        fitted = fit_factors(frame, als, ExecutionSettings(part_ratings=part_ratings))
        history = fitted.summary.history
        fitted.release()
    spark.stop()
    return {"on Spark": min(report["seconds"] for report in history), "kernel alone": alone}


@click.command()
@common.sweep_options
@click.option("--rounds", default=2)
@click.option("--only", type=int, help="Print the seconds on so many cores.")
def main(rounds: int, only: int | None, **swept: int) -> None:
    """Print the table and save the raw figures."""
    if only:
        print(json.dumps(sweep_seconds(only, **swept)))
        return
    every = len(os.sched_getaffinity(0))
    command = [sys.executable, __file__, *common.as_options(swept)]
    raw: dict[int, dict[str, list[float]]] = {1: {}, every: {}}
    for _ in range(rounds):
        for cores, seconds in raw.items():
            done = subprocess.run(
                [*command, f"--only={cores}"], check=True, stdout=subprocess.PIPE, text=True
            )
            for name, value in json.loads(done.stdout.splitlines()[-1]).items():
                seconds.setdefault(name, []).append(value)
    medians = {
        (name, cores): statistics.median(values)
        for cores, seconds in raw.items()
        for name, values in seconds.items()
    }
    common.table(
        ["sweep", "cores", "s", "faster than one"],
        [
            [name, cores, median, medians[name, 1] / median]
            for (name, cores), median in sorted(medians.items())
        ],
    )
    name = "cores-{ratings}-{rank}-{part_ratings}".format(**swept)
    common.save(name, {"raw": raw})


if __name__ == "__main__":
    main()
