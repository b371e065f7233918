"""What Python workers are forked from: pyspark's daemon with the product's imports done already.

A job of seconds starts a dozen workers, and each would import NumPy, Arrow and the compiled kernels
anew (0.6 s), and pandas, which pyspark itself imports in every worker that calls an Arrow function
(0.4 s, 30 MB); a fork of a process that has them starts at once and shares their memory. Spark runs
this module where `spark.python.daemon.module` names it (`unlearn_spark.spark.session` does).

It also imports pyspark from its directory. Spark puts its zips and a jar before that, and a worker
invalidates the import caches at the start of every task. For that `zipimport` reads the directory
of such a file again, once for every package in it: 0.1 to 0.2 s of processor time in each task.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Sequence
from importlib.machinery import PathFinder
from pathlib import Path

from unlearn_spark.core.objective import Objective


def without_archives(path: Sequence[str]) -> list[str]:
    """`sys.path` without the zips and jars that an installed pyspark carries."""
    directories = [entry for entry in path if not Path(entry).is_file()]
    specs = [PathFinder.find_spec(name, directories) for name in ("pyspark", "py4j")]
    if any(spec is None or spec.origin is None for spec in specs):
        return list(path)  # a cluster's own Spark: the zips are all there is
    home = Path(str(specs[0].origin)).resolve().parent  # type: ignore[union-attr]
    return [
        entry for entry in path if entry in directories or home not in Path(entry).resolve().parents
    ]


def warm_up() -> None:
    """Import what tasks name, and load the compiled kernels: solve one row in both precisions."""
    import numpy as np
    import pandas  # noqa: F401

    from unlearn_spark.core import kernel
    from unlearn_spark.spark.night import rounds  # noqa: F401
    from unlearn_spark.spark.training import sweeper  # noqa: F401

    indptr, others = np.array([0, 1], np.int64), np.zeros(1, np.int32)
    ones = np.ones((1, 1), np.float32)
    for dtype in (np.float32, np.float64):
        kernel.solve_rows(indptr, others, np.ones(1, np.float32), ones, Objective(1.0), dtype=dtype)


def main() -> None:
    """Serve workers until Spark closes the pipe."""
    kept = without_archives(sys.path)
    dropped = tuple(set(sys.path) - set(kept))
    for entry in [entry for entry in sys.path_importer_cache if entry.startswith(dropped)]:
        del sys.path_importer_cache[entry]
    sys.path[:] = kept
    import pyspark.daemon

    warm_up()
    gc.freeze()  # so that a collection in a worker does not copy the shared pages
    pyspark.daemon.manager()


if __name__ == "__main__":
    main()
