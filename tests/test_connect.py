"""The jobs on Spark Connect: a client that has no JVM of its own, and a server on this machine."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent

PROGRAM = """
import runpy, sys
from pyspark.sql.connect.session import SparkSession
from unlearn_spark.config import Settings
from unlearn_spark.spark.session import get_spark
settings = Settings(spark=dict(remote="local[2]", driver_memory="2g"))
assert isinstance(get_spark(settings), SparkSession)
sys.argv = ["jobs/demo.py", "--root", sys.argv[1]]
runpy.run_path("jobs/demo.py", run_name="__main__")
"""


@pytest.mark.slow
def test_ratings_become_a_model_that_forgets_and_holds_on_connect(tmp_path):
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(run.stdout.strip().splitlines()[-1])
    assert found["model_version"] == 2
    assert all(0 < residual <= 1e-3 for residual in found["max_residual"].values())
    assert "ratings that should be gone: 0" in run.stderr
