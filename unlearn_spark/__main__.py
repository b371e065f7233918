"""`unlearn-spark JOB ...`: every job as a subcommand."""

from __future__ import annotations

import click

from unlearn_spark.cli import run
from unlearn_spark.jobs import (
    audit,
    demo,
    evaluate,
    generate_ratings,
    import_model,
    ingest_ratings,
    ingest_tombstones,
    recommend,
    rollback,
    train,
    unlearn,
    update,
)

JOBS = {
    "audit": audit.main,
    "demo": demo.main,
    "evaluate": evaluate.main,
    "generate_ratings": generate_ratings.main,
    "import_model": import_model.main,
    "ingest_ratings": ingest_ratings.main,
    "ingest_tombstones": ingest_tombstones.main,
    "recommend": recommend.main,
    "rollback": rollback.main,
    "train": train.main,
    "unlearn": unlearn.main,
    "update": update.main,
}

commands = click.Group(
    "unlearn-spark", JOBS, help="Matrix factorisation that can forget. One subcommand for each job."
)


def main() -> None:
    """Entry point of the command `unlearn-spark`."""
    run(commands)


if __name__ == "__main__":
    main()
