"""Writes the tables of a freshly fitted model, which replaces all that is stored of another."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from unlearn_spark.concurrency import run_concurrently
from unlearn_spark.core.blocks import SIDES
from unlearn_spark.spark import factors
from unlearn_spark.spark.training.encoding import stored_chunks

if TYPE_CHECKING:
    from unlearn_spark.spark.training.training import FitResult
    from unlearn_spark.tables.delta_spark import SparkStore


def write_fit(
    store: SparkStore, fitted: FitResult, more: Mapping[str, Callable[[], int]] | None = None
) -> dict[str, int]:
    """Replace factors, ledger and packed ratings by those of a fit.

    Parameters
    ----------
    more
        Further writes to run at the same time, under the fields that take their versions.

    Returns
    -------
    dict
        The Delta version of each table, under the names of `ModelVersion`'s fields.
    """
    rows, encoded = fitted.rows, fitted.encoded
    entries = [factors.ledger_rows(rows[side], side, encoded.floors) for side in SIDES]
    ledger = entries[0].unionByName(entries[1])
    chunks = [stored_chunks(encoded.parts[side], encoded.layouts[side]) for side in SIDES]
    # Not beside other writes: small row groups are a setting of the whole session.
    written = {
        "rating_blocks_version": factors.write_rating_blocks(
            store, chunks[0].unionByName(chunks[1])
        )
    }
    return written | run_concurrently(
        {
            "user_factors_version": lambda: factors.write_factors(store, "user", rows["user"]),
            "item_factors_version": lambda: factors.write_factors(store, "item", rows["item"]),
            "ledger_version": lambda: factors.write_ledger(store, ledger),
            "rating_changes_version": lambda: factors.clear_rating_changes(store),
            **(more or {}),
        }
    )
