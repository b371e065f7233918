"""Jobs at the same time on one root: the loser shows nothing, and is done by running again.

Embedded, a second job runs whole between the writes of a first one. An engine races the other once.
"""

from __future__ import annotations

import shutil
import threading

import pytest

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
from unlearn_spark.errors import ConflictError
from unlearn_spark.recommender import silent
from unlearn_spark.tables import delta_rs, models
from unlearn_spark.tables.delta_rs import DeltaRsStore

LATER = 1_710_000_000
MOST_COMMITS = 30
NEWS = [("new-user", "i1", 4.0, LATER), ("u2", "i9", 2.0, LATER)]
OTHER_NEWS = [("u2", "i10", 1.0, LATER), ("u7", "brand-new", 5.0, LATER)]


def shop_of(root, engine="embedded", **settings):
    return unlearn_spark.open(
        root, engine, progress=silent, execution={"threads": 1}, **{**SETTINGS, **settings}
    )


@pytest.fixture(scope="module")
def ready(tmp_path_factory):
    """A root with a model, two pending requests and new ratings."""
    root = tmp_path_factory.mktemp("conflicts") / "ready"
    shop = shop_of(root)
    shop.ingest_ratings(as_table(data_set()))
    shop.train()
    shop.forget(users=["u1"])
    shop.ingest_tombstones(requests(("r-u3", "user", "u3"), ("r-i4", "item", None, "i4")))
    shop.ingest_ratings(as_table(NEWS))
    return root


JOBS = {
    "night": lambda shop: shop.update(),
    "training": lambda shop: shop.train(),
    "ingestion": lambda shop: shop.ingest_ratings(as_table(OTHER_NEWS)),
    "other ingestion": lambda shop: shop.ingest_ratings(as_table([("u2", "i10", 3.0, LATER + 1)])),
}


def racing(monkeypatch, commit, other):
    """Run `other` at the n-th step of the writes that follow; the list returned says whether it
    ran."""
    seen, ran = [], []

    def counted(commit_it):
        def counted(*arguments, **options):
            seen.append(1)
            if len(seen) == commit:
                ran.append(1)
                other()
            return commit_it(*arguments, **options)

        return counted

    # Before the table is opened, and between that and the commit.
    for name in ("overwrite", "replace_where", "append_to", "create_with", "insert"):
        monkeypatch.setattr(DeltaRsStore, name, counted(getattr(DeltaRsStore, name)))
    monkeypatch.setattr(delta_rs, "write_deltalake", counted(delta_rs.write_deltalake))
    return ran


@pytest.mark.parametrize(
    ("slow", "quick", "step"),
    [
        ("night", "night", 4),
        ("night", "ingestion", 3),
        ("night", "training", 3),
        ("training", "training", 5),
        ("training", "night", 5),
        ("ingestion", "night", 1),
        ("ingestion", "other ingestion", 1),
    ],
)
def test_of_two_jobs_one_wins_or_both_land(ready, tmp_path, monkeypatch, slow, quick, step):
    shutil.copytree(ready, tmp_path / "quick")
    JOBS[quick](shop_of(tmp_path / "quick"))
    after_quick = end_of(tmp_path / "quick")
    lost = 0
    for commit in range(1, MOST_COMMITS, step):
        root = tmp_path / str(commit)
        shutil.copytree(ready, root)
        with monkeypatch.context() as patch:
            ran = racing(patch, commit, lambda: JOBS[quick](shop_of(root)))  # noqa: B023
            try:
                JOBS[slow](shop_of(root))
            except ConflictError as error:
                assert "run this job again" in str(error)  # noqa: PT017
                lost += 1
                found = end_of(root)
                # Ratings that are to be forgotten may be gone already.
                pairs, expected = found.pop("pairs"), dict(after_quick)
                assert expected.pop("pairs") - pairs <= {
                    pair for pair in stored_pairs(ready) if pair[0] == "u3" or pair[1] == "i4"
                }
                assert found == expected
                JOBS[slow](shop_of(root))
        if not ran:
            break
        consistent(root, slow, quick)
    assert commit > 1
    assert lost or {slow, quick} == {"ingestion", "night"}


