# Databricks notebook source
# MAGIC %md
# MAGIC # A recommender that can forget
# MAGIC
# MAGIC Ratings, a model, three deletion requests, and the proof. Each step runs one job of `jobs/`
# MAGIC in this session and returns the JSON object that the job would print.
# MAGIC
# MAGIC On Databricks, install the package as a library of the compute, and open this file inside a
# MAGIC Git folder of the repository. Elsewhere run it: `python notebooks/quickstart.py`.

# COMMAND ----------

# MAGIC %md
# MAGIC ## Places
# MAGIC On Databricks: a schema of Unity Catalog for the tables (`catalog` in
# MAGIC `conf/databricks.yaml`) and a volume for files. The schema and the volume must exist:
# MAGIC `CREATE SCHEMA IF NOT EXISTS main.recommender` and
# MAGIC `CREATE VOLUME IF NOT EXISTS main.recommender.files`.

# COMMAND ----------

import importlib
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

ON_DATABRICKS = "DATABRICKS_RUNTIME_VERSION" in os.environ
# A notebook has no __file__; in a Git folder its working directory is its own.
REPOSITORY = (
    Path(__file__).resolve().parent.parent if "__file__" in globals() else Path.cwd().parent
)
if str(REPOSITORY) not in sys.path:
    sys.path.insert(0, str(REPOSITORY))

if ON_DATABRICKS:
    FILES = Path("/Volumes/main/recommender/files")
    PLACE = ["--conf", str(REPOSITORY / "conf" / "databricks.yaml")]
else:
    FILES = Path(tempfile.mkdtemp(prefix="unlearn-spark-"))
    PLACE = ["--root", str(FILES / "tables")]


def run(job: str, *arguments: object) -> dict[str, Any]:
    """Run jobs/<job>.py in this session; a user's mistake raises an error of one line."""
    command = importlib.import_module(f"jobs.{job}").main
    texts = [*PLACE, *(str(argument) for argument in arguments)]
    result = dict(command.main(args=texts, standalone_mode=False))
    print(job, result)
    if result.get("exit_code"):  # the reasons stand above
        raise RuntimeError(f"{job} found that the model does not hold what it promises")
    return result


# COMMAND ----------

# MAGIC %md
# MAGIC ## Ratings
# MAGIC Synthetic ones here. For your own, give `ingest_ratings` a file, folder or glob and its
# MAGIC format.

# COMMAND ----------

ratings = FILES / "ratings.parquet"
run(
    "generate_ratings",
    *("--users", 2000, "--items", 1000, "--ratings", 100_000, "--seed", 1),
    *("--output", ratings),
)
run("ingest_ratings", "--input", ratings, "--format", "parquet")

# COMMAND ----------

# MAGIC %md
# MAGIC ## A model
# MAGIC Training stops when no factor row's relative residual exceeds `als.tol`.

# COMMAND ----------

trained = run("train", "--set", "als.rank=16")
run("recommend", "--top", 10)

# COMMAND ----------

# MAGIC %md
# MAGIC ## Deletion requests
# MAGIC A whole user, one rating, and a user's ratings of one year.

# COMMAND ----------

requests = FILES / "requests.csv"
requests.write_text(
    "request_id,scope,user_id,item_id,from_ts,to_ts,requested_at\n"
    "r-1,user,42,,,,\n"
    "r-2,rating,7,11,,,\n"
    "r-3,window,9,,2021-01-01,2022-01-01,\n",
    encoding="utf-8",
)
run("ingest_tombstones", "--input", requests)
forgotten = run("unlearn")

# COMMAND ----------

# MAGIC %md
# MAGIC ## The proof
# MAGIC The audit checks every factor row against the retained ratings and does not use the ledger.
# MAGIC The lists that were made before are made again from the new version.

# COMMAND ----------

audit = run("audit")
run("recommend", "--top", 10)
