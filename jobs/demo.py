"""The whole story on one machine: ratings in, a model, recommendations, forgetting, an audit.

python jobs/demo.py --root demo-output
"""

from unlearn_spark.cli import run
from unlearn_spark.jobs.demo import main

if __name__ == "__main__":
    run(main)
