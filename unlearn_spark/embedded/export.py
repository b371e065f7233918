"""Writes rows to a directory, in the formats and file layout that Spark has too."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from deltalake import write_deltalake
from deltalake.exceptions import DeltaError

from unlearn_spark.errors import InputError
from unlearn_spark.preconditions import is_remote, require_path_for_delta_rs
from unlearn_spark.tables.recommendations import export_format
from unlearn_spark.tables.relational import connect

SUCCESS = "_SUCCESS"
"""Name of the empty file that says that a directory is complete."""


def export(rows: pa.RecordBatchReader, path: str) -> None:
    """Write rows to a directory: CSV with a header for `.csv`, Parquet for `.parquet`, otherwise a
    Delta table, which is replaced if it exists.

    CSV follows RFC 4180: quotes are doubled and white space is kept. A local directory appears when
    it is complete.

    Raises
    ------
    InputError
        The path is on storage that is not reachable, or one that delta-rs cannot use.
    """
    if path.startswith("dbfs:"):
        raise InputError(f"--output {path}: only Spark reaches it; run with --engine spark")
    form = export_format(path)
    if form == "delta":
        require_path_for_delta_rs("--output", path)
    try:
        if form == "delta":
            write_deltalake(path, rows, mode="overwrite", schema_mode="overwrite")
        elif is_remote(path):
            _write_remote(rows, path, _WRITERS[form], form)
        else:
            _write_local(rows, Path(path).absolute(), _WRITERS[form], form)
    except (DeltaError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"--output {path}: cannot be written ({reason})") from error


Writer = Callable[[pa.RecordBatchReader, Path], None]


def _write_local(rows: pa.RecordBatchReader, target: Path, writer: Writer, form: str) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    unfinished.mkdir()
    try:
        writer(rows, unfinished / _part(form))
        (unfinished / SUCCESS).touch()
        unfinished.rename(target)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def _write_remote(rows: pa.RecordBatchReader, path: str, writer: Writer, form: str) -> None:
    from deltalake.fs import DeltaStorageHandler

    target = pafs.PyFileSystem(DeltaStorageHandler(path))
    with TemporaryDirectory() as folder:
        file = Path(folder) / _part(form)
        writer(rows, file)
        with file.open("rb") as source, target.open_output_stream(file.name) as sink:
            shutil.copyfileobj(source, sink)
    with target.open_output_stream(SUCCESS):
        pass


def _part(form: str) -> str:
    return f"part-00000-{uuid.uuid4()}.{form}"


def _write_csv(rows: pa.RecordBatchReader, file: Path) -> None:
    with connect() as connection:
        connection.from_arrow(rows).write_csv(str(file), header=True)


def _write_parquet(rows: pa.RecordBatchReader, file: Path) -> None:
    with pq.ParquetWriter(file, rows.schema) as writer:
        for batch in rows:
            writer.write_batch(batch)


_WRITERS: dict[str, Writer] = {"csv": _write_csv, "parquet": _write_parquet}
