"""Adopt factors that were trained elsewhere, with the ratings table, as a model version.

spark-submit jobs/import_model.py --root DIR --input saved_model --format mllib --converge
"""

from unlearn_spark.cli import run
from unlearn_spark.jobs.import_model import main

if __name__ == "__main__":
    run(main)
