"""Write long-tailed synthetic ratings: a low-rank taste, noise, times. Needs no Spark.

python jobs/generate_ratings.py --users 6000 --items 4000 --ratings 1000000 --output r.parquet
"""

from unlearn_spark.cli import run
from unlearn_spark.jobs.generate_ratings import main

if __name__ == "__main__":
    run(main)
