"""List the best items of every user, or of some, by a published model.

spark-submit jobs/recommend.py --root /data/recommender --top 10
spark-submit jobs/recommend.py --root /data/recommender --top 10 --users 7,42 --output out.csv
"""

from unlearn_spark.cli import run
from unlearn_spark.jobs.recommend import main

if __name__ == "__main__":
    run(main)
