"""Jobs killed for real (SIGKILL) at their commits.

Proves: whatever was committed by then, readers see what was there before and it still holds; the
next run ends as a run without a crash does. Embedded at every commit; on Spark, among the slow
tests, at some.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import small_session

import unlearn_spark
from contract.nights import (
    SETTINGS,
    answers,
    as_table,
    data_set,
    end_of,
    factors,
    requests,
    stored_pairs,
)
from unlearn_spark.errors import InputError, TableMissingError
from unlearn_spark.recommender import silent
from unlearn_spark.tables import models, ratings
from unlearn_spark.tables.delta_rs import DeltaRsStore

REPOSITORY = Path(__file__).resolve().parent.parent.parent
GONE = ("u3", "u14", "u40")
LATER = 1_710_000_000
ONE_THREAD = {"execution": {"threads": 1}}
MOST_COMMITS = 30

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")


def embedded(root, **settings):
    return unlearn_spark.open(
        root, "embedded", progress=silent, **ONE_THREAD, **{**SETTINGS, **settings}
    )


def options(root, settings):
    sections = {"tau": "unlearn", "max_rounds": "unlearn", "direct_rows": "unlearn"}
    words = ["--root", str(root)]
    for name, value in settings.items():
        words += ["--set", f"{sections.get(name, 'als')}.{name}={value}"]
    return words


@pytest.fixture(scope="module")
def kill(tmp_path_factory):
    """`kill(when, commit, job, root, ...)`: run a job embedded and kill it there; False if it ended
    before that."""
    log = tmp_path_factory.mktemp("killed") / "log"
    server = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("killed_jobs.py"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )

    def run(when, commit, job, root, *arguments, **settings):
        words = [job, *options(root, {**SETTINGS, **settings}), *map(str, arguments)]
        words += ["--engine", "embedded", "--set", "execution.threads=1"]
        order = {"when": when, "commit": commit, "log": str(log), "arguments": words}
        server.stdin.write(json.dumps(order) + "\n")
        server.stdin.flush()
        code = int(server.stdout.readline())
        assert code in (0, -signal.SIGKILL), log.read_text()
        return code != 0

    yield run
    server.stdin.close()
    assert server.wait() == 0


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    """Roots to copy: `ingested` has ratings alone, `asked` a model, three requests and two new
    ratings as well."""
    folder = tmp_path_factory.mktemp("crash")
    shop = embedded(folder / "ingested")
    shop.ingest_ratings(as_table(data_set()))
    shutil.copytree(folder / "ingested", folder / "asked")
    shop = embedded(folder / "asked")
    shop.train()
    shop.forget(users=["u1"])  # so that receipts and changes are there already
    shop.ingest_tombstones(requests(*[(f"r-{user}", "user", user) for user in GONE]))
    shop.ingest_ratings(as_table([("new-user", "i1", 4.0, LATER), ("u2", "i9", 2.0, LATER)]))
    return folder


def every_commit(kill, folder, start, job, *arguments, **settings):
    """Kill a job during each of its commits and after its last. Yield each root, and whether the
    job was done by then."""
    for commit in range(1, MOST_COMMITS):
        root = folder / f"{job}-{commit}"
        shutil.copytree(start, root) if start.exists() else root.mkdir()
        if not kill("during", commit, job, root, *arguments, **settings):
            last = folder / f"{job}-last"
            shutil.copytree(start, last) if start.exists() else last.mkdir()
            assert kill("after", commit - 1, job, last, *arguments, **settings)
            assert commit > 2
            yield last, True
            return
        yield root, False
    raise AssertionError("the job never ended")


@pytest.mark.parametrize("way", ["rounds", "sweeps"])
def test_a_night_killed_at_any_commit_is_done_by_the_next_run(kill, roots, tmp_path, way):
    more = {} if way == "rounds" else {"max_rounds": 1, "tau": 6e-3}
    shutil.copytree(roots / "asked", tmp_path / "whole")
    whole = embedded(tmp_path / "whole", **more).update()
    assert (whole.sweeps > 0) == (way == "sweeps")
    assert (whole.requests, whole.ratings_added) == (3, 2)
    expected = end_of(tmp_path / "whole")
    assert not set(GONE) & set(factors(tmp_path / "whole", "user"))
    old = end_of(roots / "asked")
    for root, is_done in every_commit(kill, tmp_path, roots / "asked", "update", **more):
        shop = embedded(root, **more)
        if is_done:
            assert end_of(root) == expected
            assert shop.unlearn().requests == 0
            continue
        meanwhile = end_of(root)
        del meanwhile["pairs"]  # ratings that are to be forgotten may be gone already
        assert all(old[name] == value for name, value in meanwhile.items())
        assert shop.audit().holds
        again = shop.update()
        names = ("requests", "ratings_removed", "ratings_added", "rows_resolved", "model_version")
        assert [again[name] for name in names] == [whole[name] for name in names]
        assert end_of(root) == expected
        found = shop.audit()
        assert (found.holds, found.tombstoned_ratings_found) == (True, 0)
        assert shop.unlearn().requests == 0


@pytest.mark.parametrize("start", ["ingested", "asked"])
def test_a_training_killed_at_any_commit_is_done_by_the_next_run(kill, roots, tmp_path, start):
    shutil.copytree(roots / start, tmp_path / "whole")
    embedded(tmp_path / "whole").train()
    expected, old = end_of(tmp_path / "whole"), end_of(roots / start)
    # What the dead job leaves behind differs in shape too.
    other = {"rank": 3, "seed": 5}
    for root, is_done in every_commit(kill, tmp_path, roots / start, "train", **other):
        if is_done:
            assert models.published(DeltaRsStore(str(root))).als.rank == 3
            continue
        assert end_of(root) == old
        shop = embedded(root)
        if start == "ingested":
            with pytest.raises((InputError, TableMissingError), match="run job train first"):
                shop.recommend(2)
        else:
            assert shop.audit().holds
        shop.train()
        assert end_of(root) == expected
        assert shop.audit().holds


@pytest.mark.parametrize("start", ["nothing", "ingested"])
def test_an_ingestion_killed_at_any_commit_is_done_by_the_next_run(kill, roots, tmp_path, start):
    rows = [*data_set(11, n=300), ("u3", "new", 2.0, LATER), ("", "i1", 3.0, LATER)]
    source = tmp_path / "late.parquet"
    pq.write_table(as_table(rows), source)
    given = "--input", source, "--format", "parquet"
    whole = tmp_path / "whole"
    shutil.copytree(roots / start, whole) if start != "nothing" else whole.mkdir()
    report = embedded(whole).ingest_ratings(source, "parquet")
    assert (report.ratings_read, report.quarantined) == (len(rows), 1)

    def known(root):
        names = ["user_id", "item_id", "rating", "rated_at"]
        rows = DeltaRsStore(str(root)).read(ratings.TABLE, None, names).to_pylist()
        return sorted(tuple(row.values()) for row in rows)

    expected = known(whole)
    for root, is_done in every_commit(kill, tmp_path, roots / start, "ingest_ratings", *given):
        if is_done:
            assert known(root) == expected
        elif start == "nothing":
            assert not DeltaRsStore(str(root)).exists(ratings.TABLE)
        else:
            assert known(root) == known(roots / start)
        again = embedded(root).ingest_ratings(source, "parquet")
        assert again.ratings_written == (0 if is_done else report.ratings_written)
        assert known(root) == expected
        assert DeltaRsStore(str(root)).rows("quarantine") == 1


# --- on Spark -------------------------------------------------------------------------------------

SESSION = (
    "spark.master=local[2]",
    "spark.driver_memory=1g",
    *(f"spark.conf.{name}={value}" for name, value in small_session.CONF.items()),
)
PATIENCE = 600  # seconds until a job that did not get to its commit has failed the test


def commits(root, table):
    return len(list((root / table / "_delta_log").glob("*.json")))


def kill_on_spark(job, root, table, more=1, **settings):
    """Start a job as a script and kill it, and all that it started, as soon as a table of this root
    has `more` new commits."""
    before = commits(root, table)
    log = root.parent / f"{job}.log"
    words = options(root, {**SETTINGS, **settings})
    words += [word for value in SESSION for word in ("--set", value)]
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, str(REPOSITORY / "jobs" / f"{job}.py"), *words],
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


def on_spark(root):
    return unlearn_spark.open(root, "spark", progress=silent, **SETTINGS)


@pytest.mark.spark
@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux: reads /proc")
@pytest.mark.parametrize(
    ("table", "more"),
    [
        pytest.param("ratings", 1, id="after the ratings were deleted"),
        pytest.param("user_factors", 1, id="after the first factors"),
        pytest.param("receipts", 1, id="after the receipts"),
    ],
)
def test_a_night_killed_on_spark_is_done_by_the_next_run(table, more, roots, spark, tmp_path):
    root = tmp_path / "tables"
    shutil.copytree(roots / "asked", root)
    old = models.published(DeltaRsStore(str(root)))
    kill_on_spark("unlearn", root, table, more)
    assert models.published(DeltaRsStore(str(root))) == old
    audit = on_spark(root).audit()
    assert (audit.model_version, audit.holds) == (old.model_version, True)

    of_user = {user: sum(row[0] == user for row in data_set()) for user in GONE}
    night = on_spark(root).unlearn()
    assert (night.requests, night.ratings_removed) == (3, sum(of_user.values()))
    assert (night.parent, night.model_version) == (old.model_version, old.model_version + 1)
    assert not {user for user, _ in stored_pairs(root)} & set(GONE)
    found = answers(root)
    assert {user: found[f"r-{user}"] for user in GONE} == of_user
    assert not set(factors(root, "user")) & set(GONE)
    audit = on_spark(root).audit()
    assert audit.model_version == old.model_version + 1
    assert audit.holds
    assert audit.tombstoned_ratings_found == 0
    assert on_spark(root).unlearn().requests == 0


@pytest.mark.spark
@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux: reads /proc")
@pytest.mark.parametrize(
    ("start", "table", "more"),
    [
        pytest.param("ingested", "user_factors", 2, id="first training"),
        pytest.param("asked", "item_factors", 1, id="training anew"),
    ],
)
def test_a_training_killed_on_spark_is_done_by_the_next_run(
    start, table, more, roots, spark, tmp_path
):
    root = tmp_path / "tables"
    shutil.copytree(roots / start, root)
    store = DeltaRsStore(str(root))
    old = models.newest(store)
    kill_on_spark("train", root, table, more, rank=3, seed=5)
    assert models.newest(store) == old
    if old is None:
        with pytest.raises((InputError, TableMissingError), match="run job train first"):
            on_spark(root).recommend(2)
    else:
        assert on_spark(root).audit().holds

    left = {pair for pair in stored_pairs(root) if start == "ingested" or pair[0] not in GONE}
    trained = on_spark(root).train()
    assert trained.model_version == (old.model_version if old else 0) + 1
    assert trained.ratings == len(left)
    for place, side in enumerate(("user", "item")):
        found = factors(root, side)
        assert found.keys() == {pair[place] for pair in left}
        assert {len(vector) for vector in found.values()} == {4}
    assert on_spark(root).audit().holds
