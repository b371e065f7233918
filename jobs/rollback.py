"""Publish an earlier model version again.

spark-submit jobs/rollback.py --root /data/recommender --to 3
"""

from unlearn_spark.cli import run
from unlearn_spark.jobs.rollback import main

if __name__ == "__main__":
    run(main)
