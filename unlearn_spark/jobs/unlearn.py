"""Honour all pending deletion requests and publish a new model version."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unlearn_spark.cli import job
from unlearn_spark.recommender import Recommender


@job("Honour all pending deletion requests and publish a new model version.")
def main(recommender: Recommender) -> Mapping[str, Any]:
    """Takes the requested ratings out of the model and of the ratings table, re-solves only the
    rows that this disturbed, and publishes factors whose residual is within unlearn.tau on every
    row. The same pass folds in ratings that were ingested meanwhile. Without a pending request
    nothing is written. Exit code 1 after publishing: als.max_sweeps ended the work above tau."""
    return recommender.unlearn()
