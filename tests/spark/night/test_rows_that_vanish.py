"""Where rows vanish from the model, training ends, nights stay local, and the audit agrees."""

import numpy as np
import pytest

from unlearn_spark.tables import models


def ratings_of(users=60, items=12):
    """Most users share items; the last third have up to four each that nobody else has rated."""
    random = np.random.default_rng(0)
    shared = range(2 * users // 3)
    pairs = {(user, f"i{item}") for user in shared for item in random.integers(0, items, 4)}
    for user in range(len(shared), users):
        pairs |= {(user, f"own{user}-{own}") for own in range(random.integers(1, 5))}
    return [f"u{user},{item},{random.integers(1, 5)}" for user, item in sorted(pairs)]


@pytest.mark.parametrize(
    "sets",
    [
        ["als.implicit_prefs=true", "als.alpha=1", "als.reg_param=0.5"],
        pytest.param(["als.reg_param=3.2"], marks=pytest.mark.slow),
    ],
    ids=["implicit", "explicit"],
)
def test_training_ends_and_nights_stay_local(store, run_job, tmp_path, sets):
    def job(name, *arguments):
        words = [word for value in ["als.rank=8", *sets] for word in ("--set", value)]
        done = run_job(name, "--root", store.root, *words, *arguments)
        assert done.exit_code == 0, done.stderr
        return done.json

    source = tmp_path / "ratings.csv"
    source.write_text("\n".join(["user_id,item_id,rating", *ratings_of()]) + "\n")
    job("ingest_ratings", "--input", source, "--format", "csv")
    trained = job("train")
    assert trained["converged"]
    first = models.published(store)
    assert min(first.floors.values()) > 0
    assert first.reached == trained["max_residual"] <= 2.5e-4
    audit = job("audit")
    assert max(audit["max_residual"].values()) == pytest.approx(trained["max_residual"], rel=1e-6)
    assert audit["floor"] == first.floors
    below = store.read("ledger").where(
        f"b_norm < if(side = 'user', {first.floors['user']}, {first.floors['item']})"
    )
    assert below.count()

    asked = tmp_path / "requests.csv"
    asked.write_text(
        "request_id,scope,user_id,item_id,requested_at\n"
        "shared,user,u3,,1900000000\n"
        "alone,user,u50,,1900000000\n"
    )
    job("ingest_tombstones", "--input", asked)
    night = job("unlearn")
    assert (night["requests"], night["sweeps"], night["tau"]) == (2, 0, 1e-3)
    second = models.published(store)
    assert (second.floors, second.reached) == (first.floors, first.reached)
    audit = job("audit")
    assert audit["holds"]
    assert audit["tau"] == second.certificate["tau"] == 1e-3
    assert max(audit["max_residual"].values()) <= night["max_residual"] * (1 + 1e-6) + 1e-9
