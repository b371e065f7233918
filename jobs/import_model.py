"""Publish factors that were trained elsewhere as a model version of the ratings table.

spark-submit jobs/import_model.py --root DIR --input saved_model --format mllib --converge
"""

from unlearn_spark.cli import run
from unlearn_spark.jobs.import_model import main

if __name__ == "__main__":
    run(main)
