"""Puts a night's changes into the published model: rows with changed ratings, new and gone rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from unlearn_spark import publishing
from unlearn_spark.config import AlsSettings
from unlearn_spark.core.blocks import SIDES, other_side
from unlearn_spark.core.initial import initial_factors
from unlearn_spark.core.ledger_page import RatingChanges
from unlearn_spark.core.threads import shared_out
from unlearn_spark.embedded.changes import Changes
from unlearn_spark.embedded.ids import blocks_of, xxhash64
from unlearn_spark.embedded.model import FactorRows, read_factors
from unlearn_spark.tables import factors
from unlearn_spark.tables.delta_rs import DeltaRsStore
from unlearn_spark.tables.models import ModelVersion


@dataclass(frozen=True)
class ChangedSide:
    """One side of a published model and what a night changes in it.

    Attributes
    ----------
    rows
        The published rows, also those that leave, and new rows with their starting factors; with
        the new `n_ratings` (0: the row leaves).
    is_new : bool (n,)
    touched : int32 (m,)
        Ascending slots of the rows whose ratings change.
    changes
        Changes of the side's ratings since they were packed, tonight's included.
    """

    rows: FactorRows
    is_new: NDArray[np.bool_]
    touched: NDArray[np.int32]
    changes: RatingChanges

    @property
    def present(self) -> FactorRows:
        """The rows that have ratings after the changes."""
        return self.rows.of(self.rows.n_ratings > 0)

    @property
    def gone(self) -> NDArray[np.bool_]:
        """Published rows that lose their last rating, bool (n,)."""
        return (self.rows.n_ratings <= 0) & ~self.is_new


@dataclass(frozen=True)
class ChangedModel:
    """A published model and what a night changes in it, before any row is re-solved.

    Attributes
    ----------
    version
        The number of the version to publish.
    layouts
        By side: `n_blocks`, and `n_slots` including the slots of new rows.
    new_changes
        The changed ratings by slot, once for each side (`factors.RATING_CHANGES_SPEC`).
    """

    version: int
    layouts: Mapping[str, Mapping[str, int]]
    sides: Mapping[str, ChangedSide]
    new_changes: pa.Table

    @property
    def n_blocks(self) -> dict[str, int]:
        """By side: the number of blocks."""
        return {side: layout["n_blocks"] for side, layout in self.layouts.items()}


def change_model(
    store: DeltaRsStore, model: ModelVersion, changes: Changes, threads: int
) -> ChangedModel:
    """Find the rows whose ratings change, and give new rows their slots and starting factors."""
    version = publishing.next_version(model)
    published = dict(
        zip(
            SIDES,
            shared_out(lambda side: read_factors(store, model, side), SIDES, threads),
            strict=True,
        )
    )
    layouts = {side: dict(model.settings["layouts"][side]) for side in SIDES}
    rows, is_new, slots, touched = {}, {}, {}, {}
    for side in SIDES:
        n_blocks = layouts[side]["n_blocks"]
        rows[side], is_new[side], slots[side] = _with_changes(
            side, published[side], changes.pairs, n_blocks, model.als
        )
        touched[side] = np.unique(slots[side])
        if len(touched[side]):
            largest = int(touched[side][-1])
            layouts[side]["n_slots"] = max(layouts[side]["n_slots"], largest + 1)
    values = changes.pairs["value"].to_numpy().astype(np.float32)
    signs = changes.pairs["change"].to_numpy().astype(np.int32)
    tables = [
        pa.table(
            {
                "side": pa.array([side] * len(values), pa.string()),
                "block": slots[side] % np.int32(layouts[side]["n_blocks"]),
                "slot": slots[side],
                "other_slot": slots[other_side(side)],
                "value": values,
                "change": signs,
                "model_version": np.full(len(values), version, np.int64),
            },
            schema=factors.RATING_CHANGES_SPEC.schema,
        )
        for side in SIDES
    ]
    new_changes = pa.concat_tables(tables)
    earlier = store.read(
        factors.RATING_CHANGES, model.rating_changes_version, new_changes.column_names
    )
    every = pa.concat_tables([earlier, new_changes])
    sides = {
        side: ChangedSide(rows[side], is_new[side], touched[side], _changes_of(side, every))
        for side in SIDES
    }
    return ChangedModel(version, layouts, sides, new_changes)


def _with_changes(
    side: str, published: FactorRows, pairs: pa.Table, n_blocks: int, als: AlsSettings
) -> tuple[FactorRows, NDArray[np.bool_], NDArray[np.int32]]:
    """The published and new rows of a side with their new `n_ratings`; which are new; and the slot
    of each pair's row."""
    named = pairs[f"{side}_id"].combine_chunks().cast(published.ids.type)
    ids = named.unique()
    codes = pc.index_in(named, ids).to_numpy(zero_copy_only=False).astype(np.int64)
    signs = pairs["change"].to_numpy()
    deltas = np.bincount(codes, weights=signs, minlength=len(ids)).astype(np.int32)
    places = pc.index_in(ids, published.ids)
    unknown = places.is_null().to_numpy(zero_copy_only=False)
    slots = np.zeros(len(ids), np.int32)
    known = places.drop_null().to_numpy()
    slots[~unknown] = published.slots[known]
    n_ratings = published.n_ratings.copy()
    n_ratings[known] += deltas[~unknown]
    rows = FactorRows(published.ids, published.slots, n_ratings, published.factors)
    is_new = np.zeros(len(rows), np.bool_)
    if unknown.any():
        fresh = _new_rows(side, ids.filter(pa.array(unknown)), deltas[unknown], rows, n_blocks, als)
        slots[unknown] = fresh.slots
        order = np.argsort(np.concatenate([rows.slots, fresh.slots]), kind="stable")
        rows = FactorRows(
            pa.concat_arrays([rows.ids, fresh.ids]).take(pa.array(order)),
            np.concatenate([rows.slots, fresh.slots])[order],
            np.concatenate([rows.n_ratings, fresh.n_ratings])[order],
            np.concatenate([rows.factors, fresh.factors])[order],
        )
        is_new = order >= len(published)
    return rows, is_new, slots[codes]


def _new_rows(
    side: str,
    ids: pa.Array,
    n_ratings: NDArray[np.int32],
    published: FactorRows,
    n_blocks: int,
    als: AlsSettings,
) -> FactorRows:
    """Rows for ids that the model does not know, in the slots after the last of their block."""
    hashes = xxhash64(ids)
    blocks = blocks_of(hashes, n_blocks)
    last = np.arange(n_blocks, dtype=np.int64) - n_blocks
    np.maximum.at(last, published.slots % n_blocks, published.slots.astype(np.int64))
    order = pc.sort_indices(
        pa.table({"block": blocks, "id": ids}), [("block", "ascending"), ("id", "ascending")]
    ).to_numpy()
    in_order = blocks[order]
    within = np.arange(len(order)) - np.searchsorted(in_order, in_order)
    slots = np.empty(len(ids), np.int32)
    slots[order] = last[in_order] + (within + 1) * n_blocks
    y = initial_factors(hashes, als.rank, als.seed, side, als.nonnegative)
    return FactorRows(ids, slots, n_ratings, y)


def _changes_of(side: str, changes: pa.Table) -> RatingChanges:
    mine = changes.filter(pc.equal(changes["side"], side))
    names = ("slot", "other_slot", "value", "change", "model_version")
    return RatingChanges(*(mine[name].to_numpy() for name in names))
