"""Delta tables in this process, by path or object-store URL: no Java, no Spark.

Every write names the version that it builds on and commits the next one or nothing, so that two
writers never mix. The rows of a write may come from a generator, but that must not read by
delta-rs: it runs in one of the threads that such a read waits for.

Object stores take their credentials from the environment, as delta-rs does (`AWS_ACCESS_KEY_ID`,
`AWS_ENDPOINT_URL`, ...).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from deltalake import CommitProperties, DeltaTable, QueryBuilder, WriterProperties, write_deltalake
from deltalake.exceptions import CommitFailedError, DeltaError, TableNotFoundError

from unlearn_spark.errors import InputError, SettingsError
from unlearn_spark.preconditions import is_remote, require_path_for_delta_rs
from unlearn_spark.tables.store import (
    Store,
    TableSpec,
    absolute_root,
    conflict,
    is_delta,
    outdated,
)

_NEXT_OR_NOTHING = CommitProperties(max_commit_retries=0)
"""Commit the version after the handle's, or fail."""


PLAIN = WriterProperties(compression="SNAPPY")
"""How files are written by default."""

MOST_SNAPSHOTS = 32
"""Most table states that are kept for reading."""


@dataclass(frozen=True)
class DataFile:
    """A data file of a table, as its log names it.

    Attributes
    ----------
    path
        Below the table's directory.
    partition
        Values of the partition columns, as text.
    rows
        The number of rows, with those that a deletion vector marks.
    """

    path: str
    partition: Mapping[str, str]
    rows: int


