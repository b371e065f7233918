"""Publish an earlier model version again."""

from __future__ import annotations

from typing import Any

import click

from unlearn_spark.cli import JobContext, job


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
