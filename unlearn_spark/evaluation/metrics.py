"""Held-out quality in NumPy: ranking measures, and the area under a ROC curve.

The ranking measures take relevance as yes or no and are means over the users who have at least one
relevant item; a user without recommendations counts with 0.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata

from unlearn_spark.errors import InputError


@dataclass(frozen=True)
class RankingMetrics:
    """Means over `users` users, each between 0 and 1; see `ranking_scores`."""

    users: int
    ndcg: float
    precision: float
    recall: float
    map: float


def ranking_scores(
    hits: NDArray[np.bool_], relevant: NDArray[np.integer]
) -> dict[str, NDArray[np.float64]]:
    """Ranking measures of each user.

    Parameters
    ----------
    hits : bool (m, k)
        Whether the recommendation on each place, best first, is relevant; False past the end.
    relevant : int (m,)
        How many relevant items the user has, at least 1.

    Returns
    -------
    dict of float64 (m,)
        `ndcg`: sum of 1 / log2(place + 1) over the hits, divided by what min(k, relevant) hits
        on the first places give (Jarvelin and Kekalainen 2002, binary gain).
        `precision`: hits / k. `recall`: hits / relevant.
        `map`: precision at the place of each hit, summed and divided by min(k, relevant).
    """
    k = hits.shape[1]
    places = np.arange(1, k + 1)
    discounts = 1 / np.log2(places + 1)
    reachable = np.minimum(relevant, k)
    found = np.cumsum(hits, axis=1)
    return {
        "ndcg": (hits @ discounts) / np.cumsum(discounts)[reachable - 1],
        "precision": found[:, -1] / k,
        "recall": found[:, -1] / relevant,
        "map": (hits * found / places).sum(axis=1) / reachable,
    }


def as_json(metrics: RankingMetrics, k: int) -> dict[str, float]:
    """The measures, with k in their names: ndcg_at_10."""
    values = asdict(metrics)
    values.pop("users")
    return {f"{name}_at_{k}": value for name, value in values.items()}


def auc(scores: ArrayLike, labels: ArrayLike) -> float:
    """Area under the ROC curve: the chance that a member scores above a non-member.

    The measure of a membership-inference attack that ranks by score. Equal scores count one half
    (the Mann-Whitney statistic).

    Parameters
    ----------
    scores : float (n,)
        Larger means member.
    labels : bool or 0/1 (n,)

    Raises
    ------
    InputError
        The lengths differ, a score is NaN, or one of the classes is empty.
    """
    values = np.asarray(scores, np.float64).ravel()
    members = np.asarray(labels).ravel().astype(np.bool_)
    if len(values) != len(members):
        raise InputError(f"{len(values)} scores and {len(members)} labels; give one each")
    if np.isnan(values).any():
        raise InputError("a score is NaN; drop pairs that the model cannot score")
    inside = int(members.sum())
    outside = len(members) - inside
    if inside == 0 or outside == 0:
        raise InputError("AUC needs members and non-members; one of the classes is empty")
    ranks = rankdata(values)
    return float((ranks[members].sum() - inside * (inside + 1) / 2) / (inside * outside))
