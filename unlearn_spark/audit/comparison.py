"""Compare an unlearned model with models that are trained without the deleted ratings.

The certificate says that every factor row solves the equations of the retained ratings. Those
equations have many solutions, so only retraining answers two questions: is the model as good, and
does it still know what was deleted? `compare` trains models from scratch on the retained ratings,
with other seeds, and measures the same figures on all models. It compares predictions, never
factors, which are only defined up to a change of basis. The yardstick of every distance is that
between two retrained models.

Contestants beside the version *before* the deletion, the *unlearned* and the *retrained* ones:

=============  ==================================================================================
`rows_deleted`  ratings deleted, factors of *before* left as they are
`direct_step`   from *before*, each user row that lost a rating is solved anew, then each item row
`warm_K`        K sweeps of every row from *before*: Unlearn-ALS as published (Xu et al. 2023,
                arXiv 2302.06676)
=============  ==================================================================================

Predictions are compared on samples of pairs that are chosen by hash, so the same tables give the
same pairs on every engine. An engine provides the models and measures them (`Contestants`); what
is trained and reported is decided here.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol, TypeVar

from unlearn_spark.audit import membership
from unlearn_spark.audit.figures import Comparison, Deleted, Measured, side_by_side

if TYPE_CHECKING:
    from unlearn_spark.config import AlsSettings
    from unlearn_spark.core.training import TrainingSummary

WARM_SWEEPS = (1, 3, 10)

Model = TypeVar("Model")
"""Factors of both sides, as an engine holds them."""


class Contestants(Protocol[Model]):
    """What an engine provides: models, and the measure of each on the same ratings and pairs.

    A measure has `objective` on the retained ratings and, if held-out ratings were given, `rmse`
    and `ndcg_at_10` of those whose user and item both `before` and the retained ratings have, so
    that all models are judged on the same.
    """

    @property
    def deletion(self) -> Deleted:
        """The two versions, and the ratings that lie between them."""
        ...

    @property
    def before(self) -> Model:
        """The factors of the version before the deletion."""
        ...

    @property
    def unlearned(self) -> Model:
        """The factors of the version to judge."""
        ...

    def direct_step(self) -> Model:
        """`before` after one closed-form step on the rows that lost a rating.

        First each such user row is solved for the retained ratings and the items of `before`, then
        each such item row for the new user rows. Rows without a retained rating are dropped.
        Ratings whose other row `before` lacks are ignored.
        """
        ...

    def fitted(
        self, als: AlsSettings, warm: bool
    ) -> AbstractContextManager[tuple[Model, TrainingSummary]]:
        """A model fitted to the retained ratings, from `before` if warm, and how that went."""
        ...

    def measure(self, model: Model) -> Measured:
        """The figures of a model, and its scores of the sample."""
        ...


def compare(
    contestants: Contestants[Model],
    seeds: int,
    progress: Callable[[str], None] = lambda line: None,
) -> Comparison:
    """Train, measure one model after the other, and put them side by side.

    Parameters
    ----------
    seeds
        Models to train from scratch, with `als.seed` + 1 and so on.
    progress
        Called with a line before every contestant.

    Returns
    -------
    Comparison
        Its figures: `before` and `unlearned` (versions), `ratings`, `pairs` (sizes of the sample),
        `models` and `seed_to_seed`. Each of `models` has

        * the figures of its measure;
        * `distance` by class of pairs: `rms` and `max` difference from the mean prediction of the
          retrained models, over the `pairs` that all of them and this model can score. A
          retrained model's distance is from the mean of the others;
        * `deleted_score`: the `mean` of deleted entries, 0 where the model has no row, and
          `mean_scorable` over those that before, unlearned and retrained can all score;
        * `deleted_scorable`: how many deleted pairs of the sample it can score;
        * `auc` of the `score` and the `fitted` attack (see `audit.membership`), and by how
          much they exceed the retrained models' mean.

        `retrained` has these as `mean` and `spread` (standard deviation) over its `runs`.
        `seed_to_seed` is the mean rms difference of two retrained models by class of pairs. A
        figure that cannot be computed is None.

    Raises
    ------
    InputError
        No held-out rating has a user and item that the models know.
    UserError
        scikit-learn is not installed.
    """
    membership.require_sklearn()
    deletion = contestants.deletion
    als = deletion.after.als
    measured = {}
    progress(f"measuring version {deletion.before.model_version}, before the deletion")
    measured["before"] = measured["rows_deleted"] = contestants.measure(contestants.before)
    progress("one closed-form step on the rows that lost a rating")
    measured["direct_step"] = contestants.measure(contestants.direct_step())
    for sweeps in WARM_SWEEPS:
        progress(f"{sweeps} warm sweeps of every row")
        plain = als.model_copy(update={"max_sweeps": sweeps, "tol": 1e-12, "memory": 0})
        with contestants.fitted(plain, warm=True) as (model, _):
            measured[f"warm_{sweeps}"] = contestants.measure(model)
    progress(f"measuring version {deletion.after.model_version}, unlearned")
    measured["unlearned"] = contestants.measure(contestants.unlearned)
    runs, trainings = [], []
    for seed in range(als.seed + 1, als.seed + seeds + 1):
        fresh = als.model_copy(update={"seed": seed})
        with contestants.fitted(fresh, warm=False) as (model, summary):
            runs.append(contestants.measure(model))
        reached = "" if summary.converged else "; als.tol was not reached"
        progress(f"retrained with seed {seed}: {summary.sweeps} sweeps{reached}")
        trainings.append({"seed": seed, "sweeps": summary.sweeps, "converged": summary.converged})
    return side_by_side(deletion, measured, runs, trainings)


def drawing_line(deletion: Deleted) -> str:
    """What an engine says before it draws the sample."""
    return f"drawing pairs from {deletion.n_deleted} deleted and {deletion.n_retained} ratings"