class DeltaRsStore(Store):
    """The product's tables under one root, read and written by delta-rs.

    Raises
    ------
    SettingsError
        Only Spark reaches the root.
    InputError
        delta-rs cannot use the path.
    """

    catalog = None

    def __init__(self, root: str) -> None:
        self.root: str = absolute_root(root)
        if self.root.startswith("dbfs:"):
            raise SettingsError(f"root {root}: only Spark reaches it; run with --engine spark")
        require_path_for_delta_rs("root", self.root)
        self._snapshots: dict[tuple[str, int], DeltaTable] = {}

    def location(self, table: str) -> str:
        return f"{self.root}/{table}"

    def exists(self, table: str) -> bool:
        if not is_remote(self.root):
            return is_delta(Path(self.location(table)))
        with self._explained(table):
            if DeltaTable.is_deltatable(self.location(table)):
                return True
        # That is False for storage that delta-rs does not know, too.
        try:
            DeltaTable(self.location(table))
        except TableNotFoundError as error:
            if "Unknown scheme" in str(error):
                raise SettingsError(
                    f"root {self.root}: this process has no access to storage of that kind; "
                    "correct it, or run with --engine spark"
                ) from error
        return False

    def open(self, table: str, version: int | None = None) -> DeltaTable:
        """The table's state at a version (None: the newest). Raises TableMissingError."""
        self.require(table)
        with self._explained(table):
            return DeltaTable(self.location(table), version=version)

    def _snapshot(self, table: str, version: int | None) -> DeltaTable:
        """Like `open`, for reading only: a version never changes, so its state is kept."""
        if version is None:
            return self.open(table)
        key = table, version
        if key not in self._snapshots:
            if len(self._snapshots) >= MOST_SNAPSHOTS:
                self._snapshots.clear()
            self._snapshots[key] = self.open(table, version)
        return self._snapshots[key]

    def version(self, table: str) -> int:
        return int(self.open(table).version())

    def rows(self, table: str) -> int:
        counts = pa.table(self.open(table).get_add_actions(flatten=True))["num_records"]
        return int(pc.sum(counts).as_py() or 0)

    # --- reading -----------------------------------------------------------------------------

    def arrow(
        self, table: str, version: int | None = None, columns: Sequence[str] | None = None
    ) -> pa.Table:
        return self.read(table, version, columns)

    def read(
        self,
        table: str,
        version: int | None = None,
        columns: Sequence[str] | None = None,
        where: str | None = None,
    ) -> pa.Table:
        """Rows of a table at a version that meet a condition in SQL.

        Raises
        ------
        TableMissingError
            The table does not exist.
        InputError
            An earlier version of this software made it, without one of the columns.
        """
        with self.reading(table, version, columns, where) as reader:
            return reader.read_all()

    @contextmanager
    def reading(
        self,
        table: str,
        version: int | None = None,
        columns: Sequence[str] | None = None,
        where: str | None = None,
    ) -> Iterator[pa.RecordBatchReader]:
        """Like `read`, batch by batch."""
        handle = self._snapshot(table, version)
        known = [field.name for field in handle.schema().fields]
        if not set(columns or ()) <= set(known):
            raise outdated(table)
        listed = ", ".join(f'"{name}"' for name in columns or known)
        sql = f"SELECT {listed} FROM stored" + (f" WHERE {where}" if where else "")
        with self._explained(table):
            found = QueryBuilder().register("stored", handle).execute(sql)
            reader = pa.RecordBatchReader.from_stream(found)
            yield reader.cast(_plain(reader.schema))

    def schema(self, table: str) -> pa.Schema:
        """The columns of the newest version."""
        with self.reading(table, where="false") as reader:
            return reader.schema

    def column_metadata(self, table: str, column: str) -> dict[str, Any]:
        """The metadata of a column, and the table's properties."""
        handle = self.open(table)
        field = next(field for field in handle.schema().fields if field.name == column)
        return {**handle.metadata().configuration, **(field.metadata or {})}

    def files(self, table: str, version: int | None = None) -> list[DataFile]:
        """The data files of a table."""
        actions = pa.table(self._snapshot(table, version).get_add_actions(flatten=True))
        names = [name for name in actions.column_names if name.startswith("partition.")]
        return [
            DataFile(
                unquote(row["path"]),
                {name.removeprefix("partition."): str(row[name]) for name in names},
                row["num_records"],
            )
            for row in actions.select(["path", "num_records", *names]).to_pylist()
        ]

    def parquet(self, table: str, file: DataFile) -> pq.ParquetFile:
        """A data file, opened for reading single row groups."""
        if not is_remote(self.root):
            return pq.ParquetFile(f"{self.location(table)}/{file.path}", memory_map=True)
        return pq.ParquetFile(self._filesystem(table).open_input_file(file.path))

    def _filesystem(self, table: str) -> pafs.FileSystem:
        from deltalake.fs import DeltaStorageHandler

        return pafs.PyFileSystem(DeltaStorageHandler(self.location(table)))

    # --- writing -----------------------------------------------------------------------------

    def create(self, table: str, spec: TableSpec) -> None:
        if self.exists(table):
            return
        with self._explained(table):
            DeltaTable.create(
                self.location(table),
                spec.schema,
                mode="ignore",
                partition_by=list(spec.partition_by),
                configuration=dict(spec.properties),
            )

    def create_with(
        self,
        table: str,
        spec: TableSpec,
        rows: pa.Table | pa.RecordBatchReader,
        properties: WriterProperties = PLAIN,
    ) -> int:
        """Create the table with its first rows in one commit; return the version of that.

        Raises
        ------
        ConflictError
            The table exists by now.
        """
        with self._explained(table):
            write_deltalake(
                self.location(table),
                rows,
                mode="error",
                partition_by=list(spec.partition_by),
                configuration=dict(spec.properties),
                writer_properties=properties,
            )
        return 0

    def append(self, table: str, rows: pa.Table) -> int:
        return self._write(self.open(table), table, rows, "append", None, CommitProperties())

    def overwrite(
        self,
        table: str,
        rows: pa.Table | pa.RecordBatchReader,
        base: int | None = None,
        properties: WriterProperties = PLAIN,
    ) -> int:
        """Replace all rows; return the Delta version. Earlier versions stay readable.

        `base` is the version that the caller takes for the newest (None: whatever it is).
        """
        handle = self.open(table, base)
        return self._write(handle, table, rows, "overwrite", None, _NEXT_OR_NOTHING, properties)

    def replace_where(
        self,
        table: str,
        rows: pa.Table | pa.RecordBatchReader,
        predicate: str,
        base: int,
        properties: WriterProperties = PLAIN,
    ) -> int:
        """Replace the rows of version `base` that meet a predicate (no ids: it is logged).

        Raises
        ------
        ConflictError
            `base` is not the newest version.
        """
        handle = self.open(table, base)
        return self._write(
            handle, table, rows, "overwrite", predicate, _NEXT_OR_NOTHING, properties
        )

    def append_to(
        self, table: str, rows: pa.Table, base: int, properties: WriterProperties = PLAIN
    ) -> int:
        """Append rows to version `base`. Raises ConflictError if that is not the newest."""
        handle = self.open(table, base)
        return self._write(handle, table, rows, "append", None, _NEXT_OR_NOTHING, properties)

    def _write(
        self,
        handle: DeltaTable,
        table: str,
        rows: pa.Table | pa.RecordBatchReader,
        mode: Any,
        predicate: str | None,
        commit: CommitProperties,
        properties: WriterProperties = PLAIN,
    ) -> int:
        _require_all_columns(handle, table, rows.schema)
        with self._explained(table):
            write_deltalake(
                handle,
                rows,
                mode=mode,
                predicate=predicate,
                commit_properties=commit,
                writer_properties=properties,
            )
        return int(handle.version())

    def insert(self, table: str, rows: pa.Table, unless: str) -> int:
        handle = self.open(table)
        _require_all_columns(handle, table, rows.schema)
        with self._explained(table):
            merged = (
                handle.merge(rows, unless, source_alias="s", target_alias="t")
                .when_not_matched_insert_all()
                .execute()
            )
        return int(merged["num_target_rows_inserted"])

    def restore(self, table: str, version: int) -> int:
        handle = self.open(table)
        if handle.version() == version:
            return version
        with self._explained(table):
            handle.restore(version, commit_properties=_NEXT_OR_NOTHING)
        return int(handle.version())

    @contextmanager
    def _explained(self, table: str) -> Iterator[None]:
        """Raise ConflictError for a lost race, and a UserError for what a user can mend."""
        try:
            yield
        except (DeltaError, OSError) as error:
            text, where = str(error), self.location(table)
            if any(sign in text for sign in _REFUSED):
                raise InputError(f"table {table}: {where} is not writable") from error
            if any(sign in text for sign in _FULL):
                raise InputError(
                    f"table {table}: the disk of {where} is full; nothing became visible, "
                    "make room and run this job again"
                ) from error
            unsupported = unsupported_features(text)
            if unsupported is not None:
                raise InputError(
                    f"table {table} has Delta features that the embedded engine does not support: "
                    f"{unsupported}; run with --engine spark"
                ) from error
            if isinstance(error, CommitFailedError) or "table already exists" in text.lower():
                raise conflict(table) from error
            if any(sign in text for sign in _SILENT):
                reason = _COLOUR.sub("", text.splitlines()[-1]).strip(" \u21b3")
                raise SettingsError(
                    f"root {self.root}: its storage does not answer ({reason}); nothing became "
                    "visible, check the address in the environment and the network"
                ) from error
            if isinstance(error, TableNotFoundError):
                raise SettingsError(
                    f"root {self.root}: not reachable ({text.splitlines()[0]}); correct it"
                ) from error
            raise


