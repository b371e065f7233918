"""Fold ratings ingested since the published version into the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unlearn_spark.cli import job
from unlearn_spark.recommender import Recommender


@job("Fold ratings ingested since the published version into the model.")
def main(recommender: Recommender) -> Mapping[str, Any]:
    """Adds new users and items, replaces corrected ratings, and honours pending deletion requests
    by the same pass. Without anything new nothing is written. Exit code 1 after publishing:
    als.max_sweeps ended the work above tau."""
    return recommender.update()
