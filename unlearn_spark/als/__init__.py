"""Alternating least squares on Spark: the kernel, the sweeps, and an MLlib-shaped front.

`from unlearn_spark.als import ALS, ALSModel` replaces
`from pyspark.ml.recommendation import ALS, ALSModel`. Both are loaded when they are first named,
so that importing the kernel needs no Spark.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unlearn_spark.als.estimator import ALS, ALSModel

__all__ = ["ALS", "ALSModel"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from unlearn_spark.als import estimator

        return getattr(estimator, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
