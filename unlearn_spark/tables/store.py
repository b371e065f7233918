"""What every table has in common, and the interface by which an engine reaches the Delta tables.

Both engines store the same tables: `delta_rs.DeltaRsStore` reads and writes them in this process,
`delta_spark.SparkStore` through a Spark session. The small tables (models, requests, receipts,
audits, quarantine) pass through this interface as Arrow tables, so there is one implementation of
each. Ratings, factors and the ledger are too large for that; each engine has its own ways.
"""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import pyarrow as pa

from unlearn_spark.errors import ConflictError, InputError, SettingsError, TableMissingError
from unlearn_spark.preconditions import is_remote, nearest_existing

if TYPE_CHECKING:
    from unlearn_spark.config import Settings

T = TypeVar("T")

TIMESTAMP = pa.timestamp("us", tz="UTC")

MOST_ATTEMPTS = 5
"""How often a job tries a write that other jobs may overtake, where it need not start over."""

MADE_BY = {
    "ratings": "ingest_ratings",
    "quarantine": "ingest_ratings",
    "tombstones": "ingest_tombstones",
    "models": "train",
    "user_factors": "train",
    "item_factors": "train",
    "ledger": "train",
    "rating_blocks": "train",
    "rating_changes": "train",
    "receipts": "unlearn",
    "recommendations": "recommend",
    "audits": "audit",
}
"""The job that makes a table."""

_PROPERTIES = {
    # Delta versions that published models name must stay readable: Delta refuses time travel past
    # deletedFileRetentionDuration even while the files exist.
    "delta.deletedFileRetentionDuration": "interval 3650 days",
    "delta.logRetentionDuration": "interval 3650 days",
    "delta.checkpointInterval": "20",
}

_IN_LOG = re.compile(r"[0-9]{20}\.(json|checkpoint\..+)")
"""Names of commits and checkpoints, after Delta's protocol."""


@dataclass(frozen=True)
class TableSpec:
    """How a table is created.

    Attributes
    ----------
    schema
        Columns in order. A field's metadata becomes that of the Delta column; its key `comment` is
        what catalogs show.
    partition_by
        Partition columns; never an id, because the log shows partition values in plain text.
    skipping
        Columns whose min/max statistics Delta may keep; never an id or a rating, because the log
        outlives the rows.
    deletion_vectors
        Spark may mark deleted rows instead of rewriting files; `purge` rewrites them later.
    """

    schema: pa.Schema
    partition_by: tuple[str, ...] = ()
    skipping: tuple[str, ...] = ()
    deletion_vectors: bool = False

    @property
    def properties(self) -> dict[str, str]:
        """The table's Delta properties, which are set when it is created and never changed."""
        properties = dict(_PROPERTIES)
        if self.skipping:
            properties["delta.dataSkippingStatsColumns"] = ",".join(self.skipping)
        else:
            properties["delta.dataSkippingNumIndexedCols"] = "0"
        properties["delta.enableDeletionVectors"] = str(self.deletion_vectors).lower()
        return properties


class Store(ABC):
    """The product's tables under one root directory, or in one catalog schema."""

    root: str | None
    catalog: str | None

    @abstractmethod
    def location(self, table: str) -> str:
        """Where the table is: its directory, or its name in the catalog."""

    @abstractmethod
    def exists(self, table: str) -> bool:
        """Whether the table exists; the folder of a job that died creating it does not count."""

    @abstractmethod
    def version(self, table: str) -> int:
        """The newest Delta version of a table. Raises TableMissingError."""

    @abstractmethod
    def rows(self, table: str) -> int:
        """The number of rows of the newest version, which need not be read for it."""

    @abstractmethod
    def arrow(
        self,
        table: str,
        version: int | None = None,
        columns: Sequence[str] | None = None,
    ) -> pa.Table:
        """All rows of a small table at a Delta version (None: the newest), in these columns.

        Raises
        ------
        TableMissingError
            The table does not exist.
        """

    @abstractmethod
    def create(self, table: str, spec: TableSpec) -> None:
        """Create the table with all its properties, unless it exists."""

    @abstractmethod
    def append(self, table: str, rows: pa.Table) -> int:
        """Append rows; return the Delta version that holds them."""

    @abstractmethod
    def overwrite(self, table: str, rows: pa.Table) -> int:
        """Replace all rows; return the Delta version. Earlier versions stay readable."""

    @abstractmethod
    def insert(self, table: str, rows: pa.Table, unless: str) -> int:
        """Insert those of the rows `s` for which no row `t` of the table meets a condition in SQL.

        Only column names belong in the condition, because Delta writes its text into the log.
        Returns the number of inserted rows.

        Raises
        ------
        ConflictError
            Another job committed to the table meanwhile; nothing was inserted.
        """

    @abstractmethod
    def restore(self, table: str, version: int) -> int:
        """Make an earlier version the current one, by a commit that copies no data.

        Returns the newest Delta version afterwards: `version` itself where it was the newest.
        """

    def require(self, table: str) -> None:
        """Raise TableMissingError, naming the job that makes the table, unless it exists."""
        if not self.exists(table):
            maker = MADE_BY.get(table, "an earlier job")
            raise TableMissingError(
                f"table {table} is missing under {self.root or self.catalog}; run job {maker} first"
            )


def check_root(settings: Settings) -> None:
    """Fail early if tables cannot be kept where the settings say.

    Raises
    ------
    SettingsError
        Neither root nor catalog is given, or a local root cannot be created or written.
    """
    if settings.catalog is not None:
        return
    if not settings.root:
        raise SettingsError(
            "no place for the tables: give --root DIR, or root or catalog in --conf"
        )
    if is_remote(settings.root):
        return
    existing = nearest_existing(Path(settings.root))
    if not existing.is_dir():
        raise SettingsError(f"--root {settings.root}: {existing} is a file; name a directory")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise SettingsError(f"--root {settings.root}: {existing} is not writable; name another")


def absolute_root(root: str) -> str:
    """The root without a trailing slash, and absolute if it is local."""
    return root.rstrip("/") if is_remote(root) else str(Path(root).absolute())


def is_delta(folder: Path) -> bool:
    """Whether a local folder is a Delta table: its log has a commit or a checkpoint."""
    log = folder / "_delta_log"
    return log.is_dir() and any(_IN_LOG.fullmatch(path.name) for path in log.iterdir())


def persistently(attempt: Callable[[], T]) -> T:
    """Call `attempt` again while it loses against other jobs; return what it returns.

    Raises
    ------
    ConflictError
        It lost `MOST_ATTEMPTS` times.
    """
    for _ in range(MOST_ATTEMPTS - 1):
        with suppress(ConflictError):
            return attempt()
    return attempt()


def conflict(table: str) -> ConflictError:
    """The error of a writer that lost a race."""
    return ConflictError(
        f"table {table}: another job committed at the same time; run this job again"
    )


def outdated(table: str) -> InputError:
    """The error for a table that an earlier version of this software made."""
    return InputError(
        f"table {table} has the layout of an earlier version; ingest and train under a new root"
    )
