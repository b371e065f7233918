"""Fold ratings ingested since the published version into the model.

spark-submit jobs/update.py --root /data/recommender
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from unlearn_spark.cli import JobContext, job, progress, run


@job("Fold ratings ingested since the published version into the model.")
def main(context: JobContext) -> dict[str, Any]:
    """New users and items come in, corrected ratings replace the old ones, and pending deletion
    requests are honoured by the same pass. Nothing new: nothing written."""
    from unlearn_spark.spark.night.night import run_night

    return run_night(context.store, context.settings, progress, kind="update")


if __name__ == "__main__":
    run(main)
