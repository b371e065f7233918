"""Factor rows, their ledger and the rating blocks they solve, as Delta tables.

No table is partitioned by id. A whole model overwrites them all. A night replaces only the factor
blocks that changed, and every other block keeps its very files.
"""

from __future__ import annotations

import pyarrow as pa

from unlearn_spark.tables.store import TableSpec

LEDGER = "ledger"
RATING_BLOCKS = "rating_blocks"
RATING_CHANGES = "rating_changes"

MODEL_TABLES = ("user_factors", "item_factors", LEDGER, RATING_BLOCKS, RATING_CHANGES)
"""The tables that a new model version replaces or changes."""


def factor_table(side: str) -> str:
    """The name `user_factors` or `item_factors`."""
    return f"{side}_factors"


def factor_spec(id_type: pa.DataType) -> TableSpec:
    """One row per user or item: its vector and how many ratings it solves."""
    return TableSpec(
        pa.schema(
            [
                ("id", id_type),
                ("block", pa.int32()),
                ("slot", pa.int32()),
                ("n_ratings", pa.int32()),
                ("factors", pa.list_(pa.float32())),
            ]
        ),
        partition_by=("block",),
        skipping=("slot",),
    )


LEDGER_SPEC = TableSpec(
    pa.schema(
        [
            ("side", pa.string()),
            ("id", pa.string()),
            ("block", pa.int32()),
            ("slot", pa.int32()),
            ("chunk", pa.int32()),
            ("n_ratings", pa.int32()),
            ("bound", pa.float64()),
            ("gradient_norm", pa.float64()),
            ("b_norm", pa.float64()),
            ("factor_norm", pa.float64()),
        ]
    ),
    partition_by=("side", "block"),
    skipping=("slot",),
)
"""bound >= ||A x - b|| / max(||b||, floor) of the row, with its side's floor (`floor_of`).
`gradient_norm` is an upper bound of the numerator, `b_norm` a lower bound of ||b||."""

RATING_BLOCKS_SPEC = TableSpec(
    pa.schema(
        [
            ("side", pa.string()),
            ("block", pa.int32()),
            ("chunk", pa.int32()),
            ("slots", pa.binary()),
            ("counts", pa.binary()),
            ("others", pa.binary()),
            ("values", pa.binary()),
        ]
    ),
    partition_by=("side", "block"),
    skipping=("chunk",),
)
"""The ratings that a model solves, packed by row on both sides (`core.blocks.RatingBlock`). Each
chunk is a row group, so the ratings of one row are read with few others."""

RATING_CHANGES_SPEC = TableSpec(
    pa.schema(
        [
            ("side", pa.string()),
            ("block", pa.int32()),
            ("slot", pa.int32()),
            ("other_slot", pa.int32()),
            ("value", pa.float32()),
            ("change", pa.int32()),
            ("model_version", pa.int64()),
        ]
    ),
    partition_by=("side",),
    skipping=("block", "model_version"),
)
"""What changed since the rating blocks were packed: change -1 removes the pair, +1 adds it. A night
changes few ratings; packing them anew would rewrite every block that they touch."""
