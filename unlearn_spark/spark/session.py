"""Finds or builds the SparkSession of a job; the one place that builds one.

If a session exists (in a notebook, say), `get_spark` changes a few of its settings (`_DEFAULTS`).
Otherwise it builds one with Delta's jars and extensions, whose Python workers run this interpreter
with one BLAS thread each.
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
from unlearn_spark.spark.session_conf import set_if_allowed

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
    # The other options keep the heap near what is in use; most only affect the G1 collector.
    # `conf/spark-defaults.conf` has the same for spark-submit.
    # G1 grows the heap when collecting takes more than a share of the time, a tiny one in a small
    # heap. Set the share to a half.
    "-XX:GCTimeRatio=1",
    # G1 collects long-lived garbage, for example the factors of earlier sweeps, only when it
    # predicts the need. Do so when 30% of the heap is full.
    "-XX:-G1UseAdaptiveIHOP",
    "-XX:InitiatingHeapOccupancyPercent=30",
    # After that, keep the first share of the heap free, and give back what is beyond the second.
    "-XX:MinHeapFreeRatio=20",
    "-XX:MaxHeapFreeRatio=40",
    # In a smaller heap, what the session itself holds fills those 30%: G1 would never rest.
    "-Xms400m",
)

_STATIC_DEFAULTS = {
    "spark.driver.extraJavaOptions": " ".join(JAVA_OPTIONS),
    "spark.ui.enabled": "false",
    "spark.ui.showConsoleProgress": "false",
    "spark.python.worker.reuse": "true",
    # Rating and factor messages hardly compress.
    "spark.shuffle.compress": "false",
    "spark.shuffle.spill.compress": "false",
    # The processor has an instruction for CRC32C; Adler32, the default, is slower.
    "spark.shuffle.checksum.algorithm": "CRC32C",
    # A sort of our few large rows would leave most of a default page empty.
    "spark.buffer.pageSize": "500k",
    # The description of a stage, which Spark broadcasts, fills a fraction of a default block.
    "spark.broadcast.blockSize": "256k",
}

_TIME_ZONE = "spark.sql.session.timeZone"
_TIMESTAMPS = "spark.sql.timestampType"

# Runtime settings of every session, whoever built it.
_DEFAULTS = {
    _TIME_ZONE: "UTC",
    # What `timestamp` means. If it meant local times, other sessions could not use our tables.
    _TIMESTAMPS: "TIMESTAMP_LTZ",
    "spark.sql.execution.arrow.maxRecordsPerBatch": "200000",
    # Spark writes every query's plan to the event log; plans with nested caches are huge.
    "spark.sql.maxPlanStringLength": "20000",
    # Parquet skips pages by a list of user keys up to this length, and by a range beyond it.
    "spark.sql.parquet.pushdown.inFilterThreshold": "256",
    # Factors hardly ever repeat, so a Parquet dictionary of them would be useless.
    "parquet.enable.dictionary#factors.list.element": "false",
    # Our Delta logs are short: one task reads them.
    "spark.databricks.delta.snapshotPartitions": "1",
}


_MALLOC = {
    # Let the JVM and the workers give freed memory back to the system if it is of the size of a
    # message (`core.solver.MESSAGE_BYTES`) or larger. Otherwise every worker would keep it.
    "MALLOC_ARENA_MAX": "2",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "ARROW_DEFAULT_MEMORY_POOL": "system",
}


def prepare_workers() -> None:
    """Set the environment that Python workers inherit. Call it before the first session starts."""
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    os.environ.setdefault("PYSPARK_DRIVER_PYTHON", sys.executable)
    for name in _BLAS_VARIABLES:
        os.environ.setdefault(name, "1")
    for name, value in _MALLOC.items():
        os.environ.setdefault(name, value)
    # In a checkout that is not installed, workers find this package by path.
    package_parent = str(Path(unlearn_spark.__file__).resolve().parent.parent)
    path = os.environ.get("PYTHONPATH", "")
    if package_parent not in path.split(os.pathsep):
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [package_parent, path]))


def get_spark(settings: Settings | None = None) -> SparkSession:
    """Return the running session, or build the configured one.

    Parameters
    ----------
    settings
        `settings.spark` names the master or a Connect server, the driver's memory and further
        Spark settings. None: defaults.

    Raises
    ------
    UserError
        There is no usable Java, the Connect server does not answer, or Spark refused the settings.
    SettingsError
        The settings change what timestamps mean.
    """
    from pyspark.sql import SparkSession

    # Imported here, because workers import this module too.
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
    submitted = "PYSPARK_GATEWAY_PORT" in os.environ  # spark-submit has started the JVM
    conf: dict[str, str] = {**_STATIC_DEFAULTS, **_DELTA}
    conf["spark.driver.memory"] = spark_settings.driver_memory
    if not submitted:  # the JVM of spark-submit does not know where this package is
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
        # Spark's default of 200 is for clusters: here a task takes longer to schedule than to run.
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
    """Our settings and a user's, which win; of JVM options, which are appended, the last wins."""
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
    """Apply settings to a running session. Warn about user settings that Spark refuses; ignore
    refused defaults, which affect only speed, except those of times.

    Raises
    ------
    UserError
        The session has another time zone or timestamp type, and Spark refuses to change it.
    """
    for key, value in wanted.items():
        if set_if_allowed(session, key, str(value)):
            continue
        found = session.conf.get(key, None)
        # `with_further` appended JVM options to ours, and YAML's `false` is the text `False`.
        if f" {found}".lower().endswith(f" {value}".lower()):
            continue
        if key in (_TIME_ZONE, _TIMESTAMPS):
            raise UserError(
                f"this Spark session forbids to change {key}, which is {found}; "
                f"set it to {value} where the session is made"
            )
        if key not in _DEFAULTS:
            print(
                f"unlearn-spark: {key} of spark.conf cannot be changed in a running session; "
                "set it where the session is made",
                file=sys.stderr,
            )