def _require_all_columns(handle: DeltaTable, table: str, written: pa.Schema) -> None:
    """Raise InputError if the table has columns that would stay empty."""
    unknown = [field.name for field in handle.schema().fields if field.name not in written.names]
    if unknown:
        raise InputError(
            f"table {table} was written by a newer version of this software (its column "
            f"{unknown[0]} is unknown here); upgrade unlearn-spark"
        )


_REFUSED = ("Permission denied", "AccessDenied", "Read-only file system")
"""How systems say that a place may not be written."""

_FULL = ("No space left", "Disk quota exceeded", "File too large")
"""How systems say that a file cannot grow."""

_SILENT = ("error sending request", "error decoding response body", "operation timed out")
"""How delta-rs says that no answer came over the network, or not a whole one."""

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
"""delta-rs colours the causes of an error, and puts an arrow before each."""

_UNSUPPORTED = (
    r"these (?:reader|writer) features: \{(.*?)\}",
    r"Unsupported table features required: \[(.*?)\]",
    r"Feature '(.*?)' is not supported",
    r"Unsupported (minimum (?:reader|writer) version \d+)",
)


def unsupported_features(text: str) -> str | None:
    """The features that a complaint of delta-rs names; None if it is about something else."""
    for pattern in _UNSUPPORTED:
        if found := re.search(pattern, text):
            return re.sub(r'Unknown\("(.*?)"\)', r"\1", found[1])
    return None


def _plain(schema: pa.Schema) -> pa.Schema:
    """The schema with ordinary strings and binaries instead of views."""

    def plain(kind: pa.DataType) -> pa.DataType:
        if pa.types.is_string_view(kind) or pa.types.is_large_string(kind):
            return pa.string()
        if pa.types.is_binary_view(kind) or pa.types.is_large_binary(kind):
            return pa.binary()
        if pa.types.is_dictionary(kind):
            return plain(kind.value_type)
        if pa.types.is_list(kind) or pa.types.is_large_list(kind):
            return pa.list_(plain(kind.value_type))
        return kind

    return pa.schema([pa.field(field.name, plain(field.type)) for field in schema])
