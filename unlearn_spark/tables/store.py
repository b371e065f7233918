"""Delta tables by path or by catalog name: the only module that turns a table into a location.

Everything goes through SQL and the DataFrame readers and writers, which work on a classic session
and over Spark Connect alike (the `DeltaTable` class does not).
"""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
from pyspark.errors import AnalysisException
from pyspark.sql import functions as F

from unlearn_spark.config import Settings
from unlearn_spark.errors import ConflictError, InputError, SettingsError, TableMissingError
from unlearn_spark.preconditions import is_remote, nearest_existing
from unlearn_spark.tables.sql import quoted

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, DataFrameWriter, SparkSession
    from pyspark.sql.types import StructType

MADE_BY = {
    "ratings": "jobs/ingest_ratings.py",
    "quarantine": "jobs/ingest_ratings.py",
    "tombstones": "jobs/ingest_tombstones.py",
    "models": "jobs/train.py",
    "user_factors": "jobs/train.py",
    "item_factors": "jobs/train.py",
    "ledger": "jobs/train.py",
    "rating_blocks": "jobs/train.py",
    "rating_changes": "jobs/train.py",
    "receipts": "jobs/unlearn.py",
    "recommendations": "jobs/recommend.py",
    "audits": "jobs/audit.py",
}

_CONFLICTS = (
    "ConcurrentAppendException",
    "ConcurrentDeleteReadException",
    "ConcurrentDeleteDeleteException",
    "ConcurrentTransactionException",
    "ConcurrentWriteException",
    "MetadataChangedException",
    "ProtocolChangedException",
    "DELTA_CONCURRENT",
    "DELTA_METADATA_CHANGED",
    # A table that we create did not exist a moment ago.
    "DELTA_PATH_EXISTS",
    "TABLE_OR_VIEW_ALREADY_EXISTS",
)

# Delta versions that published models name must stay readable: Delta refuses time travel past
# deletedFileRetentionDuration even while the files exist.
_PROPERTIES = {
    "delta.deletedFileRetentionDuration": "interval 3650 days",
    "delta.logRetentionDuration": "interval 3650 days",
    "delta.checkpointInterval": "20",
}

_IN_LOG = re.compile(r"[0-9]{20}\.(json|checkpoint\..+)")
"""Names of commits and checkpoints, after Delta's protocol."""

RECENT_COMMITS = 50
"""How many of a table's newest commits a write searches for its own."""


@dataclass(frozen=True)
class TableSpec:
    """How a table is created.

    Attributes
    ----------
    schema
        Columns in order.
    partition_by
        Partition columns; never an id, because the log shows partition values in plain text.
    skipping
        Columns whose min/max statistics Delta may keep; never an id or a rating, because the log
        outlives the rows.
    deletion_vectors
        Deletes mark rows instead of rewriting files; `purge` rewrites them later.
    """

    schema: StructType
    partition_by: tuple[str, ...] = ()
    skipping: tuple[str, ...] = ()
    deletion_vectors: bool = False


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


def is_delta(folder: Path) -> bool:
    """Whether a local folder is a Delta table: its log has a commit or a checkpoint."""
    log = folder / "_delta_log"
    return log.is_dir() and any(_IN_LOG.fullmatch(path.name) for path in log.iterdir())


