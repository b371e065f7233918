"""What a training reports."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

Progress = Callable[[str], None]
"""Takes lines that say how far a job is."""


@dataclass(frozen=True)
class SweepReport:
    """What one sweep found about the iterate that it started from.

    Attributes
    ----------
    sweep
        From 1.
    objective
        Of the anchor's iterate with the other side solved exactly for it.
    max_residual
        Largest relative residual over all rows of both sides (`relative_residual`).
    seconds
        Wall clock of this sweep.
    eta
        Seconds to tolerance, extrapolated from the residual's recent decay; None at first.
    """

    sweep: int
    objective: float
    max_residual: float
    seconds: float
    eta: float | None

    def line(self) -> str:
        """The report as one line for a terminal."""
        text = (
            f"sweep {self.sweep:3d}  objective {self.objective:.6e}  "
            f"max residual {self.max_residual:.2e}  {self.seconds:.1f} s"
        )
        return text if self.eta is None else f"{text}  about {self.eta:.0f} s to go"


def next_report(
    earlier: Sequence[SweepReport], objective: float, worst: float, seconds: float, tol: float
) -> SweepReport:
    """The report of the sweep after the `earlier` ones, with its estimate of the time to `tol`."""
    number, eta = len(earlier) + 1, None
    larger = [report for report in earlier[-5:] if report.max_residual > worst > 0]
    if larger:
        first = larger[0]
        decay = math.log(first.max_residual / worst) / (number - first.sweep)
        eta = max(0.0, math.log(worst / tol) / decay) * seconds
    return SweepReport(number, objective, worst, seconds, eta)


@dataclass(frozen=True)
class TrainingSummary:
    """How a training went; `seconds` is its whole time, `sweep_seconds` the mean of a sweep."""

    users: int
    items: int
    ratings: int
    sweeps: int
    converged: bool
    objective: float
    max_residual: float
    seconds: float
    sweep_seconds: float
    encode_seconds: float
    history: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        n_rows: Mapping[str, int],
        n_ratings: int,
        reports: Sequence[SweepReport],
        converged: bool,
        objective: float,
        max_residual: float,
        started: float,
        encode_seconds: float,
    ) -> TrainingSummary:
        """Summarise a fit to `n_ratings` ratings of `n_rows` rows a side, which began at `started`
        (`time.perf_counter`) and ends with this call."""
        return cls(
            users=n_rows["user"],
            items=n_rows["item"],
            ratings=n_ratings,
            sweeps=len(reports),
            converged=converged,
            objective=objective,
            max_residual=max_residual,
            seconds=time.perf_counter() - started,
            sweep_seconds=sum(report.seconds for report in reports) / max(1, len(reports)),
            encode_seconds=encode_seconds,
            history=[asdict(report) for report in reports],
        )
