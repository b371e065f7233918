"""Read deletion requests into the tombstones table; `jobs/unlearn.py` honours them.

spark-submit jobs/ingest_tombstones.py --root DIR --input requests.csv
"""

from unlearn_spark.cli import run
from unlearn_spark.jobs.ingest_tombstones import main

if __name__ == "__main__":
    run(main)
