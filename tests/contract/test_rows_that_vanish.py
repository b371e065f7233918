"""Where rows vanish from the model, training ends, nights stay local, and the audit agrees."""

import numpy as np
import pyarrow as pa
import pytest

from contract.nights import requests
from unlearn_spark.tables import models
from unlearn_spark.tables.delta_rs import DeltaRsStore

SETTINGS = {
    "implicit": {"implicit_prefs": True, "alpha": 1.0, "reg_param": 0.5},
    "explicit": {"reg_param": 3.2},
}


def ratings_of(users=60, items=12):
    """Most users share items; the last third have up to four each that nobody else has rated."""
    random = np.random.default_rng(0)
    shared = range(2 * users // 3)
    pairs = {(user, f"i{item}") for user in shared for item in random.integers(0, items, 4)}
    for user in range(len(shared), users):
        pairs |= {(user, f"own{user}-{own}") for own in range(random.integers(1, 5))}
    rows = [(f"u{user}", item, float(random.integers(1, 5))) for user, item in sorted(pairs)]
    return pa.table(
        dict(zip(("user_id", "item_id", "rating"), zip(*rows, strict=True), strict=True))
    )


@pytest.mark.on_both(slow=True)
@pytest.mark.parametrize("kind", ["implicit", "explicit"])
def test_training_ends_and_nights_stay_local(open_shop, tmp_path, kind):
    shop = open_shop(rank=8, **SETTINGS[kind])
    shop.ingest_ratings(ratings_of())
    trained = shop.train()
    assert trained.converged
    store = DeltaRsStore(str(tmp_path / "tables"))
    first = models.published(store)
    assert min(first.floors.values()) > 0
    assert first.reached == trained.max_residual <= 2.5e-4
    audit = shop.audit()
    assert max(audit.max_residual.values()) == pytest.approx(trained.max_residual, rel=1e-6)
    assert audit.floor == first.floors
    ledger = store.read("ledger", first.ledger_version, ["side", "b_norm"]).to_pylist()
    assert any(row["b_norm"] < first.floors[row["side"]] for row in ledger)

    asked = requests(("shared", "user", "u3"), ("alone", "user", "u50"), at=1_900_000_000)
    shop.ingest_tombstones(asked)
    night = shop.unlearn()
    assert (night.requests, night.sweeps, night.tau) == (2, 0, 1e-3)
    second = models.published(store)
    assert (second.floors, second.reached) == (first.floors, first.reached)
    audit = shop.audit()
    assert audit.holds
    assert audit.tau == second.certificate["tau"] == 1e-3
    assert max(audit.max_residual.values()) <= night.max_residual * (1 + 1e-6) + 1e-9
