"""Read ratings into the ratings table: bad rows are quarantined, the newest of a pair is kept.

spark-submit jobs/ingest_ratings.py --root DIR --input ratings.csv --format movielens
"""

from unlearn_spark.cli import run
from unlearn_spark.jobs.ingest_ratings import main

if __name__ == "__main__":
    run(main)
