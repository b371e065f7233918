"""Fit a model to the ratings table and publish it as a new version."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from unlearn_spark.cli import job
from unlearn_spark.recommender import Recommender


@job("Fit factors to the ratings table and publish a model version.")
@click.option("--plot", metavar="PNG", help="Also draw the convergence.")
def main(recommender: Recommender, plot: str | None) -> Mapping[str, Any]:
    """Stops when no factor row's relative residual exceeds als.tol, or after als.max_sweeps.
    Progress goes to stderr; the last line on stdout is one JSON object."""
    return recommender.train(plot)
