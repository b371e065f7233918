"""How seconds and bytes grow with the stored ratings: a log-log picture of saved results.

    python benchmarks/growth.py --output docs/growth.png

Reads what `large.py` and `forgetting.py` have written under benchmarks/results/ and measures
nothing itself.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import click

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import common
from unlearn_spark.evaluation.plots import growth

Points = list[tuple[int, float]]


def of_training(raw: list[dict[str, Any]]) -> dict[str, Points]:
    """Seconds by ratings."""
    return {
        name: [(run["ratings"], run[name]) for run in raw if name in run]
        for name in ("preparation", "sweep", "predicted sweep")
    }


def of_nights(raw: list[dict[str, Any]], forget: int) -> tuple[dict[str, Points], ...]:
    """Seconds and MB read by ratings, of nights that forget so many users; medians of several."""
    found: dict[str, dict[int, list[tuple[float, float]]]] = {}
    for run in raw:
        if run["forget"] == forget:
            sizes = found.setdefault(f"{forget} users, {run['direct_rows']}", {})
            figures = (run["night"]["seconds"], run["bytes_read"] / 2**20)
            sizes.setdefault(run["ratings"], []).append(figures)
    return tuple(
        {
            label: [(size, statistics.median(run[figure] for run in sizes[size])) for size in sizes]
            for label, sizes in found.items()
        }
        for figure in range(2)
    )


def exponents(points: Points) -> list[float]:
    """From each size to the next: 0 does not grow, 1 grows as the ratings do."""
    return [
        math.log(after / before) / math.log(larger / smaller)
        for (smaller, before), (larger, after) in pairwise(sorted(points))
    ]


@click.command()
@click.option("--large", "large_file", default="large-64.json", show_default=True)
@click.option("--nights", default="forgetting-explicit-10000000-64.json", show_default=True)
@click.option("--forget", default=70, show_default=True)
@click.option("--output", default="docs/growth.png", show_default=True)
def main(large_file: str, nights: str, forget: int, output: str) -> None:
    """Draw the picture and print the exponents."""
    found = [
        json.loads((common.RESULTS / name).read_text())["raw"] for name in (large_file, nights)
    ]
    seconds, megabytes = of_nights(found[1], forget)
    panels = {
        "training, seconds": of_training(found[0]),
        "a night, seconds": seconds,
        "a night, MB read": megabytes,
    }
    rows = [
        [panel, label, ", ".join(f"{e:.2f}" for e in exponents(points))]
        for panel, lines in panels.items()
        for label, points in lines.items()
        if len(points) > 1
    ]
    common.table(["figure", "of", "exponent from size to size"], rows)
    print(growth(panels, output))


if __name__ == "__main__":
    main()
