"""Fit a model to the ratings table and publish it as a new version."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

import click

from unlearn_spark.cli import JobContext, job, progress


@job("Fit factors to the ratings table and publish a model version.")
@click.option("--plot", metavar="PNG", help="Also draw the convergence.")
def main(context: JobContext, plot: str | None) -> dict[str, Any]:
    """Stops when no factor row's relative residual exceeds als.tol, or after als.max_sweeps.
    Progress goes to stderr; the last line on stdout is one JSON object."""
    from unlearn_spark import publishing
    from unlearn_spark.preconditions import require_picture
    from unlearn_spark.spark.training.training import fit_factors
    from unlearn_spark.tables import models, ratings, tombstones

    if plot:
        require_picture(plot)
    started = time.perf_counter()
    store, settings = context.store, context.settings
    store.require(ratings.TABLE)
    parent = models.newest(store)
    ratings_version = store.version(ratings.TABLE)
    tombstones_version = tombstones.version(store)
    receipts_version = parent.receipts_version if parent else None
    stored = ratings.retained(store, ratings_version, tombstones_version, receipts_version)
    warm = publishing.warm_start(store, settings.als.warm_start)
    fitted = fit_factors(
        stored.select("user_id", "item_id", "rating"),
        settings.als,
        settings.execution,
        warm_start=warm,
        on_sweep=lambda report: progress(report.line()),
    )
    summary = fitted.summary
    if not summary.converged:
        progress(
            f"stopped at als.max_sweeps = {settings.als.max_sweeps} with residual "
            f"{summary.max_residual:.2e}; als.tol = {settings.als.tol:.2e} was not reached"
        )
    version = publishing.publish_fit(
        store,
        fitted.to_publish(),
        settings.als,
        kind="train",
        parent=parent,
        ratings_version=ratings_version,
        tombstones_version=tombstones_version,
        ratings_ingest_id=ratings.newest_ingest(store, ratings_version),
    )
    if plot:
        from unlearn_spark.evaluation.plots import convergence

        convergence(summary.history, plot)
    fitted.release()
    figures = asdict(summary)
    figures.pop("history")
    return {
        "model_version": version.model_version,
        **figures,
        "seconds": time.perf_counter() - started,
    }
