"""Draw the pairs on which models are compared, and score them; the same pairs as on Spark."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from unlearn_spark.audit import membership
from unlearn_spark.audit.figures import (
    DELETED,
    NEIGHBOURING,
    PANEL_ROWS,
    RANDOM,
    REACH,
    SAMPLE_PAIRS,
    SAMPLE_SEED,
    UNSEEN,
    Scores,
)
from unlearn_spark.core.blocks import SIDES
from unlearn_spark.embedded.comparison.deletion import Deletion
from unlearn_spark.embedded.ids import as_text, xxhash64_of
from unlearn_spark.embedded.ratings import PAIR, among
from unlearn_spark.embedded.sampling import by_hash
from unlearn_spark.embedded.score import Vectors


@dataclass(frozen=True)
class Sample:
    """The pairs on which predictions are compared.

    Attributes
    ----------
    pairs
        kind, user_id, item_id, matched; by kind and by the ids as text. `deleted`; `unseen`: for
        each matched deleted pair the same user with an item of like popularity that was never
        rated; `neighbouring`: retained ratings of users or items that lost one; `random`: any user
        with any item.
    panel
        By side: ids of up to `PANEL_ROWS` users or items.
    """

    pairs: pa.Table
    panel: Mapping[str, pa.ChunkedArray]


def draw_sample(deletion: Deletion, size: int = SAMPLE_PAIRS) -> Sample:
    """Up to `size` pairs of each class, those with the smallest hashes."""
    retained, deleted = deletion.retained, deletion.deleted
    panel = {}
    for side in SIDES:
        ids = pa.table({"id": retained[f"{side}_id"].unique()})
        panel[side] = by_hash(ids, PANEL_ROWS, ["id"], SAMPLE_SEED)["id"]
    members = by_hash(deleted, size, PAIR, SAMPLE_SEED)
    places, matches = _matches(deletion, members)
    lost = [pc.is_in(retained[name], deleted[name].combine_chunks().unique()) for name in PAIR]
    neighbours = retained.select(PAIR).filter(pc.or_(*lost))
    n_users, n_items = len(panel["user"]), len(panel["item"])
    anything = pa.table(
        {
            "user_id": panel["user"].take(pa.array(np.repeat(np.arange(n_users), n_items))),
            "item_id": panel["item"].take(pa.array(np.tile(np.arange(n_items), n_users))),
        }
    )
    classes = {
        DELETED: members.select(PAIR),
        UNSEEN: matches,
        NEIGHBOURING: by_hash(neighbours, size, PAIR, SAMPLE_SEED),
        RANDOM: by_hash(anything, size, PAIR, SAMPLE_SEED),
    }
    kinds = np.repeat(list(classes), [rows.num_rows for rows in classes.values()])
    pairs = pa.concat_tables(classes.values()).append_column("kind", pa.array(kinds.tolist()))
    matched = kinds == UNSEEN
    matched[places] = True  # members come first
    pairs = pairs.append_column("matched", pa.array(matched))
    texts = pa.table({"kind": pairs["kind"], **{name: as_text(pairs[name]) for name in PAIR}})
    order = pc.sort_indices(texts, [(name, "ascending") for name in texts.column_names])
    return Sample(pairs.take(order), panel)


def _matches(deletion: Deletion, members: pa.Table) -> tuple[NDArray[np.int64], pa.Table]:
    """The members (row numbers) that have a match, and user_id, item_id of the matches: the
    never-rated item nearest in popularity.

    The same item may match several members; so popularities also agree for somebody who rated most
    popular items. A member without a free item within `REACH` places has none.
    """
    counted = deletion.known["item_id"].value_counts()
    items = counted.field("values")
    ranked = items.take(
        pc.sort_indices(
            pa.table(
                {
                    "n": counted.field("counts"),
                    "hash": xxhash64_of([items], SAMPLE_SEED),
                    "id": items,
                }
            ),
            [("n", "descending"), ("hash", "ascending"), ("id", "ascending")],
        )
    )
    steps = np.concatenate([np.arange(-REACH, 0), np.arange(1, REACH + 1)])
    around = pc.index_in(members["item_id"], ranked).to_numpy()[:, None] + steps
    rows, columns = np.nonzero((around >= 0) & (around < len(ranked)))
    pairs = pa.table(
        {
            "user_id": members["user_id"].take(pa.array(rows)),
            "item_id": ranked.take(pa.array(around[rows, columns])),
        }
    )
    users = members["user_id"].combine_chunks().unique()
    rated = [
        table.select(PAIR).filter(pc.is_in(table["user_id"], users))
        for table in (deletion.known, deletion.retained)
    ]
    free = np.flatnonzero(~among(pairs, pa.concat_tables(rated)))
    pairs, rows, columns = pairs.take(pa.array(free)), rows[free], columns[free]
    nearness = pa.table(
        {
            "row": rows,
            "distance": np.abs(steps[columns]),
            "hash": xxhash64_of([pairs[name] for name in PAIR]),
            "match": pairs["item_id"],
        }
    )
    by_nearness = [(name, "ascending") for name in nearness.column_names]
    order = pc.sort_indices(nearness, by_nearness).to_numpy()
    places, first = np.unique(rows[order], return_index=True)
    return places, pairs.take(pa.array(order[first]))


def score_sample(sample: Sample, model: Mapping[str, Vectors]) -> Scores:
    """Score the sample with a model's factors."""
    vectors, known, panel = {}, {}, {}
    for side in SIDES:
        rows = model[side].rows_of(sample.pairs[f"{side}_id"])
        known[side] = rows >= 0
        vectors[side] = np.where(known[side][:, None], model[side].factors[rows], np.float32(0))
        chosen = model[side].rows_of(sample.panel[side])
        panel[side] = model[side].factors[chosen[chosen >= 0]]
    return Scores(
        np.asarray(sample.pairs["kind"].to_pylist()),
        sample.pairs["matched"].to_numpy(),
        known["user"] & known["item"],
        membership.attack_features(vectors["user"], vectors["item"], panel["user"], panel["item"]),
    )
