"""Check what a published model promises, against the ratings themselves.

spark-submit jobs/audit.py --root /data/recommender
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import click

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from unlearn_spark.cli import JobContext, job, progress, run


@job("Check every factor row of a published model against the retained ratings.")
@click.option("--model-version", type=int, help="A published version.  [default: the newest]")
def main(context: JobContext, model_version: int | None) -> dict[str, Any]:
    """Computes the residual of every row of both sides anew, in float64, and compares it with the
    certificate and with the ledger; looks for ratings that an honoured request should have
    removed. The finding is added to the audits table. Ends with exit code 1 and one line on stderr
    if the model does not hold what it promises. A residual that is not finite is null."""
    from unlearn_spark.tables import audits, models
    from unlearn_spark.unlearning.certificate import audit

    store = context.store
    model = models.published(store, model_version)
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
        "holds": found.holds,
        "rows": found.rows,
        "rows_without_ratings": found.rows_without_ratings,
        "ratings_without_rows": found.ratings_without_rows,
    }
    if not found.holds:
        progress(f"model version {found.model_version} fails: {'; '.join(found.failures)}")
        result["exit_code"] = 1
    return result


if __name__ == "__main__":
    run(main)
