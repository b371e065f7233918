"""Measure held-out quality: of a published model on a file, or of settings on a split.

spark-submit jobs/evaluate.py --root /data/recommender --input test.csv --format csv
spark-submit jobs/evaluate.py --root /data/recommender --split 0.1 --set als.rank=64
"""

from unlearn_spark.cli import run
from unlearn_spark.jobs.evaluate import main

if __name__ == "__main__":
    run(main)
