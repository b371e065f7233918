"""Drop-in replacements for MLlib's `ALS` and `ALSModel`.

`from unlearn_spark.als import ALS, ALSModel` replaces
`from pyspark.ml.recommendation import ALS, ALSModel`. The package loads them, and with them
Spark, when they are first used.
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
