"""The one place that builds a SparkSession.

A session that exists already (a Databricks notebook, a test suite) is taken, and a few of its
runtime settings are changed (`_DEFAULTS`). Otherwise a local one is built with what the product
needs: Delta's jars and extensions, Python workers that run this very interpreter, and one BLAS
thread in each of them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import unlearn_spark
from unlearn_spark.errors import SettingsError, UserError
from unlearn_spark.spark.java import ensure_java, jars_directory
from unlearn_spark.tables.session_conf import set_if_allowed

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

    from unlearn_spark.config import Settings

_BLAS_VARIABLES = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "NUMBA_NUM_THREADS",
)

_DELTA = {
    "spark.sql.extensions": "io.delta.sql.DeltaSparkSessionExtension",
    "spark.sql.catalog.spark_catalog": "org.apache.spark.sql.delta.catalog.DeltaCatalog",
}

JAVA_OPTIONS = (
    # Deep plans and MLlib's ALS lineage overflow the JVM's default stack.
    "-Xss16m",
    # These keep the heap near what is in use; other collectors than G1 take no notice of most. G1
    # grows it when pauses take more than 1/13 of the time, a limit that it scales down by how much
    # smaller the heap is than it may be (to 1/100 at 0.5 GB of 8): half of the time instead.
    "-XX:GCTimeRatio=1",
    # It looks for garbage among what outlived a few collections, such as the factors of earlier
    # sweeps, when it predicts that to be needed, which is late: at 30% of the heap instead. (At 45%
    # a session of many nights collects less, and trainings take 0.15 GiB more.)
    "-XX:-G1UseAdaptiveIHOP",
    "-XX:InitiatingHeapOccupancyPercent=30",
    # Whenever it has looked, it leaves the first share of the heap free and gives back what is free
    # beyond the second. `conf/spark-defaults.conf` has the same for spark-submit.
    "-XX:MinHeapFreeRatio=20",
    "-XX:MaxHeapFreeRatio=40",
    # In a smaller heap what a session holds itself is more than 30%, and it would look without end.
    # Spark wants no less than 450 MB.
    "-Xms400m",
)

_STATIC_DEFAULTS = {
    "spark.driver.extraJavaOptions": " ".join(JAVA_OPTIONS),
    "spark.ui.enabled": "false",
    "spark.ui.showConsoleProgress": "false",
    "spark.python.worker.reuse": "true",
    # Rating and factor messages are incompressible binaries: compressing them only costs time.
    "spark.shuffle.compress": "false",
    "spark.shuffle.spill.compress": "false",
    # Checksums by the processor's own instruction: Adler32, the default, is a pass of its own.
    "spark.shuffle.checksum.algorithm": "CRC32C",
    # Rows are few and of up to a megabyte: a sort of them would not fill the default's 64.
    "spark.buffer.pageSize": "500k",
    # Every stage is broadcast in blocks of this size, of which it fills a fraction.
    "spark.broadcast.blockSize": "256k",
}

_TIME_ZONE = "spark.sql.session.timeZone"
_TIMESTAMPS = "spark.sql.timestampType"

# Set once the session runs, also where it was not built here.
_DEFAULTS = {
    _TIME_ZONE: "UTC",
    # What `timestamp` means. A table made where it means local times would fit no other session.
    _TIMESTAMPS: "TIMESTAMP_LTZ",
    "spark.sql.execution.arrow.maxRecordsPerBatch": "200000",
    # Every query's plan is written out for the event log; with caches in caches that is megabytes.
    "spark.sql.maxPlanStringLength": "20000",
    # A list of user keys skips pages of a file; of a longer one Parquet is told first and last.
    "spark.sql.parquet.pushdown.inFilterThreshold": "256",
    # Hardly two factors are alike: Parquet need not look every one up in a dictionary first.
    "parquet.enable.dictionary#factors.list.element": "false",
    # Re-reading a Delta log of a few commits needs no fifty tasks.
    "spark.databricks.delta.snapshotPartitions": "1",
}


_MALLOC = {
    # Messages (`als.solver.MESSAGE_BYTES`) and whatever is larger go back to the system when they
    # are freed, in the JVM and in workers; else a heap of 30 to 80 MB a worker would remain.
    "MALLOC_ARENA_MAX": "2",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "ARROW_DEFAULT_MEMORY_POOL": "system",
}


def prepare_workers() -> None:
    """Set what Python workers inherit; only has effect before the first session starts."""
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    os.environ.setdefault("PYSPARK_DRIVER_PYTHON", sys.executable)
    for name in _BLAS_VARIABLES:
        os.environ.setdefault(name, "1")
    for name, value in _MALLOC.items():
        os.environ.setdefault(name, value)
    # Workers import this package by path when it is run from a checkout without being installed.
    package_parent = str(Path(unlearn_spark.__file__).resolve().parent.parent)
    path = os.environ.get("PYTHONPATH", "")
    if package_parent not in path.split(os.pathsep):
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [package_parent, path]))


def get_spark(settings: Settings | None = None) -> SparkSession:
    """Return the running session, or build the configured one.

    Parameters
    ----------
    settings
        `settings.spark` names the master or a Connect server, the driver's memory and any
        further Spark settings. Defaults where None.

    Raises
    ------
    UserError
        No usable Java, or Spark refused the settings (a port that is taken, a bad master...).
    """
    from pyspark.sql import SparkSession

    # Here, because workers import this module too.
    from unlearn_spark.config import Settings

    spark_settings = (settings or Settings()).spark
    own = spark_settings.conf
    ours = _DEFAULTS[_TIMESTAMPS]
    if own.get(_TIMESTAMPS, ours) != ours:
        raise SettingsError(f"spark.conf.{_TIMESTAMPS}: tables have {ours}; leave it out")
    active = SparkSession.getActiveSession()
    if active is not None:
        _set_up(active, {**_DEFAULTS, **own})
        return active

    prepare_workers()
    remote = spark_settings.remote or os.environ.get("SPARK_REMOTE")
    builder = SparkSession.builder.appName("unlearn-spark")
    if remote and remote.startswith("sc://"):
        try:
            session = builder.remote(remote).getOrCreate()
            session.version  # noqa: B018  (the first call is the one that connects)
        except Exception as error:
            raise UserError(
                f"no Spark Connect server answers at {remote}: {_first_cause(error)}"
            ) from error
        _set_up(session, {**_DEFAULTS, **own})
        return session

    ensure_java()
    submitted = "PYSPARK_GATEWAY_PORT" in os.environ  # the JVM runs already: spark-submit
    conf: dict[str, str] = {**_STATIC_DEFAULTS, **_DELTA}
    conf["spark.driver.memory"] = spark_settings.driver_memory
    if not submitted:  # else the JVM that starts the workers does not know where this package is
        conf["spark.python.daemon.module"] = "unlearn_spark.spark.worker_daemon"
    for name in _BLAS_VARIABLES:
        conf[f"spark.executorEnv.{name}"] = "1"
    logging = Path(__file__).with_name("log4j2.properties")
    conf["spark.driver.extraJavaOptions"] += f" -Dlog4j2.configurationFile={logging.as_uri()}"
    conf = with_further(conf, own)
    place = remote or spark_settings.master or ("" if submitted else "local[*]")
    if place:
        builder = builder.remote(place) if remote else builder.master(place)
    if place.startswith("local"):
        # Spark's 200 are for clusters: here each of them is a task of a few milliseconds that
        # costs ten to schedule.
        conf.setdefault("spark.sql.shuffle.partitions", str(max(4, os.cpu_count() or 1)))
    for key, value in conf.items():
        builder = builder.config(key, value)
    if not any(jars_directory().glob("delta-spark*.jar")) and "spark.jars" not in conf:
        from delta import configure_spark_with_delta_pip

        builder = configure_spark_with_delta_pip(builder)
    try:
        session = builder.getOrCreate()
    except Exception as error:
        raise UserError(f"Spark did not start: {_first_cause(error)}") from error
    _set_up(session, {key: value for key, value in _DEFAULTS.items() if key not in own})
    return session


def with_further(conf: Mapping[str, str], further: Mapping[str, object]) -> dict[str, str]:
    """Settings of Spark with a user's own, which win; options of the JVM are added to ours, where
    the last of two that contradict each other wins."""
    merged = dict(conf)
    for key, value in further.items():
        ours = merged.get(key) if key.endswith(".extraJavaOptions") else None
        merged[key] = f"{ours} {value}" if ours else str(value)
    return merged


def _first_cause(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    causes = [line for line in lines if line.startswith("Caused by:")]
    if lines and lines[0].startswith("An error occurred while calling"):  # py4j's own line
        lines = [line.removeprefix(": ") for line in lines[1:]]
    chosen = (causes[-1] if causes else lines[0] if lines else type(error).__name__)[:300]
    if any(word in str(error) for word in ("BindException", "Address already in use")):
        chosen += " (a port is taken: change spark.conf's port, or free it)"
    return chosen


def _set_up(session: SparkSession, wanted: Mapping[str, object]) -> None:
    """Settings of a session that runs; those that cannot be changed are named on stderr if they are
    a user's own, for ours change how long something takes and no result, but for what times mean.

    Raises
    ------
    UserError
        The time zone or the type of timestamps cannot be changed and is another.
    """
    for key, value in wanted.items():
        if set_if_allowed(session, key, str(value)):
            continue
        found = session.conf.get(key, None)
        # Options of the JVM follow ours (`with_further`), and YAML's `false` is `False` as a text.
        if f" {found}".lower().endswith(f" {value}".lower()):
            continue
        if key in (_TIME_ZONE, _TIMESTAMPS):
            raise UserError(
                f"this Spark session forbids to change {key}, which is {found}; "
                f"set it to {value} where the session is made"
            )
        if key not in _DEFAULTS:
            print(
                f"unlearn-spark: {key} of spark.conf cannot be changed in a session that runs; "
                "set it where the session is made",
                file=sys.stderr,
            )
