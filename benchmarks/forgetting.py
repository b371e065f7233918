"""What a night of deletions costs: arithmetic, wall-clock against retraining, and bytes read.

    python benchmarks/forgetting.py --ratings 1000000 --ratings 10000000 --forget 1 --forget 70
    python benchmarks/forgetting.py --users 480189 --items 17770 --ratings 100500000 \
        --forget 1 --forget 100 --direct resolve --no-retrain

Every night starts from the same trained model (a copy of its tables), in one warm session; training
and nights are the product's own jobs, publishing included.
"""

from __future__ import annotations

import importlib.util
import random
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import click

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import common
from unlearn_spark.evaluation import synthetic

DIRECT_ROWS = ("threshold", "resolve")
NIGHT_FIGURES = ("work_sweeps", "rounds", "sweeps", "seconds")
JOBS = Path(__file__).resolve().parent.parent / "jobs"


def job(name: str, root: Path, *arguments: str, sets: tuple[str, ...] = ()) -> dict[str, Any]:
    """Run a job in this process; its figures."""
    spec = importlib.util.spec_from_file_location(name, JOBS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    words = ["--root", str(root), *[word for value in sets for word in ("--set", value)]]
    figures: dict[str, Any] = module.main.main(args=[*words, *arguments], standalone_mode=False)
    return figures


class BytesRead:
    """Bytes that Spark's tasks read from files and caches (classic sessions only)."""

    def __init__(self, spark: Any) -> None:
        # Else threads of Parquet's own read most of a file, whose bytes no task counts.
        spark.conf.set("parquet.hadoop.vectored.io.enabled", "false")
        self.jvm = spark.sparkContext._jvm
        self.store = spark.sparkContext._jsc.sc().statusStore()
        self.gateway = spark.sparkContext._gateway

    def total(self) -> dict[int, int]:
        nothing = self.jvm.java.util.ArrayList()
        quantiles = self.gateway.new_array(self.jvm.double, 0)
        stages = self.store.stageList(nothing, False, False, quantiles, nothing)
        return {
            stages.apply(n).stageId(): stages.apply(n).inputBytes() for n in range(stages.size())
        }


def requests(path: Path, users: list[int]) -> Path:
    """A file that asks for these users to be forgotten."""
    lines = ["request_id,scope,user_id,item_id,from_ts,to_ts,requested_at"]
    lines += [f"forget-{user},user,{user},,,,1900000000" for user in users]
    path.write_text("\n".join(lines) + "\n")
    return path


def users_of(spark: Any, root: Path) -> list[int]:
    """The users of the model there, ascending."""
    rows = spark.read.format("delta").load(str(root / "user_factors")).select("id")
    return sorted(row[0] for row in rows.toLocalIterator())


NIGHTS_HEAD = [
    *("night", "requests", "ratings", "rows re-solved", "rounds", "sweeps", "work, sweeps", "s"),
    *("largest residual", "ledger holds", "audit holds"),
]


def nights_in_a_row(
    root: Path, everybody: list[int], nights: int, a_night: int, sets: tuple[str, ...]
) -> list[list[Any]]:
    """Forget so many users on each of some nights, each followed by an audit; a row of
    `NIGHTS_HEAD` for each."""
    order = random.Random(1).sample(sorted(everybody), nights * a_night)
    rows: list[list[Any]] = []
    for night in range(nights):
        path = root.parent / "requests.csv"
        asked = requests(path, order[night * a_night : (night + 1) * a_night])
        job("ingest_tombstones", root, "--input", str(asked))
        done = job("unlearn", root, sets=sets)
        audit = job("audit", root, sets=sets)
        rows.append(
            [
                night + 1,
                done["requests"],
                done["ratings_removed"],
                sum(done["rows_resolved"].values()),
                done["rounds"],
                done["sweeps"],
                done["work_sweeps"],
                done["seconds"],
                max(audit["max_residual"].values()),
                audit["ledger_holds"],
                audit["holds"],
            ]
        )
        shown = zip(NIGHTS_HEAD, rows[-1], strict=True)
        click.echo(", ".join(f"{name} {value}" for name, value in shown), err=True)
    return rows


def medians(raw: list[dict[str, Any]]) -> list[list[Any]]:
    """A row for each kind of night: medians, but the largest residual."""
    kinds: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for run in raw:
        kinds.setdefault((run["ratings"], run["forget"], run["direct_rows"]), []).append(run)
    rows = []
    for kind, runs in kinds.items():
        nights = [run["night"] for run in runs]
        figures = [[night[name] for night in nights] for name in NIGHT_FIGURES]
        figures.append([run["night"]["seconds"] / run["training_seconds"] for run in runs])
        figures.append([run["bytes_read"] / 2**20 for run in runs])
        worst = max(night["max_residual"] for night in nights)
        rows.append([*kind, *map(statistics.median, figures), worst])
    return rows


@click.command()
@click.option("--users", default=70_000)
@click.option("--items", default=10_700)
@click.option("--ratings", "sizes", multiple=True, type=int, default=(1_000_000, 10_000_000))
@click.option("--rank", default=64)
@click.option("--forget", "amounts", multiple=True, type=int, default=(1, 70, 7000))
@click.option("--implicit/--explicit", default=False)
@click.option("--input", "path", type=click.Path(exists=True), help="MovieLens csv instead.")
@click.option(
    "--direct",
    "directs",
    type=click.Choice(DIRECT_ROWS),
    multiple=True,
    default=DIRECT_ROWS,
    help="How rows that lost a rating are judged.",
)
@click.option("--repeat", default=1, help="Nights of each kind; medians are shown.")
@click.option(
    "--retrain/--no-retrain",
    default=True,
    help="Compare with one more training, as warm as the nights were, or with the first.",
)
def main(
    users: int,
    items: int,
    sizes: tuple[int, ...],
    rank: int,
    amounts: tuple[int, ...],
    implicit: bool,
    path: str | None,
    directs: tuple[str, ...],
    repeat: int,
    retrain: bool,
) -> None:
    """Print the table and save the raw figures."""
    spark = common.session(**{"spark.ui.retainedStages": 20000})
    reading = BytesRead(spark)
    folder = Path(tempfile.mkdtemp(prefix="unlearn-bench-"))
    sets = (f"als.rank={rank}", f"als.implicit_prefs={str(implicit).lower()}", "als.alpha=10")
    raw: list[dict[str, Any]] = []
    for size in sizes if path is None else (0,):
        root = folder / f"root-{size}"
        if path is None:
            source = str(folder / f"ratings-{size}.parquet")
            synthetic.write(users, items, size, 1, source)
            job("ingest_ratings", root, "--input", source, "--format", "parquet")
        else:
            job("ingest_ratings", root, "--input", path, "--format", "movielens")
        with common.PeakMemory() as training_memory:
            trained = job("train", root, sets=sets)
        click.echo({**trained, "gib": training_memory.gib}, err=True)
        everybody = users_of(spark, root)
        for turn in range(repeat):
            for amount in amounts:
                for direct in directs:
                    copy = folder / "night"
                    shutil.rmtree(copy, ignore_errors=True)
                    shutil.copytree(root, copy)
                    some = random.Random(turn).sample(everybody, amount)
                    asked = requests(folder / "requests.csv", some)
                    job("ingest_tombstones", copy, "--input", str(asked))
                    before = reading.total()
                    with common.PeakMemory() as memory:
                        night = job("unlearn", copy, sets=(f"unlearn.direct_rows={direct}",))
                    after = reading.total()
                    raw.append(
                        {
                            "ratings": trained["ratings"],
                            "forget": amount,
                            "direct_rows": direct,
                            "night": night,
                            "bytes_read": sum(after[s] for s in after.keys() - before.keys()),
                            "gib": memory.gib,
                            "training": trained,
                            "training_gib": training_memory.gib,
                            "training_seconds": trained["seconds"],
                        }
                    )
                    click.echo(raw[-1], err=True)
        if retrain:
            again = job("train", root, sets=sets)
            for row in raw:
                if row["ratings"] == trained["ratings"]:
                    row["training_seconds"] = again["seconds"]
    spark.stop()
    head = "ratings|users|direct rows|work, sweeps|rounds|swept|s|of retraining|MB read|residual"
    common.table(head.split("|"), medians(raw))
    name = "nights" if path is None and len(sizes) == 1 else "forgetting"  # with growth
    name += f"-{'implicit' if implicit else 'explicit'}"
    name += f"-{'real' if path else max(sizes)}-{rank}"
    common.save(name, {"raw": raw})


if __name__ == "__main__":
    main()
