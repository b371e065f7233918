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
same pairs. Only the samples' scores reach the driver.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from unlearn_spark.audit import membership
from unlearn_spark.audit.contestants import direct_step, objective_of, penalty_weights
from unlearn_spark.audit.deletion import Deletion
from unlearn_spark.audit.sample import (
    COMPARED,
    DELETED,
    UNSEEN,
    Scores,
    draw_sample,
    score_sample,
)
from unlearn_spark.core.blocks import SIDES
from unlearn_spark.evaluation.metrics import held_out_metrics
from unlearn_spark.spark.frames import materialise
from unlearn_spark.spark.training.training import FitResult, fit_factors
from unlearn_spark.tables import models

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

    from unlearn_spark.config import AlsSettings, ExecutionSettings
    from unlearn_spark.tables.store import Store

WARM_SWEEPS = (1, 3, 10)

K = 10
"""Places of held-out rankings."""


@dataclass(frozen=True)
class Measured:
    """One model's figures on the retained and held-out ratings, and its scores of the sample."""

    figures: dict[str, Any]
    scores: Scores


@dataclass(frozen=True)
class Comparison:
    """Everything that was measured.

    Attributes
    ----------
    figures
        As JSON has it: see `compare`.
    deleted_scores
        By contestant (`before`, `unlearned`, `retrained`): float64 scores of the sampled deleted
        entries, 0 where the model has no row; those of all retrained models in one array.
    """

    figures: dict[str, Any]
    deleted_scores: dict[str, NDArray[np.float64]]


