"""No id in any Delta log, whichever engine writes, and in no name of a file or folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from contract.nights import ASKED_AT, SETTINGS, as_table, data_set, requests

MARK = "zzsecret"
LATER = 1_710_000_000


def secret(rows):
    return [(f"{MARK}-{row[0]}", f"{MARK}-{row[1]}", *row[2:]) for row in rows]


@pytest.mark.on_both(slow=True)
@pytest.mark.parametrize("direct_rows", ["resolve", "threshold"])
def test_no_id_reaches_a_log(open_shop, tmp_path, direct_rows):
    root = tmp_path / "tables"
    shop = open_shop(**{**SETTINGS, "direct_rows": direct_rows}, user_blocks=4)
    rows = secret(data_set())
    bad = [(f"{MARK}-bad", "", 3.0, 1)]
    assert shop.ingest_ratings(as_table([*rows, *bad])).quarantined == 1
    shop.train()
    shop.ingest_tombstones(
        requests(
            (f"{MARK}-r1", "user", f"{MARK}-u5"),
            (f"{MARK}-r2", "item", None, f"{MARK}-i7"),
            (f"{MARK}-r3", "rating", *rows[0][:2]),
            (f"{MARK}-r4", "window", f"{MARK}-u9", None, 1_500_000_000, 1_500_000_500),
            (f"{MARK}-r5", "user", f"{MARK}-nobody"),
        )
    )
    assert shop.unlearn().requests == 5
    again = (f"{MARK}-back", "reinstate", f"{MARK}-u5")
    shop.ingest_tombstones(requests(again, at=ASKED_AT + 1))
    late = secret([("u5", "i1", 2.0, LATER), ("new", "i1", 4.0, LATER), ("u2", "i3", 1.0, LATER)])
    assert shop.ingest_ratings(as_table(late)).quarantined == 0
    assert shop.update().ratings_added == 3
    shop.ingest_tombstones(
        requests(*[(f"{MARK}-m{n}", "user", f"{MARK}-u{n}") for n in range(20, 40)])
    )
    assert open_shop(**{**SETTINGS, "max_rounds": 1, "tau": 1e-4}).unlearn().sweeps > 0
    assert shop.audit().holds
    shop.recommend(3, users=[f"{MARK}-u2", f"{MARK}-nobody"])
    shop.recommend(3)
    shop.train()

    tables = {path.parent.name for path in root.glob("*/_delta_log")}
    assert tables >= {
        *("ratings", "quarantine", "tombstones", "receipts", "models", "audits"),
        *("user_factors", "item_factors", "ledger", "rating_blocks", "rating_changes"),
        "recommendations",
    }
    logs = [path for path in root.glob("*/_delta_log/**/*") if path.is_file()]
    assert len(logs) > 30
    for path in logs:
        assert MARK.encode() not in path.read_bytes(), path
    assert not list(Path(root).rglob(f"*{MARK}*"))
