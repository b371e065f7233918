"""The audits table: what each full scan of a published version found."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pyarrow as pa

from unlearn_spark.tables.store import TIMESTAMP, TableSpec

if TYPE_CHECKING:
    from unlearn_spark.tables.store import Store

TABLE = "audits"

SPEC = TableSpec(
    pa.schema(
        [
            pa.field("model_version", pa.int64()),
            pa.field("audited_at", TIMESTAMP),
            pa.field("max_residual_user", pa.float64()),
            pa.field("max_residual_item", pa.float64()),
            pa.field("tau", pa.float64()),
            pa.field("ledger_holds", pa.bool_()),
            pa.field("tombstoned_ratings_found", pa.int64()),
            pa.field("holds", pa.bool_()),
        ]
    ),
)


@dataclass(frozen=True)
class Audit:
    """What a full scan of one model version found.

    Attributes
    ----------
    model_version, tau
        The version, and the largest residual that its certificate allows.
    max_residual
        By side: the largest relative residual. Infinite if a row has no usable vector, or has a
        nonzero gradient while its right-hand side and its side's floor are 0.
    floor
        By side: the least denominator of its residuals, from the certificate.
    rows
        By side: the number of factor rows.
    ledger_below, ledger_missing, ledger_extra
        Ledger entries whose bound is below the residual; factor rows without an entry; entries
        without a factor row.
    tombstoned_ratings_found
        Ratings of the model that a request with a receipt covers.
    rows_without_ratings
        Factor rows without a retained rating.
    ratings_without_rows
        Retained ratings whose user or item has no factor row.
    """

    model_version: int
    tau: float
    max_residual: dict[str, float]
    floor: dict[str, float]
    rows: dict[str, int]
    ledger_below: int
    ledger_missing: int
    ledger_extra: int
    tombstoned_ratings_found: int
    rows_without_ratings: int
    ratings_without_rows: int

    @property
    def ledger_holds(self) -> bool:
        """Whether the ledger has one entry for every row, and no bound is below the residual."""
        return not (self.ledger_below or self.ledger_missing or self.ledger_extra)

    @property
    def failures(self) -> list[str]:
        """The checks that failed, a clause each."""
        found = [
            f"the largest {side} residual {residual:.3e} exceeds tau = {self.tau:.3e}"
            for side, residual in self.max_residual.items()
            if not residual <= self.tau
        ]
        counted = {
            "ledger bounds are below the residual": self.ledger_below,
            "factor rows have no ledger entry": self.ledger_missing,
            "ledger entries have no factor row": self.ledger_extra,
            "ratings of honoured requests are still there": self.tombstoned_ratings_found,
            "factor rows have no rating": self.rows_without_ratings,
            "ratings have no factor row": self.ratings_without_rows,
        }
        return found + [f"{number} {what}" for what, number in counted.items() if number]

    @property
    def holds(self) -> bool:
        return not self.failures


def append(store: Store, found: Audit) -> int:
    """Add an audit that ends at this moment; return the Delta version that holds it."""
    store.create(TABLE, SPEC)
    row = {
        "model_version": found.model_version,
        "audited_at": datetime.now(UTC),
        "max_residual_user": found.max_residual["user"],
        "max_residual_item": found.max_residual["item"],
        "tau": found.tau,
        "ledger_holds": found.ledger_holds,
        "tombstoned_ratings_found": found.tombstoned_ratings_found,
        "holds": found.holds,
    }
    return store.append(TABLE, pa.Table.from_pylist([row], schema=SPEC.schema))
