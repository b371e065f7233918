"""Importing factors that were trained elsewhere: what is refused, said and reported, whichever
engine does the work.

Whoever trained a row, it is as good as it solves its normal equations on the retained ratings. So
an import computes every row's residual, and can sweep from the given factors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from unlearn_spark.core.blocks import SIDES
from unlearn_spark.errors import InputError

if TYPE_CHECKING:
    from unlearn_spark.config import AlsSettings
    from unlearn_spark.core.training import TrainingSummary


def announced(
    path: str,
    n_rows: Mapping[str, int],
    rank: int,
    als: AlsSettings,
    progress: Callable[[str], None],
) -> AlsSettings:
    """Say what was read; return the settings that the factors are taken to be trained with."""
    progress(f"{path}: {n_rows['user']} users and {n_rows['item']} items of rank {rank}")
    if rank != als.rank:
        progress(f"als.rank = {als.rank} is not used: the factors have {rank}")
    return als.model_copy(update={"rank": rank, "warm_start": None})


def check_given(
    n_rows: Mapping[str, int],
    without_factors: Mapping[str, int],
    negative: Mapping[str, int],
    als: AlsSettings,
    converge: bool,
) -> None:
    """Refuse factors that do not fit the ratings or the settings.

    Parameters
    ----------
    n_rows, without_factors, negative
        By side: the numbers of rated ids, of those without given factors, and of those with
        negative ones.

    Raises
    ------
    InputError
        No rated id of a side has factors; factors are negative although `als.nonnegative` is set;
        or, without `converge`, a rated id has no factors.
    """
    for side in SIDES:
        if without_factors[side] == n_rows[side]:
            raise InputError(
                f"none of the {n_rows[side]} rated {side}s has factors; "
                f"check that the input's {side} ids are those of the ratings table"
            )
    if any(without_factors.values()) and not converge:
        raise InputError(
            f"{without_factors['user']} of {n_rows['user']} rated users and "
            f"{without_factors['item']} of {n_rows['item']} rated items have no factors; "
            "run with --converge, which starts them as a fresh training would"
        )
    if als.nonnegative and any(negative.values()):
        raise InputError(
            f"als.nonnegative is set, but {negative['user']} users and {negative['item']} items "
            "have negative factors; set it to what the model was trained with"
        )


def check_residual(residual: float) -> None:
    """Raise InputError if the largest residual of factors to keep is infinite: every target is
    zero, and a row is not."""
    if math.isinf(residual):
        raise InputError(
            "the ratings are all zero (or, with als.implicit_prefs, none positive) and the "
            "factors are not; check als.implicit_prefs, or run with --converge"
        )


def scan_line(residual: float, als: AlsSettings) -> str:
    """The largest residual of the given factors, as a line of progress."""
    return f"largest residual {residual:.1e}: {residual / als.tol:.3g} times als.tol"


def verdict(
    summary: TrainingSummary, als: AlsSettings, tau: float, over: Mapping[str, int], swept: bool
) -> str:
    """What the residuals mean for the next nights, and what to do about it.

    `over` has by side the number of rows whose residual exceeds `tau`.
    """
    if summary.converged:
        return f"converged: largest residual {summary.max_residual:.1e}, als.tol = {als.tol:.1e}"
    many = (
        f"{over['user']} of {summary.users} users and {over['item']} of {summary.items} items "
        f"exceed unlearn.tau = {tau:.1e}"
    )
    if swept:
        return (
            f"stopped at als.max_sweeps = {als.max_sweeps} with residual "
            f"{summary.max_residual:.1e}, not at als.tol = {als.tol:.1e}; {many}"
        )
    if not any(over.values()):
        return f"no residual exceeds unlearn.tau = {tau:.1e}: nights need no repair first"
    return (
        f"{many}: the first night will re-solve them and what they move. "
        "Run with --converge to do it now; if that is unexpected, check that als.reg_param, "
        "als.implicit_prefs and als.alpha are those it was trained with"
    )


def figures(
    model_version: int,
    rank: int,
    summary: TrainingSummary,
    residual_before: float,
    without_factors: Mapping[str, int],
    without_ratings: Mapping[str, int],
    rows_over_tau: Mapping[str, int],
    converge: bool,
) -> dict[str, Any]:
    """The JSON of the job import_model."""
    found = asdict(summary)
    found.pop("history")
    if converge:
        found["residual_before"] = residual_before if math.isfinite(residual_before) else None
        found["rows_without_factors"] = dict(without_factors)
    return {
        "model_version": model_version,
        "rank": rank,
        **found,
        "factors_without_ratings": dict(without_ratings),
        "rows_over_tau": dict(rows_over_tau),
    }
