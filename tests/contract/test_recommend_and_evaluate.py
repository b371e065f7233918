"""The two jobs that read a published model, from ingested ratings to their JSON and files."""

from __future__ import annotations

import csv
import io

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest

from unlearn_spark.tables.delta_rs import DeltaRsStore


@pytest.fixture(scope="module")
def unseen():
    """Which of 24 users x 15 items are held out: about three in ten."""
    rng = np.random.default_rng(3)
    unseen = rng.random((24, 15)) < 0.3
    assert unseen.sum(axis=1).min() >= 1
    return unseen


@pytest.fixture
def ratings_csv(tmp_path, unseen):
    """Users u0..u23, rank-2 ratings (means and one factor) with a little noise."""
    rng = np.random.default_rng(4)
    stars = 3 + np.outer(rng.uniform(-1, 1, 24), rng.uniform(-2, 2, 15))
    stars += 0.05 * rng.normal(size=stars.shape)
    files = {name: tmp_path / f"{name}.csv" for name in ("train", "held_out")}
    lines = {name: ["user_id,item_id,rating"] for name in files}
    for user, item in np.ndindex(stars.shape):
        name = "held_out" if unseen[user, item] else "train"
        lines[name].append(f"u{user},{item},{stars[user, item]:.3f}")
    lines["held_out"] += ["nobody,1,3.0", "u1,999,3.0", "u1,1,not a number"]
    for name, path in files.items():
        path.write_text("\n".join(lines[name]) + "\n")
    return files


def read_csv(folder):
    """The rows of an export, every value as text."""
    parts = []
    for path in sorted(folder.glob("*.csv")):
        names = path.read_text("utf-8").partition("\n")[0].split(",")
        options = pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()))
        parts.append(pyarrow.csv.read_csv(path, convert_options=options))
    return pa.concat_tables(parts)


@pytest.mark.on_both(slow=True)
def test_from_ratings_to_recommendations_and_metrics(run_job, unseen, ratings_csv, tmp_path):
    root = ("--root", tmp_path / "tables")
    store = DeltaRsStore(str(tmp_path / "tables"))
    small = ("--set", "als.rank=2", "--set", "als.reg_param=0.02", "--set", "als.max_sweeps=12")
    assert "run job train first" in run_job("recommend", *root, "--top", 3).error
    run_job("ingest_ratings", *root, "--input", ratings_csv["train"], "--format", "csv")
    assert run_job("train", *root, *small).exit_code == 0

    everybody = run_job("recommend", *root, "--top", 3)
    assert everybody.exit_code == 0, everybody.stderr
    assert everybody.json["users"] == 24
    assert everybody.json["rows"] == np.minimum(3, unseen.sum(axis=1)).sum()
    assert everybody.json["model_version"] == 1
    rows = store.read("recommendations").to_pylist()
    assert len(rows) == everybody.json["rows"]
    assert all(unseen[int(row["user_id"][1:]), row["item_id"]] for row in rows)
    by_user = sorted((r for r in rows if r["user_id"] == "u5"), key=lambda r: r["rank"])
    assert [r["rank"] for r in by_user] == list(range(1, min(3, unseen[5].sum()) + 1))
    scores = [r["score"] for r in by_user]
    assert scores == sorted(scores, reverse=True)

    out = tmp_path / "some.csv"
    some = run_job(
        "recommend", *root, "--top", 99, "--users", "u3,zed,u7", "--include-seen", "--output", out
    )
    assert some.exit_code == 0, some.stderr
    assert (some.json["users"], some.json["rows"]) == (2, 30)
    assert some.json["unknown_users"] == ["zed"]
    written = read_csv(out)
    assert written.column_names == ["user_id", "rank", "item_id", "score", "model_version"]
    assert written.num_rows == 30
    again = run_job("recommend", *root, "--top", 1, "--output", out)
    assert "exists already" in again.error
    assert "zed" in run_job("recommend", *root, "--top", 1, "--users", "zed").error
    assert "versions are [1]" in run_job("recommend", *root, "--top", 1, "--model-version", 9).error

    measured = run_job("evaluate", *root, "--input", ratings_csv["held_out"], "--k", 2)
    assert measured.exit_code == 0, measured.stderr
    assert (measured.json["ratings"], measured.json["ratings_known"]) == (
        unseen.sum() + 2,
        unseen.sum(),
    )
    assert 0 < measured.json["mae"] <= measured.json["rmse"] < 0.15
    assert measured.json["users"] == 25  # nobody counts too, with 0
    # Everything that is unseen was held out, so every place is a hit but nobody's.
    assert measured.json["precision_at_2"] == pytest.approx(
        np.minimum(2, unseen.sum(axis=1)).sum() / 2 / 25
    )

    # An id counts as the model's where it is written just so, whatever type it has in the file.
    for column, known in (
        (pa.array(["1", "01", "1.0", "x", str(2**70)]), 1),
        (pa.array([1, 2, 999], pa.int32()), 2),
    ):
        path, n = tmp_path / "typed.parquet", len(column)
        pyarrow.parquet.write_table(
            pa.table({"user_id": ["u1"] * n, "item_id": column, "rating": [3.0] * n}), path
        )
        typed = run_job("evaluate", *root, "--input", path, "--format", "parquet", "--k", 1)
        assert typed.exit_code == 0, typed.stderr
        assert (typed.json["ratings"], typed.json["ratings_known"]) == (n, known)
        assert typed.json["recall_at_1"] in (0, 1 / n), "unknown items are relevant too"

    split = run_job("evaluate", *root, "--split", 0.2, "--min-rating", 3, *small)
    assert split.exit_code == 0, split.stderr
    assert split.json["ratings"] + split.json["ratings_fitted"] == (~unseen).sum()
    assert split.json["rmse"] < 0.5
    assert 0 < split.json["ndcg_at_10"] <= 1
    assert store.read("models").num_rows == 1
    assert "exactly one" in run_job("evaluate", *root).error


