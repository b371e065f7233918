"""Draw a training, a deletion, and growth: a PNG by matplotlib, or a line of text.

Only the PNGs need matplotlib; `pip install 'unlearn-spark[evaluation]'` brings it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from unlearn_spark.errors import InputError
from unlearn_spark.preconditions import require_package

_BARS = "▁▂▃▄▅▆▇█"


def sparkline(values: Iterable[float], *, log: bool = False, width: int | None = None) -> str:
    """A text picture, one character a value, from the lowest bar to the highest.

    Parameters
    ----------
    values
        NaN and infinities are blanks; with `log`, so are values that are not positive.
    log
        Heights follow the logarithm, as suits residuals.
    width
        At most this many characters: evenly spaced values stand for the rest.
    """
    heights = np.asarray(list(values), np.float64)
    if width is not None and len(heights) > width:
        heights = heights[np.linspace(0, len(heights) - 1, width).round().astype(int)]
    if log:
        heights = np.log(heights, where=heights > 0, out=np.full(len(heights), np.nan))
    known = heights[np.isfinite(heights)]
    if not len(known):
        return " " * len(heights)
    low, span = known.min(), np.ptp(known)
    scale = (len(_BARS) - 1) / span if span > 0 else 0.0
    return "".join(
        _BARS[math.floor((height - low) * scale + 0.5)] if math.isfinite(height) else " "
        for height in heights
    )


def convergence(
    history: Sequence[Mapping[str, Any]], path: str | Path, *, tol: float | None = None
) -> Path:
    """Objective and largest residual by sweep, as a PNG.

    Parameters
    ----------
    history
        Mappings with sweep, objective, max_residual and seconds, as in `TrainingSummary.history`.
    tol
        Drawn as a line, where given.

    Raises
    ------
    InputError
        The history is empty.
    UserError
        matplotlib is not installed.
    """
    if not history:
        raise InputError("there are no sweeps to draw")
    figure, (above, below) = _subplots(2, 1, sharex=True, figsize=(7, 6))
    sweeps = [entry["sweep"] for entry in history]
    above.plot(sweeps, [entry["objective"] for entry in history], marker=".")
    above.set_ylabel("objective")
    below.semilogy(sweeps, [entry["max_residual"] for entry in history], marker=".")
    below.set_ylabel("largest relative residual")
    below.set_xlabel("sweep")
    if tol is not None:
        below.axhline(tol, linestyle="--", color="grey", label=f"tolerance {tol:g}")
        below.legend()
    seconds = sum(entry["seconds"] for entry in history)
    above.set_title(f"{len(history)} sweeps, {seconds:.1f} s")
    return _saved(figure, path)


def scores(before: ArrayLike, after: ArrayLike, retrained: ArrayLike, path: str | Path) -> Path:
    """Distributions of the deleted entries' scores, as a PNG.

    Parameters
    ----------
    before, after, retrained : float (n,)
        Scores by the model that had seen the entries, by the one that unlearned them, and by one
        trained without them. The second should lie on the third.

    Raises
    ------
    InputError
        One of them is empty.
    UserError
        matplotlib is not installed.
    """
    series = {
        "before": np.asarray(before, np.float64).ravel(),
        "unlearned": np.asarray(after, np.float64).ravel(),
        "retrained": np.asarray(retrained, np.float64).ravel(),
    }
    for name, values in series.items():
        if not len(values):
            raise InputError(f"there are no scores {name} to draw")
    figure, axes = _subplots(figsize=(7, 4))
    for name, values in series.items():
        ordered = np.sort(values)
        axes.step(ordered, np.arange(1, len(ordered) + 1) / len(ordered), where="post", label=name)
    axes.set_xlabel("score of a deleted entry")
    axes.set_ylabel("share of entries at or below")
    axes.legend()
    return _saved(figure, path)


def comparison(
    figures: Mapping[str, Any], deleted_scores: Mapping[str, ArrayLike], path: str | Path
) -> Path:
    """Scores of deleted entries and membership AUCs beside those of retrained models, as a PNG.

    Parameters
    ----------
    figures, deleted_scores
        As in `audit.comparison.Comparison`. Drawn are the `auc` of each of the `models`, and the
        scores, float (n,), of `before`, `unlearned` and `retrained`.

    Raises
    ------
    InputError
        One of the arrays is empty.
    UserError
        matplotlib is not installed.
    """
    figure, (left, right) = _subplots(1, 2, figsize=(12, 4.5))
    for name, values in deleted_scores.items():
        ordered = np.sort(np.asarray(values, np.float64).ravel())
        if not len(ordered):
            raise InputError(f"there are no scores {name} to draw")
        left.step(ordered, np.arange(1, len(ordered) + 1) / len(ordered), where="post", label=name)
    left.set_xlabel("score of a deleted entry (0 where the model has no row)")
    left.set_ylabel("share of entries at or below")
    left.legend()
    contestants = dict(figures["models"])
    retrained = contestants.pop("retrained")
    names = [*contestants, "retrained"]
    aucs = [*(one["auc"] for one in contestants.values()), retrained["mean"]["auc"]]
    for attack, marker, colour in (("score", "o", "tab:blue"), ("fitted", "s", "tab:orange")):
        values = [np.nan if auc[attack] is None else auc[attack] for auc in aucs]
        right.plot(values, range(len(names)), marker, color=colour, label=f"{attack} attack")
        right.axvline(values[-1], color=colour, linestyle=":")
        spread = retrained["spread"]["auc"][attack]
        if spread is not None:
            right.errorbar(values[-1], len(names) - 1, xerr=spread, color=colour, capsize=3)
    right.set_yticks(range(len(names)), names)
    right.invert_yaxis()
    right.set_xlabel("membership AUC (dotted: retrained)")
    right.legend()
    return _saved(figure, path)


def growth(
    panels: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]], path: str | Path
) -> Path:
    """Lines over the number of ratings, on logarithmic axes, as a PNG.

    Parameters
    ----------
    panels
        By title of a panel, by label of a line: points (ratings, value).
    path
        Where to write; folders are made.

    Returns
    -------
    Path
        The file.

    Raises
    ------
    UserError
        matplotlib is not installed.
    """
    figure, axes = _subplots(1, len(panels), figsize=(4.5 * len(panels), 4), squeeze=False)
    for axis, (title, lines) in zip(axes[0], panels.items(), strict=True):
        for label, points in lines.items():
            x, y = zip(*sorted(points), strict=True)
            axis.loglog(x, y, marker="o", linestyle="-" if len(x) > 1 else "none", label=label)
        every = [point for points in lines.values() for point in sorted(points)]
        if every:
            x0, y0 = min(every, key=lambda point: point[0])
            ends = (x0, max(x for x, _ in every))
            linear = [y0 * end / x0 for end in ends]
            axis.loglog(ends, linear, color="grey", linestyle=":", label="linear growth")
        axis.set(title=title, xlabel="ratings")
        axis.legend(fontsize="small")
    return _saved(figure, path)


def _subplots(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
    require_package("matplotlib", "matplotlib", "a picture")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # pyplot would keep global state and may look for a display.
    figure = Figure(figsize=kwargs.pop("figsize"), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(*args, **kwargs)


def _saved(figure: Any, path: str | Path) -> Path:
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, format="png", dpi=120)
    return target
