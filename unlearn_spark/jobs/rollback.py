"""Publish an earlier model version again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from unlearn_spark.cli import job
from unlearn_spark.recommender import Recommender


@job("Publish an earlier model version again, as the newest one.")
@click.option("--to", "target", type=int, required=True, help="The model version to go back to.")
def main(recommender: Recommender, target: int) -> Mapping[str, Any]:
    """Nothing is deleted: every version stays readable. A version from before an honoured
    deletion is refused, because it still knows what was forgotten."""
    return recommender.rollback(target)