def consistent(root, *jobs):
    """Everything that was asked for is done after one more night, and an audit agrees."""
    shop = shop_of(root)
    model = models.published(DeltaRsStore(str(root)))
    numbers = [version.model_version for version in models.versions(DeltaRsStore(str(root)))]
    assert numbers == list(range(1, model.model_version + 1))
    shop.update()
    assert set(answers(root)) >= {"r-u3", "r-i4"}
    rows = [*data_set(), *NEWS, *(OTHER_NEWS if "ingestion" in jobs else [])]
    expected = {row[:2] for row in rows if row[0] not in ("u1", "u3") and row[1] != "i4"}
    if "other ingestion" in jobs:
        stored = DeltaRsStore(str(root)).read("ratings").to_pylist()
        (row,) = (row for row in stored if (row["user_id"], row["item_id"]) == ("u2", "i10"))
        assert row["rating"] == 3.0
        expected.add(("u2", "i10"))
    assert stored_pairs(root) == expected
    assert set(factors(root, "user")) == {user for user, _ in expected}
    found = shop.audit()
    assert (found.holds, found.tombstoned_ratings_found) == (True, 0)


def test_a_request_that_is_accepted_and_honoured_during_an_ingestion_is_respected(
    ready, tmp_path, monkeypatch
):
    """The ingestion looked for requests before this one was there."""
    root = tmp_path / "root"
    shutil.copytree(ready, root)

    def honour():
        shop_of(root).ingest_tombstones(requests(("late", "user", "ghost"), at=LATER + 1000))
        shop_of(root).unlearn()

    rows = [*OTHER_NEWS, ("ghost", "i1", 2.0, LATER)]
    before = shop_of(root).unlearn()
    assert before.requests == 2
    with monkeypatch.context() as patch:
        ran = racing(patch, 1, honour)
        shop_of(root).ingest_ratings(as_table(rows))
    assert ran
    assert ("u2", "i10") in stored_pairs(root)
    assert "ghost" not in {user for user, _ in stored_pairs(root)}
    assert "late" in answers(root)


@pytest.mark.parametrize("job", ["night", "training", "ingestion"])
def test_jobs_in_threads_end_consistently(ready, tmp_path, job):
    """Really at the same time, each with its own tables object."""
    for turn in range(3):
        root = tmp_path / str(turn)
        shutil.copytree(ready, root)
        start, outcomes = threading.Barrier(2), []

        def work(start=start, outcomes=outcomes, root=root):
            shop = shop_of(root)
            start.wait()
            try:
                outcomes.append(JOBS[job](shop))
            except ConflictError as error:
                outcomes.append(error)

        workers = [threading.Thread(target=work) for _ in range(2)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        won = [each for each in outcomes if not isinstance(each, ConflictError)]
        assert len(outcomes) == 2
        assert won
        if job != "ingestion":
            published = [each["model_version"] for each in won]
            assert len(set(published)) == 1 or job == "training"
        consistent(root, job)


def test_the_loser_on_the_command_line_ends_with_1(ready, tmp_path, monkeypatch, run_in_process):
    root = tmp_path / "root"
    shutil.copytree(ready, root)
    racing(monkeypatch, 2, lambda: JOBS["night"](shop_of(root)))
    words = ["--root", root, "--engine", "embedded", "--set", "execution.threads=1"]
    done = run_in_process("update", *words)
    assert done.exit_code == 1
    assert "run this job again" in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("error: ")
    assert "Traceback" not in done.stderr


@pytest.mark.spark
@pytest.mark.parametrize("slow", ["embedded", pytest.param("spark", marks=pytest.mark.slow)])
def test_the_engines_race_each_other(spark, ready, tmp_path, monkeypatch, slow):
    """One engine's night publishes after the other's has begun to write."""
    from unlearn_spark import nightly

    quick = "spark" if slow == "embedded" else "embedded"
    root = tmp_path / "root"
    shutil.copytree(ready, root)
    original, ran = nightly.announce, []

    def announce(tonight):
        original(tonight)
        if not ran:
            ran.append(1)
            assert shop_of(root, quick).update().requests == 2

    monkeypatch.setattr(nightly, "announce", announce)
    with pytest.raises(ConflictError, match="run this job again"):
        shop_of(root, slow).update()
    assert ran
    consistent(root)
