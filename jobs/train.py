"""Fit a model to the ratings table and publish it as a new version.

spark-submit jobs/train.py --root /data/recommender --set als.rank=64
"""

from unlearn_spark.cli import run
from unlearn_spark.jobs.train import main

if __name__ == "__main__":
    run(main)
