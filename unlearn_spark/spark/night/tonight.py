"""The inputs of a night, bundled for its steps."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unlearn_spark.config import ResolvedUnlearn, Settings
    from unlearn_spark.spark.night.changes import Changes
    from unlearn_spark.tables.models import ModelVersion, Sizes
    from unlearn_spark.tables.store import Store


@dataclass(frozen=True)
class Tonight:
    """The inputs of a night, in rounds or in whole sweeps.

    Attributes
    ----------
    unlearn
        The `unlearn` settings, resolved for this model.
    model, sizes
        The published version, and its numbers of rows and ratings.
    kind
        `unlearn` or `update`.
    started
        When the job started, by `time.perf_counter`.
    """

    store: Store
    settings: Settings
    unlearn: ResolvedUnlearn
    model: ModelVersion
    sizes: Sizes
    changes: Changes
    progress: Callable[[str], None]
    kind: str
    started: float

    @property
    def n_ratings(self) -> int:
        """The number of ratings that the next version is fitted to."""
        return self.sizes.ratings + self.changes.net

    def metrics(self, figures: dict[str, Any]) -> dict[str, Any]:
        """The metrics to publish: the figures of the job, its training sweeps and its duration."""
        return {
            **figures,
            "training_sweeps": self.model.training_sweeps,
            "seconds": time.perf_counter() - self.started,
        }
