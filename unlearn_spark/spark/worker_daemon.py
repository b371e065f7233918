"""Starts Python workers faster: pyspark's daemon with our imports done already.

Spark forks its Python workers from this process if `spark.python.daemon.module` names it, which
`unlearn_spark.spark.session` does. So a worker starts with NumPy, Arrow, pandas (which pyspark
imports for Arrow functions) and the compiled kernels, and shares their memory.

The daemon also takes Spark's zips and jars from `sys.path` where pyspark is a directory. Every task
invalidates the import caches, after which `zipimport` would read those files again.
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
        return list(path)  # a cluster's own Spark, which only has the zips
    home = Path(str(specs[0].origin)).resolve().parent  # type: ignore[union-attr]
    return [
        entry for entry in path if entry in directories or home not in Path(entry).resolve().parents
    ]


def warm_up() -> None:
    """Import what tasks name, and load the compiled kernels by solving a row in both precisions."""
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
    gc.freeze()  # or a collection in a worker would copy the shared pages
    pyspark.daemon.manager()


if __name__ == "__main__":
    main()
