"""Jobs killed for real (SIGKILL, the whole process group) between their commits.

Proves: whatever was committed by then, the published model is the old one and still holds; the next
run ends well, with the same retained ratings, one receipt a request, and a model that an
independent scan confirms.
"""

from __future__ import annotations

import contextlib
import csv
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from unlearn_spark.tables import models, ratings, receipts
from unlearn_spark.tables.store import Store

REPOSITORY = Path(__file__).resolve().parent.parent.parent

GONE = ("u3", "u14", "u40")
SETTINGS = ("als.rank=4", "als.reg_param=0.1", "als.tol=5e-3", "unlearn.tau=2e-2")
SESSION = (
    "spark.master=local[2]",
    "spark.driver_memory=1g",
    "spark.conf.spark.sql.shuffle.partitions=2",
)
PATIENCE = 600  # seconds until a job that did not get to its commit has failed the test


def options(root, *sets):
    return [
        "--root",
        str(root),
        *[word for value in (*SETTINGS, *sets) for word in ("--set", value)],
    ]


@pytest.fixture(scope="module")
def data_set():
    """(user, item, rating): 700 of 60 x 30 pairs, rank 2 and noise."""
    random = np.random.default_rng(0)
    x, y = random.normal(size=(60, 2)), random.normal(size=(30, 2))
    rows = []
    for pair in random.permutation(60 * 30)[:700]:
        user, item = divmod(int(pair), 30)
        value = 3 + x[user] @ y[item] * 0.5 + random.normal() * 0.3
        rows.append((f"u{user}", f"i{item}", round(value, 2)))
    assert set(GONE) < {row[0] for row in rows}
    return rows


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Where `roots` keeps what it made; one for the module."""
    return tmp_path_factory.mktemp("crash")


@pytest.fixture
def roots(prepared, run_job, data_set):
    """Roots to copy: `ingested` has ratings alone, `asked` a model and three requests as well."""
    if (prepared / "asked").exists():
        return prepared

    def done(job, root, *arguments):
        result = run_job(job, *options(root), *arguments)
        assert result.exit_code == 0, result.stderr

    source = write(prepared / "r.csv", ("user_id", "item_id", "rating"), data_set)
    done("ingest_ratings", prepared / "ingested", "--input", source, "--format", "csv")
    shutil.copytree(prepared / "ingested", prepared / "making")
    done("train", prepared / "making")
    requests = [(f"r-{user}", "user", user) for user in GONE]
    source = write(prepared / "t.csv", ("request_id", "scope", "user_id"), requests)
    done("ingest_tombstones", prepared / "making", "--input", source)
    (prepared / "making").rename(prepared / "asked")
    return prepared


def write(path, header, rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def commits(root, table):
    return len(list((root / table / "_delta_log").glob("*.json")))


def kill_at_commit(job, root, table, more=1, sets=()):
    """Start a job as a script and kill it, and all that it started, as soon as a table of this root
    has `more` new commits."""
    before = commits(root, table)
    log = root.parent / f"{job}.log"
    with log.open("w") as out:
        process = subprocess.Popen(
            [
                sys.executable,
                str(REPOSITORY / "jobs" / f"{job}.py"),
                *options(root, *SESSION, *sets),
            ],
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            end = time.monotonic() + PATIENCE
            while commits(root, table) < before + more:
                assert process.poll() is None, f"ended before that commit:\n{log.read_text()}"
                assert time.monotonic() < end, f"no such commit:\n{log.read_text()}"
                time.sleep(0.005)
        finally:
            # Also where the test fails; the group has no member left if the job ended by itself.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert process.returncode == -signal.SIGKILL, log.read_text()
    wait_for_group(process.pid)


def wait_for_group(group):
    """Wait until the JVM of a killed group is gone too, so that it writes nothing any more."""
    end = time.monotonic() + 30
    while time.monotonic() < end:
        alive = False
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                state, _, pgrp = stat.read_text().rpartition(")")[2].split()[:3]
                alive |= int(pgrp) == group and state not in "ZX"
        if not alive:
            return
        time.sleep(0.05)
    raise AssertionError(f"process group {group} outlives SIGKILL")


def run(run_job, job, root, *arguments, sets=()):
    done = run_job(job, *options(root, *sets), *arguments)
    assert done.exit_code == 0, done.stderr
    return done.json


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux: reads /proc")
@pytest.mark.parametrize(
    ("table", "more"),
    [
        pytest.param("ratings", 1, id="after the ratings were deleted"),
        pytest.param("user_factors", 1, id="after the first factors", marks=pytest.mark.slow),
        pytest.param("receipts", 2, id="after the receipts", marks=pytest.mark.slow),
    ],
)
def test_unlearn_killed_after_a_commit_is_done_by_the_next_run(
    table, more, roots, data_set, run_job, spark, tmp_path
):
    root = tmp_path / "tables"
    shutil.copytree(roots / "asked", root)
    store = Store(spark, root=str(root))
    old = models.published(store)
    kill_at_commit("unlearn", root, table, more)
    assert models.published(store) == old
    audit = run(run_job, "audit", root)
    assert (audit["model_version"], audit["holds"]) == (old.model_version, True)

    night = run(run_job, "unlearn", root)
    gone = {row[:2] for row in data_set if row[0] in GONE}
    assert (night["requests"], night["ratings_removed"]) == (3, len(gone))
    assert (night["parent"], night["model_version"]) == (1, 2)
    left = {(row.user_id, row.item_id) for row in ratings.read(store).collect()}
    assert left == {row[:2] for row in data_set} - gone
    new = models.published(store)
    answers = [
        (row.request_id, row.ratings_removed)
        for row in receipts.read(store, new.receipts_version).collect()
    ]
    assert sorted(answers) == sorted(
        (f"r-{user}", sum(row[0] == user for row in data_set)) for user in GONE
    )
    factors, _ = models.read_factors(store, new)
    assert not {row.id for row in factors.select("id").collect()} & set(GONE)
    audit = run(run_job, "audit", root)
    assert audit["model_version"] == 2
    assert audit["holds"]
    assert audit["tombstoned_ratings_found"] == 0
    assert run(run_job, "unlearn", root)["requests"] == 0


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux: reads /proc")
@pytest.mark.parametrize(
    ("start", "table", "more"),
    [
        pytest.param("ingested", "user_factors", 2, id="first training"),
        pytest.param("asked", "item_factors", 1, id="training anew"),
    ],
)
def test_train_killed_after_its_first_factors_is_done_by_the_next_run(
    start, table, more, roots, data_set, run_job, spark, tmp_path
):
    root = tmp_path / "tables"
    shutil.copytree(roots / start, root)
    store = Store(spark, root=str(root))
    old = models.newest(store)
    other = ("als.rank=3", "als.seed=5")  # what the dead job leaves behind differs in shape too
    kill_at_commit("train", root, table, more, sets=other)
    assert models.newest(store) == old
    if old is None:
        missing = run_job("recommend", *options(root), "--top", 2)
        assert "jobs/train.py first" in missing.error
    else:
        assert run(run_job, "audit", root)["holds"]

    expected = {row[:2] for row in data_set}
    if start == "asked":
        expected = {pair for pair in expected if pair[0] not in GONE}
    trained = run(run_job, "train", root)
    assert trained["model_version"] == (old.model_version if old else 0) + 1
    assert trained["ratings"] == len(expected)
    for rows, place in zip(
        models.read_factors(store, models.published(store)), (0, 1), strict=True
    ):
        stored = {row.id: len(row.factors) for row in rows.select("id", "factors").collect()}
        assert stored == dict.fromkeys({pair[place] for pair in expected}, 4)
    assert run(run_job, "audit", root)["holds"]
