"""What an audit checks, whichever engine scans: the equations of a row, and its ledger bound.

The equations A x = b are those of weighted-lambda ALS (Zhou et al. 2008, section 3) and, for
implicit preferences, of Hu, Koren and Volinsky (2008, equation 4), with lambda scaled by the row's
count of ratings (implicit: of positive ones), as in Spark MLlib. They are written out here a second
time, so that a mistake in the solvers or in the ledger cannot hide itself in the audit.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from unlearn_spark.config import AlsSettings

OTHER = {"user": "item", "item": "user"}

RELATIVE_SLACK = 1e-6
ABSOLUTE_SLACK = 1e-9
"""A ledger bound is too low when `bound * (1 + RELATIVE_SLACK) + ABSOLUTE_SLACK` is below the
residual. Two float64 sums of the same terms in different order differ by far less."""


@dataclass(frozen=True)
class Equations:
    """The equations A x = b of the rows of one side.

    Attributes
    ----------
    reg_param
        lambda.
    alpha
        Confidence factor of implicit preferences; None for explicit ratings.
    gram : float64 (rank, rank)
        Y'Y of the other side; None for explicit ratings.
    floor
        The least denominator of the residuals.
    """

    reg_param: float
    alpha: float | None = None
    nonnegative: bool = False
    gram: NDArray[np.float64] | None = field(default=None, repr=False)
    floor: float = 0.0

    @classmethod
    def of(cls, als: AlsSettings, gram: NDArray[np.float64] | None, floor: float) -> Equations:
        """The equations that a model's settings state; `gram` is None for explicit ratings."""
        alpha = als.alpha if als.implicit_prefs else None
        return cls(als.reg_param, alpha, als.nonnegative, gram, floor)

    def terms(
        self, values: NDArray[np.float64], scores: NDArray[np.float64]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_]]:
        """What each rating adds to its row's sums.

        Parameters
        ----------
        values, scores : float64 (n,)
            Ratings r, and the products x.y of their rows.

        Returns
        -------
        gradient, b : float64 (n,)
            The multiples of y that it adds to A x - b without the penalty and the global term, and
            to b.
        penalised : bool (n,)
            Whether it counts in the multiple of lambda.
        """
        if self.alpha is None:
            return scores - values, values, np.ones(len(values), np.bool_)
        confidence = self.alpha * np.abs(values)
        wanted = np.where(values > 0, 1 + confidence, 0.0)
        return confidence * scores - wanted, wanted, values > 0

    def residuals(
        self,
        x: NDArray[np.float64],
        gradient: NDArray[np.float64],
        b: NDArray[np.float64],
        penalised: NDArray[np.float64],
    ) -> NDArray[np.float64]:
        """||A x - b|| / max(||b||, floor), with the projected gradient if factors are nonnegative.

        Parameters
        ----------
        x, gradient, b : float64 (n, rank)
            Rows, and the sums of `terms` of their ratings.
        penalised : float64 (n,)
            Their numbers of penalised ratings.

        Returns
        -------
        float64 (n,)
            0 where the numerator is 0; infinite where only the denominator is 0, where the row is
            negative against the settings, or where a norm is not finite.
        """
        gradient = gradient + self.reg_param * penalised[:, None] * x
        if self.gram is not None:
            gradient = gradient + x @ self.gram
        broken = np.zeros(len(x), np.bool_)
        if self.nonnegative:
            broken[(x < 0).any(axis=1)] = True
            # At the boundary x can only move inwards.
            gradient = np.where(x > 0, gradient, np.minimum(gradient, 0))
        numerators, norms = np.linalg.norm(gradient, axis=1), np.linalg.norm(b, axis=1)
        broken[~(np.isfinite(numerators) & np.isfinite(norms))] = True
        denominators = np.maximum(norms, self.floor)
        broken[(denominators == 0) & (numerators > 0)] = True
        found = np.zeros(len(x))
        np.divide(numerators, denominators, out=found, where=~broken & (denominators > 0))
        found[broken] = np.inf
        return found
