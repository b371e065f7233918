"""Check the promises of a published model against the ratings themselves."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from unlearn_spark.audit.deletion import find_deletion, held_out_ratings
from unlearn_spark.audit.report import tables_of
from unlearn_spark.cli import JobContext, job, progress
from unlearn_spark.errors import SettingsError

if TYPE_CHECKING:
    from unlearn_spark.tables.models import ModelVersion


@job("Check every factor row of a published model against the retained ratings.")
@click.option("--model-version", type=int, help="A published version.  [default: the newest]")
@click.option(
    "--retrain",
    is_flag=True,
    help="Also train models without the deleted ratings, and compare this one with them.",
)
@click.option(
    "--seeds", type=click.IntRange(min=1), metavar="N", help="Models to train.  [default: 3]"
)
@click.option("--held-out", metavar="F", help="Held-out ratings, for the comparison.")
@click.option("--held-out-format", metavar="FORMAT", help="Of --held-out.  [default: csv]")
@click.option("--plot", metavar="PNG", help="Also draw the comparison.")
def main(
    context: JobContext,
    model_version: int | None,
    retrain: bool,
    seeds: int | None,
    held_out: str | None,
    held_out_format: str | None,
    plot: str | None,
) -> dict[str, Any]:
    """Computes the residual of every row of both sides anew, in float64, and compares it with the
    certificate and with the ledger. Looks for ratings that an honoured request should have
    removed. Adds the finding to the audits table. Ends with exit code 1 and one line on stderr if
    the model does not hold what it promises. A residual that is not finite is null.

    With --retrain, tables on stderr and the key comparison say how close the model is to models
    trained from scratch on the retained ratings. Those are not published."""
    options = {
        "--seeds": seeds,
        "--held-out": held_out,
        "--held-out-format": held_out_format,
        "--plot": plot,
    }
    given = [name for name, value in options.items() if value is not None]
    if given and not retrain:
        raise SettingsError(f"{given[0]} belongs to --retrain; give both")
    if held_out_format is not None and held_out is None:
        raise SettingsError("--held-out-format belongs to --held-out; give both")

    from unlearn_spark.spark.audit import audit
    from unlearn_spark.tables import audits, models

    store = context.store
    model = models.published(store, model_version)
    comparing = None
    if retrain:  # refuses before the scan, which takes minutes
        comparing = prepare(context, model, held_out, held_out_format or "csv", plot)
    progress(f"auditing model version {model.model_version}")
    found = audit(store, model)
    audits.append(
        store,
        found.model_version,
        max_residual=found.max_residual,
        tau=found.tau,
        ledger_holds=found.ledger_holds,
        tombstoned_ratings_found=found.tombstoned_ratings_found,
        holds=found.holds,
    )
    result: dict[str, Any] = {
        "model_version": found.model_version,
        "max_residual": {
            side: residual if math.isfinite(residual) else None
            for side, residual in found.max_residual.items()
        },
        "ledger_holds": found.ledger_holds,
        "tombstoned_ratings_found": found.tombstoned_ratings_found,
        "tau": found.tau,
        "floor": found.floor,
        "holds": found.holds,
        "rows": found.rows,
        "rows_without_ratings": found.rows_without_ratings,
        "ratings_without_rows": found.ratings_without_rows,
    }
    if comparing is not None:
        result["comparison"] = comparing(seeds or 3)
    if not found.holds:
        progress(f"model version {found.model_version} fails: {'; '.join(found.failures)}")
        result["exit_code"] = 1
    return result


def prepare(
    context: JobContext, model: ModelVersion, held_out: str | None, form: str, plot: str | None
) -> Callable[[int], dict[str, Any]]:
    """Check that there is something to compare; the function returned compares with N seeds."""
    from rich.console import Console

    from unlearn_spark.audit import comparison, membership
    from unlearn_spark.evaluation import plots
    from unlearn_spark.preconditions import require_picture

    membership.require_sklearn()
    if plot is not None:
        require_picture(plot)
    store, execution = context.store, context.settings.execution
    deletion = find_deletion(store, model, execution.checkpoint)
    judged = None
    if held_out is not None:
        judged = held_out_ratings(store, model, held_out, form)
    else:
        progress("no --held-out ratings: quality on held-out ratings is left out")

    def compare(seeds: int) -> dict[str, Any]:
        found = comparison.compare(
            store, deletion, execution, seeds=seeds, held_out=judged, progress=progress
        )
        console = Console(file=sys.stderr)
        console.width = max(console.width, 100)  # rather wrapped lines than cut figures
        console.print(*tables_of(found.figures), sep="\n\n")
        if plot is not None:
            plots.comparison(found.figures, found.deleted_scores, plot)
        return found.figures

    return compare
