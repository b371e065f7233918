"""The comparison as tables for a terminal."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from unlearn_spark.audit.figures import COMPARED, DELETED, UNSEEN, Comparison, K
from unlearn_spark.evaluation import plots


def show(found: Comparison, plot: str | None) -> None:
    """Print the tables to stderr, and draw the picture that `plot` names."""
    from rich.console import Console

    console = Console(file=sys.stderr)
    console.width = max(console.width, 100)  # rather wrapped lines than cut figures
    console.print(*tables_of(found.figures), sep="\n\n")
    if plot is not None:
        plots.comparison(found.figures, found.deleted_scores, plot)


def tables_of(figures: Mapping[str, Any]) -> list[Any]:
    """The figures of `compare` as two `rich.table.Table`s, one contestant a line.

    The first has quality and distances, the second traces of the deleted entries, with the AUCs'
    excess over the retrained models' mean in brackets.
    """
    contestants = dict(figures["models"])
    retrained = contestants.pop("retrained")
    held_out = [name for name in ("rmse", f"ndcg_at_{K}") if name in retrained["mean"]]
    yardstick = ", ".join(f"{kind} {_short(figures['seed_to_seed'][kind])}" for kind in COMPARED)
    quality = _table(
        f"Version {figures['unlearned']} against {len(retrained['runs'])} retrained: "
        f"{figures['ratings']['deleted']} ratings deleted since version {figures['before']}",
        ["objective", *held_out, *(f"distance\n{kind}" for kind in COMPARED)],
        f"distance: rms difference of predictions from the retrained mean\n"
        f"between two retrained models: {yardstick}",
    )
    traces = _table(
        "What the models still say of deleted entries",
        ["mean score", "scorable", "AUC\nscore attack", "AUC\nfitted attack"],
        f"in brackets: excess over the retrained mean\n{figures['pairs'][DELETED]} deleted pairs, "
        f"{figures['pairs'][UNSEEN]} of them matched with never-rated ones",
    )

    def add(name: str, one: Mapping[str, Any], digits: int) -> None:
        distances = [one["distance"][kind]["rms"] for kind in COMPARED]
        quality.add_row(
            name,
            _short(one["objective"], max(digits, 2 * digits - 1)),
            *[_short(value, digits) for value in (*(one[key] for key in held_out), *distances)],
        )
        cells = [one["deleted_score"]["mean"], one["deleted_scorable"]]
        row = [_short(value, digits) for value in cells]
        for attack in ("score", "fitted"):
            excess = one["auc"].get(f"{attack}_excess")
            text = _short(one["auc"][attack], digits)
            row.append(text if excess is None else f"{text} ({excess:+.4f})")
        traces.add_row(name, *row)

    for name, one in contestants.items():
        if name == "unlearned":
            quality.add_section()
            traces.add_section()
        add(name, one, 4)
    add("retrained", retrained["mean"], 4)
    if len(retrained["runs"]) > 1:
        add("  spread", retrained["spread"], 2)
    return [quality, traces]


def _table(title: str, headers: Sequence[str], caption: str) -> Any:
    from rich.table import Table

    table = Table(title=title, caption=caption)
    table.add_column("model", no_wrap=True)
    for header in headers:
        table.add_column(header, justify="right", no_wrap=True)
    return table


def _short(value: float | None, digits: int = 4) -> str:
    if value is None or not math.isfinite(value):
        return "-"
    if float(value).is_integer() and abs(value) < 1e6:
        return f"{int(value)}"
    return f"{value:.{digits}g}"
