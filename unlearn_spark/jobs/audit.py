"""Check the promises of a published model against the ratings themselves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from unlearn_spark.cli import job
from unlearn_spark.errors import SettingsError
from unlearn_spark.recommender import Recommender


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
    recommender: Recommender,
    model_version: int | None,
    retrain: bool,
    seeds: int | None,
    held_out: str | None,
    held_out_format: str | None,
    plot: str | None,
) -> Mapping[str, Any]:
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
    return recommender.audit(
        model_version,
        retrain=retrain,
        seeds=seeds or 3,
        held_out=held_out,
        held_out_format=held_out_format or "csv",
        plot=plot,
    )
