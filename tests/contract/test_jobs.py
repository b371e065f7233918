"""What every job promises its caller: the keys of its JSON, its exit code, `--engine`."""

from __future__ import annotations

import numpy as np
import pytest
from click.testing import CliRunner

from contract.job_keys import KEYS
from unlearn_spark.__main__ import JOBS
from unlearn_spark.tables import audits

SETS = [
    word
    for value in ("als.rank=2", "als.tol=5e-3", "unlearn.tau=2e-2", "als.reg_param=0.1")
    for word in ("--set", value)
]


@pytest.fixture
def files(tmp_path):
    """Ratings of 12 users and 9 items, in two parts; a request; factors from elsewhere."""
    rng = np.random.default_rng(1)
    for name, residue in (("ratings", (0, 1)), ("late", (2,))):
        pairs = [(u, i) for u in range(12) for i in range(9) if (u + i) % 4 in residue]
        lines = [f"{u},{i},{1 + (3 * u + 5 * i) % 5}\n" for u, i in pairs]
        (tmp_path / f"{name}.csv").write_text("user_id,item_id,rating\n" + "".join(lines))
    (tmp_path / "requests.csv").write_text("request_id,scope,user_id\nr-1,user,7\n")
    arrays = {f"{side}_ids": np.arange(n) for side, n in (("user", 12), ("item", 9))}
    arrays |= {
        f"{side}_factors": rng.normal(size=(n, 2)) for side, n in (("user", 12), ("item", 9))
    }
    np.savez(tmp_path / "factors.npz", **arrays)
    return tmp_path


READERS = ("audit", "recommend", "evaluate", "rollback", "import_model")


@pytest.mark.on_both(slow=True)
def test_every_job_says_at_least_what_is_promised(run_job, run_in_process, engine, files):
    """On Spark these are the jobs that need a model; for the others see `test_turns`."""

    def done(name, *arguments):
        words = ("--root", files / "tables", *SETS, *arguments)
        if engine == "spark" and name in READERS:
            ended = run_job(name, *words)
        else:
            ended = run_in_process(name, *words, "--engine", "embedded")
        assert ended.exit_code == 0, ended.stderr
        assert KEYS[name] <= ended.json.keys()
        assert ended.json["engine"] == (engine if name in READERS else "embedded")
        seen.add(name)
        return ended.json

    seen: set[str] = set()
    csv = ("--format", "csv")
    done("ingest_ratings", "--input", files / "ratings.csv", *csv)
    assert done("train")["converged"]
    done("ingest_tombstones", "--input", files / "requests.csv")
    night = done("unlearn")
    assert (night["requests"], night["ratings_added"], night["parent"]) == (1, 0, 1)
    assert done("unlearn")["requests"] == 0
    assert done("audit")["holds"]
    done("ingest_ratings", "--input", files / "late.csv", *csv)
    assert done("update")["ratings_added"] > 0
    assert done("recommend", "--top", 2)["users"] == 11
    assert done("evaluate", "--input", files / "late.csv")["ratings_known"] > 0
    assert done("rollback", "--to", 2)["rolled_back_to"] == 2
    taken = done("import_model", "--input", files / "factors.npz", "--format", "npz")
    assert not taken["converged"]
    assert seen == KEYS.keys()

    # The imported factors solve nothing, so their audit fails, and says so as it ends.
    failed = run_job("audit", "--root", files / "tables")
    assert failed.exit_code == 1
    assert failed.json["holds"] is False
    assert failed.stderr.splitlines()[-1].startswith("model version 5 fails: ")


def test_a_fault_of_the_program_is_no_mistake_of_the_user(run_job, files, monkeypatch):
    root = ("--root", files / "tables")
    run_job("ingest_ratings", *root, "--input", files / "ratings.csv", "--format", "csv")
    run_job("train", *root, *SETS)

    def broken(store, found):
        raise RuntimeError("out of order")

    monkeypatch.setattr(audits, "append", broken)
    ended = run_job("audit", *root)
    assert (ended.exit_code, ended.json) == (1, None)
    assert "Traceback" in ended.stderr
    assert ended.stderr.splitlines()[-1] == "RuntimeError: out of order"


@pytest.mark.parametrize("name", JOBS)
def test_every_job_takes_an_engine(name):
    answer = CliRunner().invoke(JOBS[name], ["--help"])
    assert "--engine [auto|embedded|spark]" in answer.output
    refused = CliRunner().invoke(JOBS[name], ["--engine", "flink"])
    assert refused.exit_code == 2
    assert "'flink' is not one of 'auto', 'embedded', 'spark'" in refused.output
