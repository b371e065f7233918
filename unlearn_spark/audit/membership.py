"""Membership inference: do a model's scores tell which entries it once knew?

Two attacks, both on *members* (entries that a model was trained with, here those deleted since)
against *others* (entries that were never rated). Neither needs shadow models:

* the score attack ranks by the plain score (a threshold attack like that of Yeom et al. 2018,
  "Privacy risk in machine learning", with the score in place of the loss). The loss `|r - score|`
  cannot serve: an entry that was never rated has no r, and one statistic has to be defined for both
  classes;
* the fitted attack is a logistic regression on the score and on what puts it in context
  (`FEATURES`), judged on entries that it was not fitted to.

People do not rate at random, so the scores of what somebody once rated stand out even in a model
that never saw them. An AUC is therefore to be compared with that of a model trained without the
members, never with 0.5.

Needs NumPy, and scikit-learn for the fitted attack; no Spark.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from unlearn_spark.errors import InputError
from unlearn_spark.evaluation.metrics import auc
from unlearn_spark.preconditions import require_package

FEATURES = ("score", "user_mean", "item_mean", "percentile")
"""Columns of `attack_features`."""

FOLDS = 5


def attack_features(x: ArrayLike, y: ArrayLike, users: ArrayLike, items: ArrayLike) -> NDArray:
    """What an attacker sees of some (user, item) pairs, from a model's vectors.

    Parameters
    ----------
    x, y : float (n, rank)
        Vectors of each pair's user and item; zeros where the model has no row.
    users, items : float (l, rank) and (m, rank)
        Vectors of a sample of all users and of all items: means and percentiles are over these.

    Returns
    -------
    float64 (n, 4)
        By `FEATURES`: the score `x.y`; the mean score of the user over the sampled items; the mean
        score of the item over the sampled users; the share of the sampled items that the user
        scores below this one, equal ones counting one half. Without a sample the means are 0 and
        the percentile is 0.5.
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    users, items = np.asarray(users, np.float64), np.asarray(items, np.float64)
    found = np.zeros((len(x), len(FEATURES)))
    found[:, 0] = np.einsum("ij,ij->i", x, y)
    found[:, 3] = 0.5
    if len(users):
        found[:, 2] = y @ users.mean(axis=0)
    if len(items):
        found[:, 1] = x @ items.mean(axis=0)
        step = max(1, (4 << 20) // len(items))  # 32 MiB of scores at a time
        for first in range(0, len(x), step):
            rows = slice(first, first + step)
            scores, own = x[rows] @ items.T, found[rows, :1]
            found[rows, 3] = ((scores < own) + 0.5 * (scores == own)).mean(axis=1)
    return found


def score_attack(members: ArrayLike, others: ArrayLike) -> float:
    """AUC of the plain score: the chance that a member scores above another entry.

    Parameters
    ----------
    members, others : float (n,) and (m,)
        Scores of the two classes.

    Raises
    ------
    InputError
        A class is empty, or a score is NaN.
    """
    members, others = np.asarray(members, np.float64), np.asarray(others, np.float64)
    labels = np.repeat([True, False], [len(members), len(others)])
    return auc(np.concatenate([members, others]), labels)


def fitted_attack(members: ArrayLike, others: ArrayLike, *, seed: int = 0) -> float | None:
    """AUC of a logistic regression, every entry being judged by a fit to other entries.

    There are five stratified folds, drawn by the seed; as many folds as entries where a class has
    fewer. The columns are standardised by the training folds.

    Parameters
    ----------
    members, others : float (n, f) and (m, f)
        Features of the two classes, as from `attack_features`.

    Returns
    -------
    float or None
        None where a class has fewer than two entries: there is nothing to fit to.

    Raises
    ------
    InputError
        A feature is not finite, or the classes have different numbers of features.
    UserError
        scikit-learn is not installed.
    """
    require_sklearn()
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    members, others = np.asarray(members, np.float64), np.asarray(others, np.float64)
    if members.ndim != 2 or others.ndim != 2 or members.shape[1] != others.shape[1]:
        raise InputError(
            f"features of members are {members.shape} and of others {others.shape}; "
            "give matrices with the same columns"
        )
    features = np.concatenate([members, others])
    if not np.isfinite(features).all():
        raise InputError("a feature is not finite; drop pairs that the model cannot score")
    folds = min(FOLDS, len(members), len(others))
    if folds < 2:
        return None
    labels = np.repeat([True, False], [len(members), len(others)])
    judged = cross_val_predict(
        make_pipeline(StandardScaler(), LogisticRegression()),
        features,
        labels,
        cv=StratifiedKFold(folds, shuffle=True, random_state=seed),
        method="decision_function",
    )
    return auc(judged, labels)


def require_sklearn() -> None:
    """Raise UserError, which says how to install it, if scikit-learn is missing."""
    require_package("sklearn", "scikit-learn", "the fitted membership attack")
