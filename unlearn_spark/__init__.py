"""Matrix factorisation that can forget, with a certificate; on one machine or on Spark.

`open(root)` gives an object with a method for every job (`unlearn_spark.recommender`); the command
`unlearn-spark JOB` runs the same jobs. Where Spark is installed, `unlearn_spark.als` has an
estimator with the parameters of MLlib's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = ["open"]

if TYPE_CHECKING:
    from unlearn_spark.recommender import open


def __getattr__(name: str) -> Any:
    # Late, because workers of Spark import this package, and need none of it.
    if name == "open":
        from unlearn_spark import recommender

        return recommender.open
    raise AttributeError(f"module {__name__} has no attribute {name}")
