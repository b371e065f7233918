"""Delta tables through a Spark session, by path or by catalog name.

Everything goes through SQL and the DataFrame readers and writers, which work on a classic session
and over Spark Connect alike (the `DeltaTable` class does not).
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
from pyspark.errors import AnalysisException
from pyspark.sql import functions as F
from pyspark.sql.pandas.types import from_arrow_schema

from unlearn_spark.errors import InputError, SettingsError
from unlearn_spark.preconditions import is_remote, misread_by_delta_rs
from unlearn_spark.tables.store import (
    Store,
    TableSpec,
    absolute_root,
    conflict,
    is_delta,
    outdated,
)

if TYPE_CHECKING:
    from deltalake import DeltaTable
    from pyspark.sql import DataFrame, DataFrameWriter, SparkSession

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

RECENT_COMMITS = 50
"""How many of a table's newest commits a write searches for its own."""


def quoted(name: str) -> str:
    """A name quoted for Spark's SQL and expressions, whatever characters it has."""
    return "`" + name.replace("`", "``") + "`"


class SparkStore(Store):
    """The product's tables under one root directory, or in one catalog schema."""

    def __init__(
        self, spark: SparkSession, root: str | None = None, catalog: str | None = None
    ) -> None:
        if (root is None) == (catalog is None):
            raise SettingsError("give exactly one of root and catalog")
        self.spark = spark
        self.root = None if root is None else absolute_root(root)
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

    def location(self, table: str) -> str:
        if self.root is None:
            return self.name(table)
        return f"{self.root}/{table}"

    def name(self, table: str) -> str:
        """The table as SQL writes it."""
        if self.catalog:
            return f"{self._schema}.{quoted(table)}"
        return f"delta.{quoted(self.location(table))}"

    def exists(self, table: str) -> bool:
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

    def _local(self, table: str) -> DeltaTable | None:
        """The newest state of a table of this machine, without the Spark jobs of DESCRIBE HISTORY;
        None for a table in a catalog or in remote storage, or of a name that delta-rs misreads."""
        # Late, because workers of Spark import this module, and need none of it.
        from deltalake import DeltaTable

        path = self.location(table)
        if self.catalog or is_remote(path) or misread_by_delta_rs(path):
            return None
        return DeltaTable(path)

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
        self.require(table)
        local = self._local(table)
        if local is not None:
            return int(local.version())
        row = self.spark.sql(f"DESCRIBE HISTORY {self.name(table)} LIMIT 1").first()
        assert row is not None
        return int(row["version"])

    def rows(self, table: str) -> int:
        return self.read(table).count()  # Delta answers from the log

    def arrow(
        self, table: str, version: int | None = None, columns: Sequence[str] | None = None
    ) -> pa.Table:
        rows = self.read(table, version)
        return (rows if columns is None else rows.select(*columns)).toArrow()

    def column_metadata(self, table: str, column: str) -> Mapping[str, object]:
        """The metadata of a column; where it has none, the table's properties."""
        metadata: dict[str, object] = self.read(table).schema[column].metadata
        if metadata:
            return metadata
        properties = self.spark.sql(f"SHOW TBLPROPERTIES {self.name(table)}").collect()
        return {row["key"]: row["value"] for row in properties}

    # --- writing -----------------------------------------------------------------------------

    def create(self, table: str, spec: TableSpec) -> None:
        if not self.exists(table):
            self._create(table, spec, self.frame(spec.schema.empty_table()), "ignore")

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
        columns = []
        for field in spec.schema:
            given = field.metadata or {}
            metadata = {key.decode(): value.decode() for key, value in given.items()}
            columns.append(F.col(field.name).alias(field.name, metadata=metadata))
        writer = rows.select(*columns).write.mode(mode).options(**spec.properties)
        self._save(table, writer.partitionBy(*spec.partition_by))

    def frame(self, rows: pa.Table) -> DataFrame:
        """A DataFrame of the driver's rows."""
        # Connect infers no schema from a table without rows.
        return self.spark.createDataFrame(rows, from_arrow_schema(rows.schema))

    def append(self, table: str, rows: pa.Table | DataFrame) -> int:
        return self._write(table, rows, "append", {})

    def overwrite(
        self, table: str, rows: pa.Table | DataFrame, max_records_per_file: int | None = None
    ) -> int:
        options = {"partitionOverwriteMode": "static"}
        if max_records_per_file is not None:
            options["maxRecordsPerFile"] = str(max_records_per_file)
        return self._write(table, rows, "overwrite", options)

    def insert(self, table: str, rows: pa.Table, unless: str) -> int:
        # Of two racing writers one must lose: a merge without a partition predicate conflicts with
        # every concurrent commit, and its condition finds a row that was committed before.
        return self.merge(table, self.frame(rows), unless, ["WHEN NOT MATCHED THEN INSERT *"])

    def replace_where(self, table: str, rows: DataFrame, predicate: str) -> int:
        """Replace the rows that meet a predicate on partition columns (no ids: it is logged)."""
        return self._write(table, rows, "overwrite", {"replaceWhere": predicate})

    def _write(
        self, table: str, rows: pa.Table | DataFrame, mode: str, options: Mapping[str, str]
    ) -> int:
        if isinstance(rows, pa.Table):
            rows = self.frame(rows)
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
        local = self._local(table)
        if local is not None:
            commits = local.history(RECENT_COMMITS)
            mine = [commit for commit in commits if commit.get("userMetadata") == token]
            return int(mine[0]["version"]) if mine else self.version(table)
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
                raise conflict(table) from error
            if "AccessControlException" in text or "Permission denied" in text:
                raise InputError(f"table {table}: {self.name(table)} is not writable") from error
            if "A schema mismatch detected" in text:
                raise outdated(table) from error
            raise
