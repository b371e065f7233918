"""The two engines behind one interface, and the choice between them.

=========  =====================================================================================
engine     for
=========  =====================================================================================
embedded   what fits the memory of one machine: one process, no Java, starts in a second
spark      everything larger, catalogs, and sessions that run already
=========  =====================================================================================
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from unlearn_spark.core.training import Progress
from unlearn_spark.errors import SettingsError, UserError
from unlearn_spark.preconditions import is_remote

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from numpy.typing import NDArray

    from unlearn_spark.config import Settings
    from unlearn_spark.core.training import TrainingSummary
    from unlearn_spark.ingestion.rules import IngestReport, TombstoneReport
    from unlearn_spark.tables.audits import Audit
    from unlearn_spark.tables.models import ModelVersion
    from unlearn_spark.tables.store import Store

BYTES_PER_RATING = 50
"""Most memory that the embedded engine needs for a rating, while it sorts both sides."""

INGESTED = {".csv": 6, ".dat": 6, ".data": 6, ".txt": 6, ".jsonl": 6, ".json": 6}
PACKED = 16
"""Most memory that it needs for a byte of a file while it ingests: of text, by suffix, and of
Parquet and of compressed files."""

SPARK_VARIABLES = frozenset({"PYSPARK_GATEWAY_PORT", "SPARK_REMOTE", "DATABRICKS_RUNTIME_VERSION"})
"""Any of these says that the process belongs to Spark: spark-submit and the shell `pyspark` start
Python with the first one, drivers on YARN and Kubernetes included; Connect's users set the second.
"""


class Engine(Protocol):
    """What an engine does. Inputs are paths, or tables (Arrow, pandas, Spark's where it is Spark).

    Every method raises `UserError` for what a user can mend, and `ConflictError` if another job
    wrote meanwhile.
    """

    name: str
    settings: Settings

    @property
    def store(self) -> Store:
        """The tables."""
        ...

    def ingest_ratings(self, source: Any, format: str, columns: Mapping[str, str]) -> IngestReport:
        """Validate, quarantine and upsert ratings."""
        ...

    def ingest_requests(self, source: Any, format: str | None) -> TombstoneReport:
        """Validate deletion requests, drop repeated ones, and append the new ones."""
        ...

    def train(self, progress: Progress) -> tuple[ModelVersion, TrainingSummary]:
        """Fit a model to the ratings table and publish it."""
        ...

    def import_factors(
        self, path: str, format: str, converge: bool, progress: Progress
    ) -> dict[str, Any]:
        """Publish factors that were trained elsewhere; return the figures of the job."""
        ...

    def run_night(self, kind: str, progress: Progress) -> dict[str, Any]:
        """Put pending requests and new ratings into the published model; return the figures.

        `kind` is `unlearn` (do nothing if no request is pending) or `update`.
        """
        ...

    def audit(self, model: ModelVersion) -> Audit:
        """Scan every row of a published version; write nothing."""
        ...

    def prepare_comparison(
        self,
        model: ModelVersion,
        held_out: str | None,
        held_out_format: str,
        plot: str | None,
        progress: Progress,
    ) -> Callable[[int], dict[str, Any]]:
        """Check that there is something to compare with retrained models; the function returned
        compares with models of so many seeds."""
        ...

    def recommend(
        self,
        model: ModelVersion,
        top: int,
        users: Sequence[str] | None,
        exclude_seen: bool,
        output: str | None,
        progress: Progress,
    ) -> dict[str, Any]:
        """Write the best items of all users, or of some (ids as text); return users, rows, output
        and, if there are any, unknown_users."""
        ...

    def predict(self, model: ModelVersion, pairs: pa.Table) -> NDArray[np.float64]:
        """Predicted ratings of pairs (user_id, item_id), float64 (n,); NaN where the model lacks
        the user or the item."""
        ...

    def sample(self, n: int) -> pa.Table:
        """Up to n ratings (user_id, item_id, rating, rated_at) from all over the newest table: the
        same ones for the same ratings."""
        ...

    def evaluate(
        self,
        model: ModelVersion,
        source: Any,
        format: str,
        columns: Mapping[str, str],
        k: int,
        min_rating: float | None,
    ) -> dict[str, Any]:
        """Measure a published version on held-out ratings; return the metrics."""
        ...

    def evaluate_split(
        self,
        fraction: float,
        seed: int,
        k: int,
        min_rating: float | None,
        progress: Progress,
    ) -> dict[str, Any]:
        """Measure a model that is fitted to one share of the ratings table on the other share."""
        ...


def choose(settings: Settings, need: int = 0) -> str:
    """The name of the engine for these settings and a job that needs so many bytes embedded.

    `auto` takes Spark under spark-submit, in a process that has a session, with `catalog`,
    `spark.remote` or `spark.master` given, and for jobs over `execution.memory`.

    Raises
    ------
    SettingsError
        The embedded engine is asked for, with a catalog.
    UserError
        Spark is asked for or needed, and is not installed.
    """
    wanted = settings.execution.engine
    limit = memory_limit(settings)
    if wanted == "embedded":
        if settings.catalog is not None:
            raise SettingsError(
                "catalog: the embedded engine finds tables by path; give --root, "
                "or run with --engine spark"
            )
        if need > limit:
            raise SettingsError(_too_large(need, limit) + "; raise it, or run with --engine spark")
        return "embedded"
    if wanted == "auto" and not _is_spark_meant(settings) and need <= limit:
        return "embedded"
    if find_spec("pyspark") is None or find_spec("delta") is None:
        why = f"{_too_large(need, limit)}; raise it, or" if need > limit else "spark is asked for;"
        raise UserError(f"{why} install Spark: pip install 'unlearn-spark[spark]'")
    return "spark"


def _too_large(need: int, limit: int) -> str:
    return (
        f"this job needs about {_shown(need)} in one process, execution.memory is {_shown(limit)}"
    )


def _shown(size: int) -> str:
    """Bytes in the unit that a reader expects."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def _is_spark_meant(settings: Settings) -> bool:
    """Whether the settings or the process say that Spark does the work."""
    spark = settings.spark
    if settings.catalog is not None or spark.remote is not None or spark.master is not None:
        return True
    if settings.root is not None and settings.root.startswith(("dbfs:", "/Volumes/")):
        return True
    if not SPARK_VARIABLES.isdisjoint(os.environ):
        return True
    if "pyspark.sql" not in sys.modules:
        return False
    from pyspark.sql import SparkSession

    return SparkSession.getActiveSession() is not None


def memory_limit(settings: Settings) -> int:
    """`execution.memory` in bytes; by default half of the machine's."""
    given = settings.execution.memory
    if given is None:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    units = {"k": 10, "m": 20, "g": 30, "t": 40}
    text = given.lower().removesuffix("b")
    return int(text[:-1]) << units[text[-1]]


def need_of_tables(store: Store) -> int:
    """Bytes that the embedded engine needs to train on or change the tables; 0 without ratings."""
    from unlearn_spark.tables import ratings

    return BYTES_PER_RATING * store.rows(ratings.TABLE) if store.exists(ratings.TABLE) else 0


def need_of_input(source: Any) -> int:
    """Bytes that the embedded engine needs to ingest a path or a table; 0 if unknown."""
    if not isinstance(source, (str, os.PathLike)):
        if hasattr(source, "memory_usage"):  # pandas
            return 2 * int(source.memory_usage(deep=True).sum())
        return 2 * int(getattr(source, "nbytes", 0))
    path = Path(source)
    if is_remote(str(source)) or not path.exists():
        return 0
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size * INGESTED.get(file.suffix.lower(), PACKED) for file in files)


def open_engine(settings: Settings, need: int = 0) -> Engine:
    """The engine that `choose` names."""
    from unlearn_spark.tables.store import check_root

    check_root(settings)
    if choose(settings, need) == "spark":
        from unlearn_spark.spark.engine import SparkEngine

        return SparkEngine(settings)
    from unlearn_spark.embedded.engine import EmbeddedEngine

    return EmbeddedEngine(settings)
