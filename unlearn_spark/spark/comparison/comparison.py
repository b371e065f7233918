"""The contestants of a comparison with retraining, on Spark: only the samples' scores reach the
driver."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from unlearn_spark.audit.comparison import drawing_line
from unlearn_spark.audit.figures import K, Measured
from unlearn_spark.core.blocks import SIDES
from unlearn_spark.spark import factors as stored
from unlearn_spark.spark.comparison.contestants import direct_step, objective_of, penalty_weights
from unlearn_spark.spark.comparison.deletion import Deletion
from unlearn_spark.spark.comparison.sample import Sample, draw_sample, score_sample
from unlearn_spark.spark.frames import materialise
from unlearn_spark.spark.metrics import held_out_metrics
from unlearn_spark.spark.training.training import fit_factors

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

    from unlearn_spark.config import AlsSettings, ExecutionSettings
    from unlearn_spark.core.training import TrainingSummary
    from unlearn_spark.tables.delta_spark import SparkStore

    Model = Mapping[str, DataFrame]


@dataclass(frozen=True)
class SparkContestants:
    """`audit.comparison.Contestants`; a model is by side a frame with id, factors array<float>.

    Attributes
    ----------
    weights
        As from `penalty_weights`, of the retained ratings.
    held_out
        user_id, item_id, rating that count; None if none were given.
    """

    deletion: Deletion
    before: Model
    unlearned: Model
    weights: Mapping[str, DataFrame]
    sample: Sample
    held_out: DataFrame | None
    execution: ExecutionSettings

    @classmethod
    def of(
        cls,
        store: SparkStore,
        deletion: Deletion,
        execution: ExecutionSettings,
        held_out: DataFrame | None,
        progress: Callable[[str], None],
    ) -> SparkContestants:
        """Read the two versions and draw the sample; `held_out` has user_id, item_id, rating."""
        checkpoint = execution.checkpoint
        before = dict(zip(SIDES, stored.read_factors(store, deletion.before), strict=True))
        unlearned = dict(zip(SIDES, stored.read_factors(store, deletion.after), strict=True))
        weights = {
            side: materialise(rows, checkpoint)
            for side, rows in penalty_weights(
                deletion.retained, deletion.after.als.implicit_prefs
            ).items()
        }
        progress(drawing_line(deletion))
        sample = draw_sample(deletion, checkpoint)
        if held_out is not None:
            for side in SIDES:
                known = (
                    before[side].select("id").join(weights[side].select("id"), "id", "left_semi")
                )
                known = known.withColumnRenamed("id", f"{side}_id")
                held_out = held_out.join(known, f"{side}_id", "left_semi")
            held_out = materialise(held_out, checkpoint)
        return cls(deletion, before, unlearned, weights, sample, held_out, execution)

    def direct_step(self) -> Model:
        return direct_step(self.deletion, self.before, self.weights, self.execution.checkpoint)

    @contextmanager
    def fitted(self, als: AlsSettings, warm: bool) -> Iterator[tuple[Model, TrainingSummary]]:
        start = (self.before["user"], self.before["item"]) if warm else None
        fitted = fit_factors(self.deletion.retained, als, self.execution, warm_start=start)
        try:
            yield {"user": fitted.user_factors, "item": fitted.item_factors}, fitted.summary
        finally:
            fitted.release()

    def measure(self, model: Model) -> Measured:
        als, retained = self.deletion.after.als, self.deletion.retained
        figures = {"objective": objective_of(retained, self.weights, model, als)}
        if self.held_out is not None:
            found = held_out_metrics(model["user"], model["item"], self.held_out, retained, k=K)
            figures |= {name: found[name] for name in ("rmse", f"ndcg_at_{K}")}
        return Measured(figures, score_sample(self.sample, model, als.rank))
