"""What a comparison with retrained models reports, from every model's scores of the same pairs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from unlearn_spark.audit import membership
from unlearn_spark.tables.models import ModelVersion

K = 10
"""Places of held-out rankings."""

SAMPLE_SEED = 0

SAMPLE_PAIRS = 20_000
"""Most pairs of each class."""

PANEL_ROWS = 1000
"""Users and items to draw random pairs from, and to take means and percentiles over."""

REACH = 16
"""Most places, in the order of popularity, between a deleted item and its never-rated match."""

DELETED, UNSEEN, NEIGHBOURING, RANDOM = "deleted", "unseen", "neighbouring", "random"

COMPARED = (DELETED, NEIGHBOURING, RANDOM)
"""Classes of pairs on which distances are measured."""


class Deleted(Protocol):
    """Two versions, and the numbers of ratings that lie between them."""

    @property
    def before(self) -> ModelVersion:
        """The version that knew the deleted ratings."""
        ...

    @property
    def after(self) -> ModelVersion:
        """The version to judge."""
        ...

    @property
    def n_retained(self) -> int:
        """Ratings that it must fit."""
        ...

    @property
    def n_deleted(self) -> int:
        """Ratings that it must have forgotten."""
        ...


@dataclass(frozen=True)
class Scores:
    """One model's scores of the sample, with rows in the same order for every model.

    Attributes
    ----------
    kind, matched, scorable : (n,)
        `scorable`: the model has a row for both the user and the item. A missing row counts as
        zeros.
    features : float64 (n, 4)
        By `membership.FEATURES`; the first column is the score.
    """

    kind: NDArray[Any]
    matched: NDArray[np.bool_]
    scorable: NDArray[np.bool_]
    features: NDArray[np.float64]

    def of(self, kind: str) -> NDArray[np.float64]:
        """Scores of one class of pairs."""
        return self.features[self.kind == kind, 0]

    def attacks(self) -> dict[str, float | None]:
        """AUC of both attacks on deleted against never-seen entries; None where nothing matched."""
        members = self.features[(self.kind == DELETED) & self.matched]
        others = self.features[self.kind == UNSEEN]
        if not len(members):
            return {"score": None, "fitted": None}
        return {
            "score": membership.score_attack(members[:, 0], others[:, 0]),
            "fitted": membership.fitted_attack(members, others, seed=SAMPLE_SEED),
        }


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
        As JSON has it: see `audit.comparison.compare`.
    deleted_scores
        By contestant (`before`, `unlearned`, `retrained`): float64 scores of the sampled deleted
        entries, 0 where the model has no row; those of all retrained models in one array.
    """

    figures: dict[str, Any]
    deleted_scores: dict[str, NDArray[np.float64]]


def side_by_side(
    deletion: Deleted,
    measured: Mapping[str, Measured],
    runs: Sequence[Measured],
    trainings: Sequence[Mapping[str, Any]],
) -> Comparison:
    """Every figure relative to the retrained models (`runs`).

    What comes out is as `audit.comparison.compare` says. `trainings` has the seed,
    sweeps and convergence of each run.
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
