"""What the benchmarks share: the machine, raw figures on disk, tables, and peak memory."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from unlearn_spark.config import AlsSettings, ExecutionSettings, Settings, SparkSettings
from unlearn_spark.evaluation import synthetic
from unlearn_spark.spark.session import get_spark

if TYPE_CHECKING:
    import pyarrow as pa
    from pyspark.sql import DataFrame, SparkSession

RESULTS = Path(__file__).resolve().parent / "results"
DRIVER_MEMORY = "8g"
REG_PARAM, ALPHA = 0.05, 10.0


def session(**conf: Any) -> SparkSession:
    """The session of all contestants: the product's own defaults, with 8 GB for the driver."""
    return get_spark(Settings(spark=SparkSettings(driver_memory=DRIVER_MEMORY, conf=conf)))


def generated(spark: SparkSession, users: int, items: int, ratings: int) -> DataFrame:
    """Generated ratings in a Delta table of their own; integer ids, as MLlib needs them."""
    path = str(Path(tempfile.mkdtemp(prefix="unlearn-bench-")) / "ratings.parquet")
    synthetic.write(users, items, ratings, 1, path)
    columns = ("cast(user_id AS int) user_id", "cast(item_id AS int) item_id", "rating")
    return in_delta(spark.read.parquet(path).selectExpr(*columns))


def in_delta(rows: DataFrame) -> DataFrame:
    """The rows, read from a new Delta table of their own."""
    table = str(Path(tempfile.mkdtemp(prefix="unlearn-bench-")) / "delta")
    rows.write.format("delta").save(table)
    return rows.sparkSession.read.format("delta").load(table)


def sweep_options(main: Callable[..., None]) -> Callable[..., None]:
    """The options that say what is swept: users, items, ratings, rank, part_ratings."""
    values = {
        "users": 70_000,
        "items": 10_700,
        "ratings": 10_000_000,
        "rank": 64,
        "part_ratings": ExecutionSettings().part_ratings,
    }
    for name, value in reversed(values.items()):
        main = click.option(_flag(name), default=value)(main)
    return main


def as_options(values: Mapping[str, int]) -> list[str]:
    """The same, as a command takes them."""
    return [f"{_flag(name)}={value}" for name, value in values.items()]


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def timed(action: Callable[[], Any]) -> float:
    """Wall-clock seconds."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def save(name: str, result: dict[str, Any]) -> Path:
    """Add when, where and with what, and write it under benchmarks/results/."""
    import pyspark

    result = {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {
            "processor": _processor(),
            "cores": os.cpu_count(),
            "load": round(os.getloadavg()[0], 1),
        },
        "versions": {"python": platform.python_version(), "spark": pyspark.__version__},
        **result,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    machine, versions = result["machine"], result["versions"]
    print(
        f"\n{result['when']}  {machine['processor']}, {machine['cores']} cores, load "
        f"{machine['load']}; Python {versions['python']}, Spark {versions['spark']}\nraw: {path}"
    )
    return path


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.machine()


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print aligned columns."""
    from rich.console import Console
    from rich.table import Table

    drawn = Table(*head)
    for row in rows:
        drawn.add_row(*[f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row])
    Console(width=120).print(drawn)


def numbered(table: pa.Table) -> tuple[Any, Any, Any]:
    """User and item numbers from 0, and values, of ratings in this process's memory."""
    import numpy as np

    users, items = (
        np.unique(table[name].to_numpy(), return_inverse=True)[1] for name in ("user_id", "item_id")
    )
    return users, items, table["rating"].to_numpy().astype(np.float32)


def als_settings(rank: int, implicit: bool, **more: Any) -> AlsSettings:
    """Training settings of a contest: the regularisation and confidence that all have."""
    return AlsSettings(rank=rank, reg_param=REG_PARAM, implicit_prefs=implicit, alpha=ALPHA, **more)


def mllib_als(als: AlsSettings, sweeps: int) -> Any:
    """Spark MLlib's estimator with our settings and so many sweeps."""
    from pyspark.ml.recommendation import ALS  # not ours of the same name

    return ALS(
        rank=als.rank,
        maxIter=sweeps,
        regParam=als.reg_param,
        implicitPrefs=als.implicit_prefs,
        alpha=als.alpha,
        userCol="user_id",
        itemCol="item_id",
        ratingCol="rating",
        seed=1,
    )


def library_fit(
    ratings: tuple[Any, Any, Any], rank: int, reg_param: float, alpha: float, cg: bool
) -> Callable[[int], float]:
    """Seconds that the library implicit takes for so many sweeps on all cores.

    Parameters
    ----------
    ratings
        As from `numbered`.
    cg
        Three steps of conjugate gradients a row, else an exact Cholesky solve.
    """
    from implicit.cpu.als import AlternatingLeastSquares
    from scipy.sparse import csr_matrix
    from threadpoolctl import threadpool_limits

    users, items, values = ratings
    matrix = csr_matrix((alpha * values, (users, items)))

    def fit(sweeps: int) -> float:
        model = AlternatingLeastSquares(
            factors=rank,
            regularization=reg_param,
            iterations=sweeps,
            use_cg=cg,
            num_threads=os.cpu_count() or 1,
            random_state=1,
        )
        with threadpool_limits(1, "blas"):
            return timed(lambda: model.fit(matrix, show_progress=False))

    return fit


def memory_of(pid: int) -> int:
    """Bytes of a process and all its descendants now (proportional set size)."""
    import psutil

    total = 0
    root = psutil.Process(pid)
    for process in [root, *root.children(recursive=True)]:
        try:
            total += process.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return total


class PeakMemory:
    """The most memory of a process and its descendants while the block runs.

    It is the proportional set size: shared pages are counted once, so forked workers are not
    charged for what they share.
    """

    def __init__(self, pid: int | None = None) -> None:
        self.pid = os.getpid() if pid is None else pid

    def __enter__(self) -> PeakMemory:
        self.bytes, self.ended = 0, threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def _watch(self) -> None:
        import psutil

        while not self.ended.wait(0.3):
            try:
                self.bytes = max(self.bytes, memory_of(self.pid))
            except psutil.NoSuchProcess:
                return

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.thread.join()

    @property
    def gib(self) -> float:
        """In GiB."""
        return self.bytes / 2**30


def peak_memory(command: Sequence[str]) -> float:
    """GiB at the highest moment of a process and all its descendants (`PeakMemory`)."""
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    with PeakMemory(running.pid) as memory:
        running.wait()
    if running.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with {running.returncode}")
    return memory.gib