ODD_IDS = (
    "plain",
    'say "hi"',
    "a,b",
    "end\\",
    '\\"',
    '"quoted"',
    "#1",
    "é日",
    "it's",
    "null",
    "01",
    "1",
)


@pytest.mark.on_both(slow=True)
def test_odd_names_and_ids_from_ingestion_to_recommendations(run_job, engine, tmp_path):
    """Roots, outputs and ids with quotes, commas, backslashes, blanks and marks of globs."""
    users = (*ODD_IDS, "two\nlines", "two\r\nlines")
    items = ("B,1", 'B"2', "B\\")
    pairs = [(user, item) for user in users for item in items]
    source = tmp_path / "ratings.parquet"
    columns = {"user_id": [p[0] for p in pairs], "item_id": [p[1] for p in pairs]}
    ratings = [float(1 + n * 7 % 5) for n in range(len(pairs))]
    pyarrow.parquet.write_table(pa.table({**columns, "rating": ratings}), source)
    asked = tmp_path / "asked.csv"
    asked.write_text("request_id,scope,user_id\nr-1,user,plain\n")
    # delta-rs cannot use some marks, which test_bad_input has.
    marks = " [1] %20" if engine == "spark" else ""
    root = tmp_path / f"_a`b{marks} {{x,y}} ü'\" #?*="
    odd = tmp_path / "_out`[1] %20{a,b}ü.csv"
    back = tmp_path / "back.csv"
    line = io.StringIO(newline="")
    csv.writer(line).writerow(["nobody", *ODD_IDS])

    def done(name, *arguments, root=root):
        ended = run_job(name, "--root", root, *arguments)
        assert ended.exit_code == 0, ended.stderr
        return ended.json

    taken = done("ingest_ratings", "--input", source, "--format", "parquet")
    assert taken["quarantined"] == 2 * len(items)  # no line of csv can hold these users
    done("train", "--set", "als.rank=2", "--set", "als.tol=0.05")
    done("ingest_tombstones", "--input", asked)
    assert done("unlearn", "--set", "unlearn.tau=0.5")["ratings_removed"] == len(items)
    assert done("audit")["holds"]
    done("recommend", "--top", 3, "--include-seen", "--output", odd)
    some = done(
        "recommend", "--top", 3, "--include-seen", "--output", back, "--users", line.getvalue()
    )
    assert some["unknown_users"] == ["nobody", "plain"]
    left = {(user, item) for user in ODD_IDS if user != "plain" for item in items}

    read = read_csv(odd).to_pylist()
    assert {(row["user_id"], row["item_id"]) for row in read} == left
    assert {path.name for path in tmp_path.iterdir()} == {
        path.name for path in (source, asked, root, odd, back)
    }
    # An export is an input again.
    again = tmp_path / "again"
    renamed = ("--format", "csv", "--columns", "rating=score")
    done("ingest_ratings", "--input", back, *renamed, root=again)
    stored = DeltaRsStore(str(again)).read("ratings").to_pylist()
    assert {(row["user_id"], row["item_id"]) for row in stored} == left