class Store:
    """The product's tables under one root directory, or in one catalog schema."""

    def __init__(
        self, spark: SparkSession, root: str | None = None, catalog: str | None = None
    ) -> None:
        if (root is None) == (catalog is None):
            raise SettingsError("give exactly one of root and catalog")
        self.spark = spark
        self.root = None if root is None else self._absolute(root)
        self.catalog = catalog
        # Names between dots, each plain or in backticks.
        parts = re.findall(r"`(?:[^`]|``)*`|[^.`]+", catalog or "")
        self._schema = ".".join(part if part[0] == "`" else quoted(part) for part in parts)
        if catalog is not None:
            self._require_schema(catalog)

    def _require_schema(self, catalog: str) -> None:
        try:
            there = self.spark.catalog.databaseExists(self._schema)
        except AnalysisException:  # too many parts, or no such catalog
            there = False
        if not there:
            raise SettingsError(f"catalog {catalog}: there is no such schema; create it first")

    @staticmethod
    def _absolute(root: str) -> str:
        if is_remote(root):
            return root.rstrip("/")
        return str(Path(root).absolute())

    def location(self, table: str) -> str:
        """The table's directory, where tables are kept by path."""
        if self.root is None:
            raise SettingsError(f"table {table} is in catalog {self.catalog}, not under a root")
        return f"{self.root}/{table}"

    def name(self, table: str) -> str:
        """The table as SQL writes it."""
        if self.catalog:
            return f"{self._schema}.{quoted(table)}"
        return f"delta.{quoted(self.location(table))}"

    def exists(self, table: str) -> bool:
        """Whether the table exists; the folder of a job that died creating it does not count."""
        if self.catalog:
            return bool(self.spark.catalog.tableExists(self.name(table)))
        if not is_remote(self.location(table)):
            return is_delta(Path(self.location(table)))
        try:
            self.spark.read.format("delta").load(self.location(table)).schema  # noqa: B018
        except Exception as error:
            if "DELTA_TABLE_NOT_FOUND" in str(error) or "PATH_NOT_FOUND" in str(error):
                return False
            if "No FileSystem for scheme" in str(error):
                raise SettingsError(
                    f"root {self.root}: Spark has no access to storage of that kind; "
                    "correct it, or add the storage's jars"
                ) from error
            if "DELTA_MISSING_DELTA_TABLE" in str(error) or "not a Delta table" in str(error):
                return False
            raise
        return True

    def _log(self, table: str) -> Path | None:
        """The directory of the table's log; None if this process cannot list it, in a catalog or
        in remote storage."""
        if self.catalog or is_remote(self.location(table)):
            return None
        return Path(self.location(table), "_delta_log")

    def _commits(self, table: str) -> list[Path]:
        """The newest commits in a log that `_log` can see, newest first.

        Listing files (named after Delta's protocol) saves the Spark jobs of DESCRIBE HISTORY.
        """
        log = self._log(table)
        found = [] if log is None else [p for p in log.glob("*.json") if p.stem.isdigit()]
        return sorted(found, reverse=True)[:RECENT_COMMITS]

    def require(self, table: str) -> None:
        """Raise TableMissingError, naming the job that makes the table, unless it exists."""
        if not self.exists(table):
            maker = MADE_BY.get(table, "an earlier job")
            raise TableMissingError(
                f"table {table} is missing under {self.root or self.catalog}; run {maker} first"
            )

    def read(self, table: str, version: int | None = None) -> DataFrame:
        """The table at a Delta version; None: the newest. Raises TableMissingError."""
        self.require(table)
        if self.catalog:
            suffix = "" if version is None else f" VERSION AS OF {version}"
            return self.spark.sql(f"SELECT * FROM {self.name(table)}{suffix}")
        reader = self.spark.read.format("delta")
        if version is not None:
            reader = reader.option("versionAsOf", version)
        return reader.load(self.location(table))

    def version(self, table: str) -> int:
        """The newest Delta version of a table."""
        self.require(table)
        commits = self._commits(table)
        if commits:
            return int(commits[0].stem)
        row = self.spark.sql(f"DESCRIBE HISTORY {self.name(table)} LIMIT 1").first()
        assert row is not None
        return int(row["version"])

    def create(self, table: str, spec: TableSpec) -> None:
        """Create the table with all its properties, unless it exists. Changing properties later
        would fail every concurrent writer."""
        if not self.exists(table):
            self._create(table, spec, self.frame([], spec.schema), "ignore")

    def create_with(self, table: str, spec: TableSpec, rows: DataFrame) -> int:
        """Create the table with its first rows in one commit; return the version of that.

        Raises
        ------
        ConflictError
            The table exists by now.
        """
        self._create(table, spec, rows, "error")
        return 0

    def _create(self, table: str, spec: TableSpec, rows: DataFrame, mode: str) -> None:
        # By a writer, because CREATE TABLE fails on what a job left that died creating the table.
        properties = {
            **_PROPERTIES,
            "delta.dataSkippingStatsColumns": ",".join(spec.skipping),
            "delta.enableDeletionVectors": str(spec.deletion_vectors).lower(),
        }
        if not spec.skipping:
            del properties["delta.dataSkippingStatsColumns"]
            properties["delta.dataSkippingNumIndexedCols"] = "0"
        rows = rows.select(
            *[F.col(f.name).alias(f.name, metadata=f.metadata) for f in spec.schema.fields]
        )
        writer = rows.write.mode(mode).options(**properties)
        self._save(table, writer.partitionBy(*spec.partition_by))

    def frame(self, rows: Sequence[Sequence[object]], schema: StructType) -> DataFrame:
        """A DataFrame of a few rows of the driver, values in the order of the schema.

        Made from Arrow, because a list of tuples would start a Python worker of another kind than
        those of queries.
        """
        columns = {name: [row[i] for row in rows] for i, name in enumerate(schema.names)}
        return self.spark.createDataFrame(pa.table(columns), schema)

    def append(self, table: str, rows: DataFrame) -> int:
        """Append rows; return the Delta version that holds them."""
        return self._write(table, rows, "append", {})

    def overwrite(
        self, table: str, rows: DataFrame, max_records_per_file: int | None = None
    ) -> int:
        """Replace all rows; the earlier versions stay readable."""
        options = {"partitionOverwriteMode": "static"}
        if max_records_per_file is not None:
            options["maxRecordsPerFile"] = str(max_records_per_file)
        return self._write(table, rows, "overwrite", options)

    def replace_where(self, table: str, rows: DataFrame, predicate: str) -> int:
        """Replace the rows that meet a predicate on partition columns (no ids: it is logged)."""
        return self._write(table, rows, "overwrite", {"replaceWhere": predicate})

    def _write(self, table: str, rows: DataFrame, mode: str, options: Mapping[str, str]) -> int:
        token = uuid.uuid4().hex
        self._save(table, rows.write.mode(mode).options(**options, userMetadata=token))
        return self._version_of(table, token)

    def _save(self, table: str, writer: DataFrameWriter) -> None:
        with self._explained(table):
            if self.catalog:
                writer.format("delta").saveAsTable(self.name(table))
            else:
                writer.format("delta").save(self.location(table))

    def _version_of(self, table: str, token: str) -> int:
        """The version that the write with this token made, even if others committed since."""
        for commit in self._commits(table):
            with commit.open() as actions:
                if any(token in action for action in actions):
                    return int(commit.stem)
        history = self.spark.sql(f"DESCRIBE HISTORY {self.name(table)} LIMIT {RECENT_COMMITS}")
        row = history.where(F.col("userMetadata") == token).select("version").first()
        return int(row["version"]) if row is not None else self.version(table)

    def merge(
        self,
        table: str,
        source: DataFrame,
        condition: str,
        clauses: Sequence[str],
    ) -> int:
        """`MERGE INTO table AS t USING source AS s ON condition clauses...` in SQL.

        Only column names belong in the condition, because Delta writes its text into the log.
        Returns how many rows were inserted, updated or deleted; if none, there is no new version.
        """
        view = f"merge_source_{uuid.uuid4().hex}"
        source.createOrReplaceTempView(view)
        try:
            with self._explained(table):
                row = self.spark.sql(
                    f"MERGE INTO {self.name(table)} AS t USING {view} AS s ON {condition} "
                    + " ".join(clauses)
                ).first()
        finally:
            self.spark.catalog.dropTempView(view)
        assert row is not None
        return int(row["num_affected_rows"])

    def delete(
        self,
        table: str,
        condition: str,
        columns: Sequence[str],
        is_gone: Callable[..., pa.Array],
    ) -> None:
        """Delete the rows that a Python function finds among those that meet an SQL condition.

        Delta logs the condition and the function's name, but not what the function looks for.
        Parquet skips pages by the condition; a merge would read every row of a file. If no row is
        deleted, there is no new version.

        Parameters
        ----------
        condition
            SQL without ids, because it is logged. Only rows that meet it are handed to Python.
        columns
            What the function gets, as Arrow arrays of one length.
        is_gone
            Returns booleans of that length.
        """
        name = f"is_gone_{uuid.uuid4().hex}"
        function = F.arrow_udf(is_gone, "boolean")  # type: ignore[call-overload]
        self.spark.udf.register(name, function)
        found = f"{condition} AND {name}({', '.join(columns)})"
        try:
            with self._explained(table):
                self.spark.sql(f"DELETE FROM {self.name(table)} WHERE {found}")
        finally:
            self.spark.sql(f"DROP TEMPORARY FUNCTION IF EXISTS {name}")

    def restore(self, table: str, version: int) -> int:
        """Make an earlier version the current one, by a commit that copies no data.

        Returns the newest Delta version afterwards: `version` itself where it was the newest.
        """
        if self.version(table) == version:
            return version
        with self._explained(table):
            self.spark.sql(f"RESTORE TABLE {self.name(table)} TO VERSION AS OF {version}")
        return self.version(table)

    @contextmanager
    def _explained(self, table: str) -> Iterator[None]:
        """Raise ConflictError for a lost race, and InputError for an unwritable place or an old
        layout."""
        try:
            yield
        except Exception as error:
            text = str(error)
            if any(mark in text for mark in _CONFLICTS):
                raise ConflictError(
                    f"table {table}: another job committed at the same time; run this job again"
                ) from error
            if "AccessControlException" in text or "Permission denied" in text:
                raise InputError(f"table {table}: {self.name(table)} is not writable") from error
            if "A schema mismatch detected" in text:
                raise outdated(table) from error
            raise


def outdated(table: str) -> InputError:
    """The error for a table that an earlier version of this software made."""
    return InputError(
        f"table {table} has the layout of an earlier version; ingest and train under a new root"
    )
