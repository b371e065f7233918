"""The whole story on one machine: ratings in, a model, recommendations, forgetting, an audit."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from unlearn_spark.cli import job, progress
from unlearn_spark.errors import SettingsError
from unlearn_spark.ingestion import rules
from unlearn_spark.recommender import Recommender

SIZE = {"users": 20_000, "items": 4_000, "ratings": 1_000_000}
"""Generated ratings: so many that retraining takes visibly longer than forgetting."""

SAMPLE = 20_000
"""Ratings among which those of the requests are looked for, to compare their scores."""


def step(title: str, command: str, run: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any]:
    """Run a job, and say what it was, how it is called, and how long it took."""
    progress(f"\n== {title}\n   {command}")
    started = time.perf_counter()
    result = run()
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
    type=click.Choice(rules.FORMATS, case_sensitive=False),
    default="csv",
    show_default=True,
    help="Format of --input.",
)
def main(recommender: Recommender, source: str | None, kind: str) -> Mapping[str, Any]:
    """Leaves its tables, the requests and two pictures (the convergence of the training, the scores
    of forgotten entries) under the root."""
    from unlearn_spark.evaluation import plots, synthetic
    from unlearn_spark.tables.store import check_root

    started = time.perf_counter()
    settings = recommender.settings
    if settings.root is None:
        raise SettingsError("the demo needs --root DIR, in which it leaves its tables")
    if source is not None:
        rules.check_exists(source)
    check_root(settings)
    root = Path(settings.root)
    root.mkdir(parents=True, exist_ok=True)
    common = f"--root {root}"

    if source is None:
        source, kind = str(root / "generated.parquet"), "parquet"
        made = " ".join(f"--{name} {number}" for name, number in SIZE.items())
        step(
            "Ratings with a long tail",
            f"unlearn-spark generate_ratings {made} --seed 1 --output {source}",
            lambda: vars(synthetic.write(**SIZE, seed=1, output=source)),
        )
    step(
        "Into Delta",
        f"unlearn-spark ingest_ratings {common} --input {source} --format {kind}",
        lambda: recommender.ingest_ratings(source, kind),
    )
    picture = str(root / "convergence.png")
    step(
        "Train and publish",
        f"unlearn-spark train {common} --plot {picture}",
        lambda: recommender.train(picture),
    )
    history = recommender.model().metrics["history"]
    progress(
        f"   residual by sweep (log): {plots.sparkline(history, log=True)}   picture: {picture}"
    )
    step(
        "Top-N for everybody",
        f"unlearn-spark recommend {common} --top 5",
        lambda: recommender.recommend(5),
    )

    sample = recommender.engine.sample(SAMPLE)
    asked = root / "tombstones.csv"
    requests, covered = choose_requests(sample)
    asked.write_text(requests)
    step(
        "Three users, an item, a pair and a window are to be forgotten",
        f"unlearn-spark ingest_tombstones {common} --input {asked}",
        lambda: recommender.ingest_tombstones(str(asked)),
    )
    before = recommender.model().model_version
    forgot = step(
        "Forget, and mend what that disturbed",
        f"unlearn-spark unlearn {common}",
        lambda: recommender.unlearn(),
    )
    audited = step(
        "Check every row from the ratings that remain",
        f"unlearn-spark audit {common}",
        lambda: recommender.audit(),
    )
    retrained = step(
        "For comparison, train anew without them",
        f"unlearn-spark train {common}",
        lambda: recommender.train(),
    )
    versions = {
        "before": before,
        "unlearned": forgot["model_version"],
        "retrained": retrained["model_version"],
    }
    scores = draw_scores(recommender, covered, versions, root / "forgotten.png")
    progress(
        f"\nForgetting: {forgot['rows_resolved']} rows re-solved, blocks written "
        f"{forgot['blocks_written']} of {forgot['blocks_total']}, {forgot['work_sweeps']:.3f} "
        f"sweeps of arithmetic, {forgot['seconds']:.1f} s.\n"
        f"Retraining: {retrained['sweeps']} sweeps, {retrained['seconds']:.1f} s.\n"
        f"Certificate: largest residual {audited['max_residual']}, tolerance {audited['tau']}, "
        f"ratings that should be gone: {audited['tombstoned_ratings_found']}.\n"
        f"Scores of what was forgotten (means): {scores}"
    )
    return {
        "model_version": forgot["model_version"],
        "work_sweeps": forgot["work_sweeps"],
        "max_residual": audited["max_residual"],
        "seconds": time.perf_counter() - started,
        "engine": recommender.engine.name,
    }


def choose_requests(sample: pa.Table) -> tuple[str, pa.Table]:
    """Requests of every deleting scope as csv, and the sampled ratings of the pair and the window,
    whose users and items stay.

    The window has the later half of the ratings of the user that the sample has most of.
    """
    rows = sample.slice(0, 5).to_pylist()
    while len(rows) < 5:  # few ratings: several requests may name the same
        rows.append(rows[-1])
    lines = ["request_id,scope,user_id,item_id,from_ts,to_ts"]
    users = [quoted(row["user_id"]) for row in rows[:3]]
    lines += [f"forget-user-{n},user,{user},,," for n, user in enumerate(users)]
    lines += [f"forget-item,item,,{quoted(rows[3]['item_id'])},,"]
    pair = rows[4]
    lines += [f"forget-pair,rating,{quoted(pair['user_id'])},{quoted(pair['item_id'])},,"]
    covered = sample.slice(4, 1)
    counts = Counter(sample["user_id"].to_pylist())
    busiest = max(counts, key=lambda user: (counts[user], str(user)))
    mine = sample.filter(pc.equal(sample["user_id"], busiest))
    times = sorted(mine["rated_at"].drop_null().to_pylist())
    if times:  # ratings without times are in no window
        start = times[len(times) // 2]
        window = f"{start.isoformat()},{datetime.now(UTC).isoformat()}"
        lines += [f"forget-window,window,{quoted(busiest)},,{window}"]
        later = pc.fill_null(pc.greater_equal(mine["rated_at"], start), False)
        covered = pa.concat_tables([covered, mine.filter(later)])
    return "\n".join(lines) + "\n", covered


def quoted(id: object) -> str:
    """An id as a value of csv."""
    return '"' + str(id).replace('"', '""') + '"'


def draw_scores(
    recommender: Recommender, pairs: pa.Table, versions: Mapping[str, int], path: Path
) -> dict[str, float] | None:
    """Draw the scores of deleted entries whose user and item all three versions have.

    Returns their means before, unlearned and retrained; None without such entries.
    """
    from unlearn_spark.evaluation import plots

    columns = {
        name: recommender.predict(
            pairs["user_id"].to_pylist(), pairs["item_id"].to_pylist(), version
        )
        for name, version in versions.items()
    }
    known = np.all([np.isfinite(values) for values in columns.values()], axis=0)
    if not known.any():
        return None
    columns = {name: values[known] for name, values in columns.items()}
    picture = plots.scores(columns["before"], columns["unlearned"], columns["retrained"], path)
    progress(f"   picture: {picture}")
    return {name: round(float(values.mean()), 3) for name, values in columns.items()}
