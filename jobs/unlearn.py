"""Honour all pending deletion requests and publish a new model version.

spark-submit jobs/unlearn.py --root /data/recommender
"""

from unlearn_spark.cli import run
from unlearn_spark.jobs.unlearn import main

if __name__ == "__main__":
    run(main)
