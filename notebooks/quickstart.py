# Databricks notebook source
# MAGIC %md
# MAGIC # A recommender that can forget
# MAGIC
# MAGIC Ratings, a model, deletion requests, and the proof. Each step is a method of the object that
# MAGIC `unlearn_spark.open` gives; its results are those of the job of the same name.
# MAGIC
# MAGIC On a laptop: `python notebooks/quickstart.py`, in one process without Java. On Databricks,
# MAGIC install the package as a library of the compute; the work is done by Spark.

# COMMAND ----------

# MAGIC %md
# MAGIC ## Places
# MAGIC On Databricks: a schema of Unity Catalog for the tables and a volume for files. Both must
# MAGIC exist: `CREATE SCHEMA IF NOT EXISTS main.recommender` and
# MAGIC `CREATE VOLUME IF NOT EXISTS main.recommender.files`. Elsewhere: a temporary folder.

# COMMAND ----------

import os
import tempfile
from pathlib import Path

import pyarrow as pa

import unlearn_spark
from unlearn_spark.evaluation import synthetic

if "DATABRICKS_RUNTIME_VERSION" in os.environ:
    FILES = Path("/Volumes/main/recommender/files")
    shop = unlearn_spark.open(catalog="main.recommender", rank=16)
else:
    FILES = Path(tempfile.mkdtemp(prefix="unlearn-spark-"))
    shop = unlearn_spark.open(FILES / "tables", rank=16)

# COMMAND ----------

# MAGIC %md
# MAGIC ## Ratings
# MAGIC Synthetic ones here. For your own, give `ingest_ratings` a file, folder or glob and its
# MAGIC format, or a table: Arrow, pandas, on Spark also a DataFrame.

# COMMAND ----------

ratings = FILES / "ratings.parquet"
synthetic.write(users=2000, items=1000, ratings=100_000, seed=1, output=ratings)
print(shop.ingest_ratings(ratings, format="parquet"))

# COMMAND ----------

# MAGIC %md
# MAGIC ## A model
# MAGIC Training stops when no factor row's relative residual exceeds `als.tol`.

# COMMAND ----------

trained = shop.train()
print(f"{trained.sweeps} sweeps, largest residual {trained.max_residual:.1e}")
print(shop.recommend(top=10))

# COMMAND ----------

# MAGIC %md
# MAGIC ## Deletion requests
# MAGIC A whole user, one rating, and a user's ratings of half a year. `forget(users=[42])` makes
# MAGIC such requests and honours them at once.

# COMMAND ----------

requests = pa.table(
    {
        "request_id": ["r-1", "r-2", "r-3"],
        "scope": ["user", "rating", "window"],
        "user_id": ["42", "7", "9"],
        "item_id": [None, "82", None],
        "from_ts": [None, None, "2024-01-01"],
        "to_ts": [None, None, "2024-07-01"],
    }
)
print(shop.ingest_tombstones(requests))
night = shop.unlearn()
print(f"{night.ratings_removed} ratings removed, {night.rows_resolved} rows re-solved")

# COMMAND ----------

# MAGIC %md
# MAGIC ## The proof
# MAGIC The audit checks every factor row against the retained ratings and does not use the ledger.
# MAGIC The lists that were made before are made again from the new version.

# COMMAND ----------

audit = shop.audit()
assert audit.holds, audit
assert audit.tombstoned_ratings_found == 0, audit
print(f"model version {audit.model_version}: largest residual {audit.max_residual}")
print(shop.recommend(top=10))
