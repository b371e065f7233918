"""Both engines on the same ratings: whole jobs, each in a new process, by turns.

    python benchmarks/engines.py                          # 10M ratings, both engines
    python benchmarks/engines.py --engine embedded --ratings 100500000 --users 480189 --items 17770

Nights forget users drawn at random; each starts from the version that the one before published.
The last step trains and runs nights in one process, as a service does, where imports, kernels and
connections are paid for already.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import unlearn_spark
from benchmarks import common
from unlearn_spark.evaluation import synthetic
from unlearn_spark.recommender import Recommender, silent

Figures = dict[str, Any]

MOST_IN_ONE_PROCESS = 20_000_000
"""Most ratings for which four trainings in one process are worth their time."""


def run_job(name: str, *words: str) -> Figures:
    """Run a job in a new process; its JSON, with its wall clock and the peak memory of it and of
    its children."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "unlearn_spark", name, *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    with common.PeakMemory(process.pid) as memory:
        assert process.stdout is not None
        output = process.stdout.read().decode()
        process.wait()
    seconds = time.perf_counter() - started
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: exit code {process.returncode}")
    return {**json.loads(output.splitlines()[-1]), "wall": seconds, "peak_gib": memory.gib}


def requests(users: Sequence[Any] | np.ndarray, name: str) -> pa.Table:
    """A request for each of these users."""
    return pa.table(
        {
            "request_id": [f"{name}-{user}" for user in users],
            "scope": ["user"] * len(users),
            "user_id": [str(user) for user in users],
        }
    )


class Line:
    """The jobs of one engine on one root."""

    def __init__(self, engine: str, root: Path, sets: Sequence[str], seed: int) -> None:
        words = [word for value in sets for word in ("--set", value)]
        self.words = ["--root", str(root), "--engine", engine, *words]
        self.root, self.random, self.nights = root, np.random.default_rng(seed), 0

    def job(self, name: str, *words: str) -> Figures:
        return run_job(name, *self.words, *words)

    def forget(self, n: int, users: np.ndarray, direct: str) -> Figures:
        """Have requests of n users accepted, and honour them."""
        self.nights += 1
        chosen = self.random.choice(users, n, replace=False).tolist()
        path = self.root.parent / f"{self.root.name}-{self.nights}.parquet"
        pq.write_table(requests(chosen, f"night-{self.nights}"), path)
        asked = self.job("ingest_tombstones", "--input", str(path))
        night = self.job("unlearn", "--set", f"unlearn.direct_rows={direct}")
        return {**night, "users": n, "direct": direct, "accepting": asked["wall"]}


def in_one_process(root: Path, sets: dict[str, Any], users: np.ndarray, seed: int) -> Figures:
    """Seconds of a training and of nights in a process that has done both before."""
    shop: Recommender = unlearn_spark.open(str(root), "embedded", progress=silent, **sets)
    random, found = np.random.default_rng(seed), []
    for turn in range(4):
        started = time.perf_counter()
        shop.train()
        row = {"train": time.perf_counter() - started}
        for n in (1, 70):
            shop.ingest_tombstones(
                requests(random.choice(users, n, replace=False), f"{seed}-{turn}-{n}")
            )
            started = time.perf_counter()
            shop.unlearn()
            row[f"forget {n}"] = time.perf_counter() - started
        found.append(row)
    return {name: statistics.median(row[name] for row in found[1:]) for name in found[0]}


@click.command()
@click.option("--users", default=70_000)
@click.option("--items", default=10_000)
@click.option("--ratings", default=10_000_000)
@click.option("--rank", default=64)
@click.option("--engine", "engines", multiple=True, default=["embedded", "spark"])
@click.option("--rounds", default=1, help="Each engine's turns.")
@click.option("--forget", multiple=True, default=[1, 70])
@click.option("--threads", default=None, type=int, help="execution.threads")
def main(
    users: int,
    items: int,
    ratings: int,
    rank: int,
    engines: Sequence[str],
    rounds: int,
    forget: Sequence[int],
    threads: int | None,
) -> None:
    """Compare the engines; prints medians and writes benchmarks/results/engines-*.json."""
    folder = Path(tempfile.mkdtemp(prefix="unlearn-bench-"))
    source = folder / "ratings.parquet"
    synthetic.write(users, items, ratings, 1, source)
    ids = np.unique(pq.read_table(source, columns=["user_id"])["user_id"].to_numpy())
    settings: dict[str, Any] = {"rank": rank, "reg_param": common.REG_PARAM}
    sets = [f"als.{name}={value}" for name, value in settings.items()]
    sets.append("execution.memory=1t")  # the peak is measured, not limited
    if threads is not None:
        sets.append(f"execution.threads={threads}")
    found: dict[str, list[Figures]] = {engine: [] for engine in engines}
    try:
        for turn in range(rounds):
            for engine in engines:
                root = folder / f"{engine}-{turn}"
                line = Line(engine, root, sets, seed=turn)
                steps: Figures = {
                    "ingest": line.job(
                        "ingest_ratings", "--input", str(source), "--format", "parquet"
                    ),
                    "train": line.job("train"),
                }
                for n in forget:
                    for direct in ("threshold", "resolve"):
                        steps[f"forget {n} {direct}"] = line.forget(n, ids, direct)
                steps["audit"] = line.job("audit")
                steps["recommend"] = line.job("recommend", "--top", "10")
                found[engine].append(steps)
                for name, figures in steps.items():
                    print(
                        f"{engine} {turn}: {name}: {figures['wall']:.1f} s, "
                        f"{figures['peak_gib']:.2f} GiB, load {os.getloadavg()[0]:.1f}",
                        flush=True,
                    )
        warm = None
        if "embedded" in engines and ratings <= MOST_IN_ONE_PROCESS:
            warm = in_one_process(folder / "embedded-0", settings, ids, seed=99)
            print(f"embedded, one process: {warm}", flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    medians = {
        engine: {
            name: {
                key: statistics.median(float(turn[name][key]) for turn in turns)
                for key in ("wall", "peak_gib")
            }
            for name in turns[0]
        }
        for engine, turns in found.items()
    }
    head = ["step", *[f"{engine}, s (GiB)" for engine in engines]]
    common.table(
        head,
        [
            [
                name,
                *[
                    f"{medians[engine][name]['wall']:.1f} ({medians[engine][name]['peak_gib']:.2f})"
                    for engine in engines
                ],
            ]
            for name in medians[engines[0]]
        ],
    )
    common.save(
        f"engines-{ratings}-{rank}",
        {
            "users": users,
            "items": items,
            "ratings": ratings,
            "rank": rank,
            "medians": medians,
            "one_process": warm,
            "runs": found,
        },
    )


if __name__ == "__main__":
    main()
