"""Publish factors that were trained elsewhere as a model version of the ratings table."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from unlearn_spark.cli import JobContext, job, progress
from unlearn_spark.ingestion.factors import FORMATS

if TYPE_CHECKING:
    from unlearn_spark.config import AlsSettings
    from unlearn_spark.spark.training.adoption import AdoptedFit


@job("Import factors that were trained elsewhere and publish them as a model version.")
@click.option("--input", "path", required=True, metavar="DIR", help="The model; npz: or its file.")
@click.option(
    "--format",
    "form",
    required=True,
    type=click.Choice(FORMATS, case_sensitive=False),
    help="mllib: what ALSModel.save() of Spark MLlib wrote. parquet: user_factors and "
    "item_factors with columns id and factors. npz: NumPy arrays user_factors, item_factors, "
    "user_ids, item_ids.",
)
@click.option(
    "--converge",
    is_flag=True,
    help="Sweep until no residual exceeds als.tol, starting from the imported factors.",
)
def main(context: JobContext, path: str, form: str, converge: bool) -> dict[str, Any]:
    """The ratings table must have the ratings that the model was trained on: every residual is
    computed from them, and jobs/unlearn.py goes on from there. als.reg_param, als.implicit_prefs,
    als.alpha and als.nonnegative must be those of its training; als.rank is taken from the
    factors. Ratings that a deletion request covers are left out, as in training. A
    residual_before that is not finite is null."""
    from unlearn_spark import publishing
    from unlearn_spark.ingestion import factors as foreign
    from unlearn_spark.ingestion import formats
    from unlearn_spark.spark.training.adoption import adopt_factors
    from unlearn_spark.tables import models, ratings, tombstones

    formats.check_exists(path)
    store, settings = context.store, context.settings
    store.require(ratings.TABLE)
    parent = models.newest(store)
    ratings_version = store.version(ratings.TABLE)
    tombstones_version = tombstones.version(store)
    receipts_version = parent.receipts_version if parent else None
    stored = ratings.retained(store, ratings_version, tombstones_version, receipts_version)
    kinds = {side: stored.schema[f"{side}_id"].dataType for side in ("user", "item")}
    given = foreign.read_factors(context.spark, path, form, kinds)
    progress(f"{path}: {given.n_users} users and {given.n_items} items of rank {given.rank}")
    if given.rank != settings.als.rank:
        progress(f"als.rank = {settings.als.rank} is not used: the factors have {given.rank}")
    als = settings.als.model_copy(update={"rank": given.rank, "warm_start": None})
    adopted = adopt_factors(
        stored.select("user_id", "item_id", "rating"),
        given.user,
        given.item,
        als,
        settings.execution,
        converge=converge,
        on_scan=lambda residual: progress(
            f"largest residual {residual:.1e}: {residual / als.tol:.3g} times als.tol"
        ),
        on_sweep=lambda report: progress(report.line()),
    )
    tau = settings.unlearn.resolved(0.0).tau
    rows_over_tau = adopted.rows_over(tau)
    progress(_verdict(adopted, als, tau, rows_over_tau, converge))
    version = publishing.publish_fit(
        store,
        adopted.to_publish(),
        als,
        kind="import",
        parent=parent,
        ratings_version=ratings_version,
        tombstones_version=tombstones_version,
        ratings_ingest_id=ratings.newest_ingest(store, ratings_version),
    )
    adopted.release()
    figures = asdict(adopted.summary)
    figures.pop("history")
    if converge:
        before = adopted.residual_before
        figures["residual_before"] = before if math.isfinite(before) else None
        figures["rows_without_factors"] = adopted.without_factors
    return {
        "model_version": version.model_version,
        "rank": given.rank,
        **figures,
        "factors_without_ratings": adopted.without_ratings,
        "rows_over_tau": rows_over_tau,
    }


def _verdict(
    adopted: AdoptedFit, als: AlsSettings, tau: float, over: dict[str, int], swept: bool
) -> str:
    """What the residuals mean for the next nights, and what to do about it."""
    summary = adopted.summary
    if summary.converged:
        return f"converged: largest residual {summary.max_residual:.1e}, als.tol = {als.tol:.1e}"
    many = (
        f"{over['user']} of {summary.users} users and {over['item']} of {summary.items} items "
        f"exceed unlearn.tau = {tau:.1e}"
    )
    if swept:
        return (
            f"stopped at als.max_sweeps = {als.max_sweeps} with residual "
            f"{summary.max_residual:.1e}, not at als.tol = {als.tol:.1e}; {many}"
        )
    if not any(over.values()):
        return f"no residual exceeds unlearn.tau = {tau:.1e}: nights need no repair first"
    return (
        f"{many}: the first night will re-solve them and what they move. "
        "Run with --converge to do it now; if that is unexpected, check that als.reg_param, "
        "als.implicit_prefs and als.alpha are those it was trained with"
    )
