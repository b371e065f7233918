"""The models table: one row per published version.

The row is written last and makes the version visible. It names the Delta version of every table of
the model, so a reader gets one consistent state whatever is being written meanwhile, and a job that
died half-way changed nothing.
"""

from __future__ import annotations

import json
import math
import uuid
from dataclasses import dataclass, field, fields, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from pyspark.sql import functions as F
from pyspark.sql.types import LongType, StringType, StructField, StructType, TimestampType

from unlearn_spark.config import AlsSettings
from unlearn_spark.core.blocks import SIDES
from unlearn_spark.errors import ConflictError, InputError
from unlearn_spark.tables.store import TableSpec

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, Row

    from unlearn_spark.tables.store import Store

TABLE = "models"

_LONGS = (
    "model_version",
    "parent",
    "ratings_version",
    "ratings_ingest_id",
    "tombstones_version",
    "user_factors_version",
    "item_factors_version",
    "ledger_version",
    "rating_blocks_version",
    "rating_changes_version",
    "receipts_version",
)
_TEXTS = ("kind", "settings", "metrics", "certificate", "run_id")

SPEC = TableSpec(
    StructType(
        [
            *(StructField(name, LongType()) for name in _LONGS),
            *(StructField(name, StringType()) for name in _TEXTS),
            StructField("published_at", TimestampType()),
        ]
    )
)


@dataclass(frozen=True)
class ModelVersion:
    """One row of the models table.

    Attributes
    ----------
    model_version, parent
        Its number, and the version that it was made from (None: from scratch).
    kind
        train, unlearn, update, import or rollback.
    ratings_version, tombstones_version, user_factors_version, ...
        Delta versions of the tables; None if a table does not belong to the model.
    ratings_ingest_id
        The newest ingestion whose ratings the model has seen.
    settings
        `als`: the training settings; `layouts`: blocks and slots of both sides.
    metrics
        Figures of the job.
    certificate
        The promise about every row: its residual is at most `max_residual`. It `holds` if that is
        at most `tau`. `evidence` is scan or ledger; `floor` and `reached` as in the properties.
    """

    model_version: int
    kind: str
    ratings_version: int | None
    user_factors_version: int
    item_factors_version: int
    ledger_version: int
    rating_blocks_version: int
    rating_changes_version: int | None = None
    ratings_ingest_id: int | None = None
    tombstones_version: int | None = None
    receipts_version: int | None = None
    parent: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    certificate: dict[str, Any] = field(default_factory=dict)
    run_id: str = ""
    published_at: datetime | None = None

    @property
    def als(self) -> AlsSettings:
        """The settings that its factors were fitted with."""
        return AlsSettings.model_validate(self.settings["als"])

    @property
    def training_sweeps(self) -> int:
        """Sweeps of the training that it descends from; 0 if unknown."""
        return int(self.metrics.get("training_sweeps", self.metrics.get("sweeps", 0)))

    @property
    def floors(self) -> dict[str, float]:
        """By side: the least denominator of a residual (`floor_of`), as its training measured it;
        0 if its row has none."""
        stored = self.certificate.get("floor", {})
        return {side: float(stored.get(side, 0.0)) for side in SIDES}

    @property
    def reached(self) -> float:
        """The largest residual that the last training or whole sweeps ended with; 0 if there were
        none, or if it is unknown or not finite."""
        reached = self.certificate.get("reached")
        if reached is None:  # rows of earlier versions of this software lack it
            swept = self.kind != "import" and self.certificate.get("evidence") == "scan"
            reached = self.certificate["max_residual"] if swept else 0.0
        return float(reached) if math.isfinite(reached) else 0.0

    @classmethod
    def from_row(cls, row: Row) -> ModelVersion:
        values = row.asDict()
        for name in ("settings", "metrics", "certificate"):
            values[name] = json.loads(values[name] or "{}")
        return cls(**{f.name: values[f.name] for f in fields(cls)})

    def to_values(self) -> tuple[Any, ...]:
        """Values in the order of the table's columns."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        for name in ("settings", "metrics", "certificate"):
            values[name] = json.dumps(values[name], default=float)
        return tuple(values[f.name] for f in SPEC.schema.fields)


@dataclass(frozen=True)
class Sizes:
    """Numbers of users and items of a version, and of the ratings that it was fitted to."""

    users: int
    items: int
    ratings: int

    @property
    def rows(self) -> int:
        """Rows of both sides."""
        return self.users + self.items


def versions(store: Store) -> list[ModelVersion]:
    """All published versions, oldest first."""
    rows = store.read(TABLE).orderBy("model_version").collect()
    return [ModelVersion.from_row(row) for row in rows]


def newest(store: Store) -> ModelVersion | None:
    """The newest published version, or None before the first training."""
    if not store.exists(TABLE):
        return None
    row = store.read(TABLE).orderBy(F.desc("model_version")).first()
    return None if row is None else ModelVersion.from_row(row)


def published(store: Store, model_version: int | None = None) -> ModelVersion:
    """A published version, the newest by default.

    Raises
    ------
    TableMissingError
        No version was ever published.
    InputError
        That version does not exist.
    """
    store.require(TABLE)
    rows = store.read(TABLE)
    if model_version is None:
        row = rows.orderBy(F.desc("model_version")).first()
    else:
        row = rows.where(F.col("model_version") == model_version).first()
    if row is None:
        known = [r["model_version"] for r in rows.select("model_version").collect()]
        wanted = "a model" if model_version is None else f"model version {model_version}"
        raise InputError(
            f"{wanted} is not published; "
            + (f"versions are {sorted(known)}" if known else "run jobs/train.py first")
        )
    return ModelVersion.from_row(row)


def publish(store: Store, model: ModelVersion) -> ModelVersion:
    """Make a version visible, unless another job published since its parent was read.

    Raises
    ------
    ConflictError
        Another job published that number or a later one; nothing became visible.
    """
    store.create(TABLE, SPEC)
    model = replace(model, run_id=uuid.uuid4().hex, published_at=datetime.now(UTC))
    row = store.frame([model.to_values()], SPEC.schema)
    # Of two racing publishers one must lose: a merge without a partition predicate conflicts with
    # every concurrent commit, and its condition finds a row that was committed before.
    inserted = store.merge(
        TABLE,
        row,
        "t.model_version >= s.model_version",
        ["WHEN NOT MATCHED THEN INSERT *"],
    )
    if not inserted:
        raise ConflictError(
            f"model version {model.model_version} was published by another job meanwhile; "
            "run this job again"
        )
    return model


def read_factors(store: Store, model: ModelVersion) -> tuple[DataFrame, DataFrame]:
    """User and item factors of a version: id, block, slot, n_ratings, factors array<float>."""
    return (
        store.read("user_factors", model.user_factors_version),
        store.read("item_factors", model.item_factors_version),
    )


def sizes(store: Store, model: ModelVersion) -> Sizes:
    """The sizes of a version: from its metrics, else counted."""
    if all(field.name in model.metrics for field in fields(Sizes)):
        return Sizes(**{field.name: int(model.metrics[field.name]) for field in fields(Sizes)})
    users, items = (
        rows.agg(F.count(F.lit(1)).alias("n"), F.sum("n_ratings").alias("ratings"))
        for rows in read_factors(store, model)
    )
    row = users.crossJoin(items.select(F.col("n").alias("items"))).first()
    assert row is not None
    return Sizes(row["n"], row["items"], row["ratings"] or 0)
