"""One line of jobs on Spark Connect: a client without a JVM of its own, and a server here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import small_session

PROGRAM = """
import csv, json, sys
from pathlib import Path
from pyspark.sql.connect.session import SparkSession
import small_session
from unlearn_spark.__main__ import JOBS
from unlearn_spark.config import Settings
from unlearn_spark.spark.session import get_spark

root = Path(sys.argv[1])
settings = Settings(
    spark=dict(remote="local[2]", driver_memory="2g", conf=small_session.CONF)
)
assert isinstance(get_spark(settings), SparkSession)

def write(name, *rows):
    with (root / name).open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return str(root / name)

def run(job, *words):
    sets = ["als.rank=2", "als.tol=5e-3", "unlearn.tau=2e-2"]
    words = ["--root", str(root / "tables"), *[w for s in sets for w in ("--set", s)], *words]
    return dict(JOBS[job].main(args=words, standalone_mode=False))

pairs = [(f"u{u}", i, 1 + (3 * u + 5 * i) % 5) for u in range(12) for i in range(8) if (u + i) % 3]
ratings = write("r.csv", ("user_id", "item_id", "rating"), *pairs)
asked = write("t.csv", ("request_id", "scope", "user_id"), ("q", "user", "u3"))
run("ingest_ratings", "--input", ratings, "--format", "csv")
run("train")
run("ingest_tombstones", "--input", asked)
night = run("unlearn")
print(json.dumps({"night": night, "audit": run("audit"), "listed": run("recommend", "--top", "2")}))
"""


@pytest.mark.spark
def test_ratings_become_a_model_that_forgets_and_holds_on_connect(tmp_path):
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
        env={**os.environ, "PYTHONPATH": str(Path(small_session.__file__).parent)},
    )
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(run.stdout.strip().splitlines()[-1])
    assert (found["night"]["requests"], found["night"]["ratings_removed"]) == (1, 5)
    assert found["audit"]["model_version"] == 2
    assert found["audit"]["holds"]
    assert found["audit"]["tombstoned_ratings_found"] == 0
    assert found["listed"]["users"] == 11
