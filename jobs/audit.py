"""Check the promises of a published model against the ratings themselves.

spark-submit jobs/audit.py --root /data/recommender
spark-submit jobs/audit.py --root /data/recommender --retrain --seeds 3 --plot closeness.png
"""

from unlearn_spark.cli import run
from unlearn_spark.jobs.audit import main

if __name__ == "__main__":
    run(main)