def compare(
    store: Store,
    deletion: Deletion,
    execution: ExecutionSettings,
    *,
    seeds: int,
    held_out: DataFrame | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> Comparison:
    """Train, measure one model after the other, and put them side by side.

    Parameters
    ----------
    seeds
        Models to train from scratch, with `als.seed` + 1 and so on.
    held_out
        user_id, item_id, rating. Only those count whose user and item both `before` and the
        retained ratings have, so that all models are judged on the same.
    progress
        Called with a line before every contestant.

    Returns
    -------
    Comparison
        Its figures: `before` and `unlearned` (versions), `ratings`, `pairs` (sizes of the sample),
        `models` and `seed_to_seed`. Each of `models` has

        * `objective` on the retained ratings; `rmse`, `ndcg_at_10` of held-out ratings, if given;
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
    als, checkpoint = deletion.after.als, execution.checkpoint
    retained = deletion.retained
    before = dict(zip(SIDES, models.read_factors(store, deletion.before), strict=True))
    unlearned = dict(zip(SIDES, models.read_factors(store, deletion.after), strict=True))
    weights = {
        side: materialise(rows, checkpoint)
        for side, rows in penalty_weights(retained, als.implicit_prefs).items()
    }
    progress(f"drawing pairs from {deletion.n_deleted} deleted and {deletion.n_retained} ratings")
    sample = draw_sample(deletion, checkpoint)
    if held_out is not None:
        for side in SIDES:
            known = before[side].select("id").join(weights[side].select("id"), "id", "left_semi")
            known = known.withColumnRenamed("id", f"{side}_id")
            held_out = held_out.join(known, f"{side}_id", "left_semi")
        held_out = materialise(held_out, checkpoint)

    def measure(factors: Mapping[str, DataFrame]) -> Measured:
        figures = {"objective": objective_of(retained, weights, factors, als)}
        if held_out is not None:
            found = held_out_metrics(factors["user"], factors["item"], held_out, retained, k=K)
            figures |= {name: found[name] for name in ("rmse", f"ndcg_at_{K}")}
        return Measured(figures, score_sample(sample, factors, als.rank))

    def measure_fit(settings: AlsSettings, warm: bool) -> tuple[Measured, FitResult]:
        start = (before["user"], before["item"]) if warm else None
        fitted = fit_factors(retained, settings, execution, warm_start=start)
        try:
            return measure({"user": fitted.user_factors, "item": fitted.item_factors}), fitted
        finally:
            fitted.release()

    measured = {}
    progress(f"measuring version {deletion.before.model_version}, before the deletion")
    measured["before"] = measured["rows_deleted"] = measure(before)
    progress("one closed-form step on the rows that lost a rating")
    measured["direct_step"] = measure(direct_step(deletion, before, weights, checkpoint))
    for sweeps in WARM_SWEEPS:
        progress(f"{sweeps} warm sweeps of every row")
        plain = als.model_copy(update={"max_sweeps": sweeps, "tol": 1e-12, "memory": 0})
        measured[f"warm_{sweeps}"], _ = measure_fit(plain, warm=True)
    progress(f"measuring version {deletion.after.model_version}, unlearned")
    measured["unlearned"] = measure(unlearned)
    runs, trainings = [], []
    for seed in range(als.seed + 1, als.seed + seeds + 1):
        one, fitted = measure_fit(als.model_copy(update={"seed": seed}), warm=False)
        summary = fitted.summary
        reached = "" if summary.converged else "; als.tol was not reached"
        progress(f"retrained with seed {seed}: {summary.sweeps} sweeps{reached}")
        runs.append(one)
        trainings.append({"seed": seed, "sweeps": summary.sweeps, "converged": summary.converged})
    return side_by_side(deletion, measured, runs, trainings)


def side_by_side(
    deletion: Deletion,
    measured: Mapping[str, Measured],
    runs: Sequence[Measured],
    trainings: Sequence[Mapping[str, Any]],
) -> Comparison:
    """Every figure relative to the retrained models (`runs`); see `compare` for what comes out.

    `trainings` has the seed, sweeps and convergence of each run.
    """
    kinds = runs[0].scores.kind
    common = np.logical_and.reduce(
        [one.scores.scorable for one in (measured["before"], measured["unlearned"], *runs)]
    )
    retrained = [
        _figures(one, [*runs[:i], *runs[i + 1 :]], common) | dict(trainings[i])
        for i, one in enumerate(runs)
    ]
    shown = [
        {name: value for name, value in run.items() if name not in trainings[i]}
        for i, run in enumerate(retrained)
    ]
    mean, spread = _over(shown, np.mean), _over(shown, _spread)
    if len(runs) == 2:  # each is measured against the other, so the spread is always 0
        spread["distance"] = _over([spread["distance"]], lambda values: None)
    contestants = {name: _figures(one, runs, common) for name, one in measured.items()}
    for figures in contestants.values():
        for attack in ("score", "fitted"):
            mine, theirs = figures["auc"][attack], mean["auc"][attack]
            known = mine is not None and theirs is not None
            figures["auc"][f"{attack}_excess"] = mine - theirs if known else None
    return Comparison(
        {
            "before": deletion.before.model_version,
            "unlearned": deletion.after.model_version,
            "ratings": {"retained": deletion.n_retained, "deleted": deletion.n_deleted},
            "pairs": {
                **{kind: int((kinds == kind).sum()) for kind in (*COMPARED, UNSEEN)},
                "scorable_by_all": int(common[kinds == DELETED].sum()),
            },
            "models": {
                **contestants,
                "retrained": {"mean": mean, "spread": spread, "runs": retrained},
            },
            "seed_to_seed": {kind: seed_to_seed(runs, kind) for kind in COMPARED},
        },
        {
            "before": measured["before"].scores.of(DELETED),
            "unlearned": measured["unlearned"].scores.of(DELETED),
            "retrained": np.concatenate([one.scores.of(DELETED) for one in runs]),
        },
    )


def _figures(
    one: Measured, references: Sequence[Measured], common: NDArray[np.bool_]
) -> dict[str, Any]:
    scores = one.scores
    deleted = scores.kind == DELETED
    compared = scores.features[deleted & common, 0]
    return {
        **one.figures,
        "distance": {kind: distance(one, references, kind) for kind in COMPARED},
        "deleted_score": {
            "mean": float(scores.of(DELETED).mean()),
            "mean_scorable": float(compared.mean()) if len(compared) else None,
        },
        "deleted_scorable": int(scores.scorable[deleted].sum()),
        "auc": scores.attacks(),
    }


def distance(one: Measured, references: Sequence[Measured], kind: str) -> dict[str, Any]:
    """rms and largest difference of a model's scores from the mean of the references' scores.

    Over the pairs of one class that all of them can score; None where there is no such pair or no
    reference.
    """
    usable = (one.scores.kind == kind) & one.scores.scorable
    for other in references:
        usable &= other.scores.scorable
    n = int(usable.sum()) if references else 0
    if n == 0:
        return {"rms": None, "max": None, "pairs": 0}
    mean = np.mean([other.scores.features[usable, 0] for other in references], axis=0)
    difference = one.scores.features[usable, 0] - mean
    return {
        "rms": float(np.sqrt(np.mean(difference**2))),
        "max": float(np.abs(difference).max()),
        "pairs": n,
    }


def seed_to_seed(runs: Sequence[Measured], kind: str) -> float | None:
    """Mean rms difference between two of the runs; None where there are no two."""
    found = [distance(one, [other], kind)["rms"] for one, other in combinations(runs, 2)]
    found = [value for value in found if value is not None]
    return float(np.mean(found)) if found else None


def _over(runs: Sequence[Mapping[str, Any]], fold: Callable[[list[float]], Any]) -> dict[str, Any]:
    """The runs' figures folded one by one, in the same nested shape; None where one is None."""
    folded: dict[str, Any] = {}
    for name, first in runs[0].items():
        values = [run[name] for run in runs]
        if isinstance(first, Mapping):
            folded[name] = _over(values, fold)
        elif any(value is None for value in values):
            folded[name] = None
        else:
            found = fold(values)
            folded[name] = None if found is None else float(found)
    return folded


def _spread(values: list[float]) -> float | None:
    return float(np.std(values, ddof=1)) if len(values) > 1 else None
