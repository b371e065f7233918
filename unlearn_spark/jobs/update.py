"""Fold ratings ingested since the published version into the model."""

from __future__ import annotations

from typing import Any

from unlearn_spark.cli import JobContext, job, progress


@job("Fold ratings ingested since the published version into the model.")
def main(context: JobContext) -> dict[str, Any]:
    """Adds new users and items, replaces corrected ratings, and honours pending deletion requests
    by the same pass. Without anything new nothing is written. Exit code 1 after publishing:
    als.max_sweeps ended the work above tau."""
    from unlearn_spark.spark.night.night import run_night

    return run_night(context.store, context.settings, progress, kind="update")
