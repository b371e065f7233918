"""Fold ratings ingested since the published version into the model.

spark-submit jobs/update.py --root /data/recommender
"""

from unlearn_spark.cli import run
from unlearn_spark.jobs.update import main

if __name__ == "__main__":
    run(main)
