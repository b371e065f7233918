"""The recommendations table: the best items of each user, replaced as a whole by every run.

As in the other tables, no id gets into the log or into a partition value.
"""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath

import pyarrow as pa

from unlearn_spark.errors import InputError
from unlearn_spark.preconditions import is_remote, require_creatable
from unlearn_spark.tables.store import TableSpec, is_delta

TABLE = "recommendations"


def spec(user_type: pa.DataType, item_type: pa.DataType) -> TableSpec:
    """user_id, rank (1 is best), item_id, score, and the model version that scored it."""
    return TableSpec(
        pa.schema(
            [
                ("user_id", user_type),
                ("rank", pa.int32()),
                ("item_id", item_type),
                ("score", pa.float32()),
                ("model_version", pa.int64()),
            ]
        ),
        skipping=("rank", "model_version"),
    )


def check_export(path: str) -> None:
    """Fail before the work if `export` could not write.

    Raises
    ------
    InputError
        A local path exists already, unless it is a Delta table, or cannot be created.
    """
    if is_remote(path):
        return
    target = Path(path)
    if os.path.exists(target) and not (export_format(path) == "delta" and is_delta(target)):
        raise InputError(f"--output {path}: exists already; name another or remove it")
    require_creatable("--output", path)


def export_format(path: str) -> str:
    """csv, parquet or delta, by the suffix of an export's path."""
    suffix = PurePosixPath(path).suffix.lower()
    return {".csv": "csv", ".parquet": "parquet"}.get(suffix, "delta")
