"""Fold ratings ingested since the published version into the model."""

from __future__ import annotations

from typing import Any

from unlearn_spark.cli import JobContext, job, progress


@job("Fold ratings ingested since the published version into the model.")
def main(context: JobContext) -> dict[str, Any]:
    """New users and items come in, corrected ratings replace the old ones, and pending deletion
    requests are honoured by the same pass. Nothing new: nothing written."""
    from unlearn_spark.spark.night.night import run_night

    return run_night(context.store, context.settings, progress, kind="update")
