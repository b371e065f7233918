"""Publish an earlier model version again.

spark-submit jobs/rollback.py --root /data/recommender --to 3
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from unlearn_spark.cli import JobContext, job, run


@job("Publish an earlier model version again, as the newest one.")
@click.option("--to", "target", type=int, required=True, help="The model version to go back to.")
def main(context: JobContext, target: int) -> dict[str, Any]:
    """Nothing is deleted: every version stays readable. A version from before an honoured
    deletion is refused, because it still knows what was forgotten."""
    from unlearn_spark.publishing import roll_back

    version = roll_back(context.store, target)
    return {
        "model_version": version.model_version,
        "parent": version.parent,
        "rolled_back_to": target,
    }


if __name__ == "__main__":
    run(main)
