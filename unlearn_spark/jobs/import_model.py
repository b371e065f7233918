"""Publish factors that were trained elsewhere as a model version of the ratings table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from unlearn_spark.cli import job
from unlearn_spark.ingestion.rules import FACTOR_FORMATS
from unlearn_spark.recommender import Recommender


@job("Import factors that were trained elsewhere and publish them as a model version.")
@click.option("--input", "path", required=True, metavar="DIR", help="The model; npz: or its file.")
@click.option(
    "--format",
    "form",
    required=True,
    type=click.Choice(FACTOR_FORMATS, case_sensitive=False),
    help="mllib: what ALSModel.save() of Spark MLlib wrote. parquet: user_factors and "
    "item_factors with columns id and factors. npz: NumPy arrays user_factors, item_factors, "
    "user_ids, item_ids.",
)
@click.option(
    "--converge",
    is_flag=True,
    help="Sweep until no residual exceeds als.tol, starting from the imported factors.",
)
def main(recommender: Recommender, path: str, form: str, converge: bool) -> Mapping[str, Any]:
    """The ratings table must have the ratings that the model was trained on: every residual is
    computed from them, and the job unlearn goes on from there. als.reg_param, als.implicit_prefs,
    als.alpha and als.nonnegative must be those of its training; als.rank is taken from the
    factors. Ratings that a deletion request covers are left out, as in training. A
    residual_before that is not finite is null."""
    return recommender.import_model(path, form, converge)
