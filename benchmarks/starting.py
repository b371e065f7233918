"""A night in a process of its own, as a scheduler starts it: most of it is Java getting warm.

    python benchmarks/starting.py --forget 1 --forget 70 --repeat 2

Nights of the same requests by turns, each a new process and a new JVM on a copy of one model's
tables: with the product's defaults, and with the first of Java's two compilers alone. An ingestion
of all ratings shows what that costs where there are many rows.
"""

from __future__ import annotations

import json
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import click
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import common
from benchmarks.forgetting import JOBS, requests
from unlearn_spark.evaluation import synthetic

FIRST_COMPILER = "spark.conf.spark.driver.extraJavaOptions=-XX:TieredStopAtLevel=1"


def run(name: str, root: Path, *arguments: str) -> dict[str, Any]:
    """Run a job in a process of its own; its figures."""
    command = [sys.executable, str(JOBS / f"{name}.py"), "--root", str(root), *arguments]
    memory = ("--set", f"spark.driver_memory={common.DRIVER_MEMORY}")
    done = subprocess.run([*command, *memory], stdout=subprocess.PIPE, text=True, check=True)
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


@click.command()
@click.option("--users", default=70_000)
@click.option("--items", default=10_700)
@click.option("--ratings", "size", default=10_000_000)
@click.option("--rank", default=64)
@click.option("--forget", "amounts", multiple=True, type=int, default=(1, 70))
@click.option("--repeat", default=2)
def main(
    users: int, items: int, size: int, rank: int, amounts: tuple[int, ...], repeat: int
) -> None:
    """Print the table and save the raw figures."""
    raw: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="unlearn-bench-") as name:
        folder = Path(name)
        source = str(folder / "ratings.parquet")
        synthetic.write(users, items, size, 1, source)
        ingestion = ("--input", source, "--format", "parquet")
        model, copy = folder / "model", folder / "copy"
        run("ingest_ratings", model, *ingestion)
        run("train", model, "--set", f"als.rank={rank}")
        everybody = pq.read_table(source, columns=["user_id"])["user_id"].unique().to_pylist()
        ways = {"defaults": (), "first compiler": ("--set", FIRST_COMPILER)}

        def measured(what: str, way: str, job: str, *arguments: str) -> None:
            seconds = common.timed(partial(run, job, copy, *arguments, *ways[way]))
            raw.append({"what": what, "way": way, "seconds": seconds})
            click.echo(raw[-1], err=True)

        for amount in amounts:
            asked = folder / f"asked-{amount}"
            shutil.copytree(model, asked)
            some = random.Random(amount).sample(sorted(everybody), amount)
            path = requests(folder / "requests.csv", some)
            run("ingest_tombstones", asked, "--input", str(path))
            for _ in range(repeat):
                for way in ways:
                    shutil.rmtree(copy, ignore_errors=True)
                    shutil.copytree(asked, copy)
                    measured(f"a night of {amount} users", way, "unlearn")
        for _ in range(repeat):
            for way in ways:
                shutil.rmtree(copy)
                measured("ingestion of all ratings", way, "ingest_ratings", *ingestion)
    rows = []
    for what in dict.fromkeys(row["what"] for row in raw):
        for way in ways:
            found = [row["seconds"] for row in raw if (row["what"], row["way"]) == (what, way)]
            rows.append([what, way, statistics.median(found)])
    common.table(["what", "Java", "s, median"], rows)
    common.save("starting", {"raw": raw})


if __name__ == "__main__":
    main()
