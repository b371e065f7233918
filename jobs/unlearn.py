"""Honour all pending deletion requests and publish a new model version.

spark-submit jobs/unlearn.py --root /data/recommender
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from unlearn_spark.cli import JobContext, job, progress, run


@job("Honour all pending deletion requests and publish a new model version.")
def main(context: JobContext) -> dict[str, Any]:
    """Takes the requested ratings out of the model and of the ratings table, re-solves only the
    rows that this disturbed, and publishes factors whose residual is within unlearn.tau on every
    row. Ratings ingested meanwhile are folded in by the same pass. Nothing pending: nothing
    written."""
    from unlearn_spark.spark.night.night import run_night

    return run_night(context.store, context.settings, progress, kind="unlearn")


if __name__ == "__main__":
    run(main)
