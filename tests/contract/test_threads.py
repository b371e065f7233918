"""One thread gives bit for bit what two give: training, nights, recommendations and the audit.

The chunks are small enough for several to be solved at the same time."""

from __future__ import annotations

import numpy as np
import pytest

import unlearn_spark
from contract.nights import SETTINGS, as_table, data_set, end_of
from unlearn_spark.recommender import silent
from unlearn_spark.tables import models
from unlearn_spark.tables.delta_rs import DeltaRsStore

LATER = 1_710_000_000

KINDS = {
    "explicit": {},
    "implicit": {"implicit_prefs": True},
    "nonnegative": {"nonnegative": True},
    "many ratings": {"rank": 8},
}


def contents(root, table, version=None):
    """All rows of a table, in an order of their own; floats by their bits."""
    rows = DeltaRsStore(str(root)).read(table, version)
    names = [name for name in rows.column_names if name not in ("audited_at",)]
    return sorted(
        tuple(
            np.asarray(value, np.float64).tobytes() if isinstance(value, (float, list)) else value
            for value in row.values()
        )
        for row in rows.select(names).to_pylist()
    )


@pytest.mark.parametrize(
    ("kind", "max_rounds"), [*((kind, 40) for kind in KINDS), ("explicit", 1), ("implicit", 1)]
)
def test_threads_do_not_change_a_bit(tmp_path, kind, max_rounds):
    sizes = {"users": 3000, "items": 400, "n": 60_000} if kind == "many ratings" else {}
    settings = {**SETTINGS, **KINDS[kind], "user_blocks": 8, "item_blocks": 4}
    found = []
    for threads in (1, 2):
        root = tmp_path / str(threads)
        execution = {"threads": threads}
        shop = unlearn_spark.open(
            root, "embedded", progress=silent, execution=execution, **settings
        )
        rows = data_set(12, **sizes)
        shop.ingest_ratings(as_table(rows))
        figures = [shop.train()]
        trained = end_of(root)
        shop.ingest_ratings(as_table([("new-user", "i2", 5.0, LATER)]))
        hasty = unlearn_spark.open(
            root,
            "embedded",
            progress=silent,
            execution=execution,
            **{**settings, "max_rounds": max_rounds, "tau": 8e-3 if max_rounds > 1 else 2e-3},
        )
        figures.append(hasty.forget(users=["u3", "u5"], pairs=[rows[0][:2]]))
        figures += [shop.audit(), shop.recommend(5)]
        end = end_of(root)
        end["answers"] = sorted(end["answers"].values())  # forget() draws names
        model = models.published(DeltaRsStore(str(root)))
        tables = {
            table: contents(root, table)
            for table in ("ratings", "recommendations", "audits", "rating_changes")
        }
        for side in ("user", "item"):
            table = f"{side}_factors"
            tables[table] = contents(root, table, getattr(model, f"{table}_version"))
        kept = [
            {
                name: value
                for name, value in each.items()
                if not name.endswith(("seconds", "output"))
            }
            for each in figures
        ]
        found.append((trained, end, tables, kept))
    night = found[0][3][1]
    assert night["sweeps" if max_rounds == 1 else "rounds"] > 0
    for one, two in zip(*found, strict=True):
        assert one == two
