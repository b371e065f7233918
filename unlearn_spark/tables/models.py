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

import pyarrow as pa
from pydantic import ValidationError

from unlearn_spark.config import AlsSettings
from unlearn_spark.core.blocks import SIDES
from unlearn_spark.errors import ConflictError, InputError
from unlearn_spark.tables.store import TIMESTAMP, TableSpec

if TYPE_CHECKING:
    from collections.abc import Mapping

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
_SETTINGS = ("als", "layouts")
"""Sections of a row's settings."""

_TEXTS = ("kind", "settings", "metrics", "certificate", "run_id")

SPEC = TableSpec(
    pa.schema(
        [
            *(pa.field(name, pa.int64()) for name in _LONGS),
            *(pa.field(name, pa.string()) for name in _TEXTS),
            pa.field("published_at", TIMESTAMP),
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
    def from_row(cls, row: Mapping[str, Any]) -> ModelVersion:
        """The version from a row of the table."""
        values = dict(row)
        for name in ("settings", "metrics", "certificate"):
            values[name] = json.loads(values[name] or "{}")
        return cls(**{f.name: values[f.name] for f in fields(cls)})

    def to_row(self) -> dict[str, Any]:
        """Its row of the table."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        for name in ("settings", "metrics", "certificate"):
            values[name] = json.dumps(values[name], default=float)
        return values

    @property
    def sizes(self) -> Sizes:
        """Its numbers of users and items, and of the ratings that it was fitted to."""
        return Sizes(**{f.name: int(self.metrics[f.name]) for f in fields(Sizes)})


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
    """All published versions, oldest first. Raises TableMissingError before the first training."""
    return [ModelVersion.from_row(row) for row in _rows(store)]


def _rows(store: Store) -> list[dict[str, Any]]:
    """All rows of the table, oldest first."""
    rows: list[dict[str, Any]] = store.arrow(TABLE).sort_by("model_version").to_pylist()
    return rows


def newest(store: Store) -> ModelVersion | None:
    """The newest published version, or None before the first training.

    Raises
    ------
    InputError
        A newer version of this software wrote it.
    """
    known = _rows(store) if store.exists(TABLE) else []
    return _understood(known[-1]) if known else None


def _understood(row: Mapping[str, Any]) -> ModelVersion:
    """The version from a row of which this software knows every setting and every filled column."""
    model = ModelVersion.from_row(row)
    unknown = [name for name in row if name not in SPEC.schema.names and row[name] is not None]
    unknown += [f"setting {name}" for name in model.settings if name not in _SETTINGS]
    try:
        AlsSettings.model_validate(model.settings.get("als", {}))
    except ValidationError as error:
        unknown += [".".join(("setting als", *map(str, e["loc"]))) for e in error.errors()]
    if unknown:
        raise InputError(
            f"table {TABLE}: model version {model.model_version} was written by a newer version of "
            f"this software ({unknown[0]} is unknown here); upgrade unlearn-spark"
        )
    return model


def published(store: Store, model_version: int | None = None) -> ModelVersion:
    """A published version, the newest by default.

    Raises
    ------
    TableMissingError
        No version was ever published.
    InputError
        That version does not exist, or a newer version of this software wrote it.
    """
    known = {row["model_version"]: row for row in _rows(store)}
    wanted = max(known, default=None) if model_version is None else model_version
    if wanted is None or wanted not in known:
        what = "a model" if model_version is None else f"model version {model_version}"
        raise InputError(
            f"{what} is not published; "
            + (f"versions are {sorted(known)}" if known else "run job train first")
        )
    return _understood(known[wanted])


def publish(store: Store, model: ModelVersion) -> ModelVersion:
    """Make a version visible, unless another job published since its parent was read.

    Raises
    ------
    ConflictError
        Another job published that number or a later one; nothing became visible.
    """
    store.create(TABLE, SPEC)
    model = replace(model, run_id=uuid.uuid4().hex, published_at=datetime.now(UTC))
    row = pa.Table.from_pylist([model.to_row()], schema=SPEC.schema)
    if not store.insert(TABLE, row, "t.model_version >= s.model_version"):
        raise ConflictError(
            f"model version {model.model_version} was published by another job meanwhile; "
            "run this job again"
        )
    return model
