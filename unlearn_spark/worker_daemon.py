"""What Python workers are forked from: pyspark's daemon with the product's imports done already.

A job of seconds starts a dozen workers, and each would import NumPy, Arrow and the compiled kernels
anew (0.6 s); a fork of a process that has them starts at once and shares their memory. Spark runs
this module where `spark.python.daemon.module` names it (`unlearn_spark.session` does).
"""

from __future__ import annotations

import gc

import numpy as np
import pyspark.daemon

from unlearn_spark.als import kernel
from unlearn_spark.unlearning import frontier  # noqa: F401  (everything that a task may name)


def warm_up() -> None:
    """Load the compiled kernels by solving one row in both precisions."""
    indptr, others = np.array([0, 1], np.int64), np.zeros(1, np.int32)
    ones = np.ones((1, 1), np.float32)
    for dtype in (np.float32, np.float64):
        kernel.solve_rows(
            indptr, others, np.ones(1, np.float32), ones, kernel.Objective(1.0), dtype=dtype
        )


if __name__ == "__main__":
    warm_up()
    gc.freeze()  # so that a collection in a worker does not copy the shared pages
    pyspark.daemon.manager()
