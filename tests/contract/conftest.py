"""Fixtures of the tests that hold for both engines.

Every test that takes `engine`, `shop` or `open_shop` runs embedded; one that is marked `on_both`
runs on Spark as well. `on_both(slow=True)` leaves Spark to `make test-all`; `on_both(first={...})`
leaves only the other parameters to it. A test that parametrizes `engine` itself says for each case
where it runs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import unlearn_spark
from contract.odd_inputs import Read
from unlearn_spark.recommender import Recommender, silent


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    named = [mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")]
    if "engine" not in metafunc.fixturenames or any("engine" in names for names in named):
        return
    engines = ["embedded"]
    if metafunc.definition.get_closest_marker("on_both"):
        engines.append(pytest.param("spark", marks=pytest.mark.spark))
    metafunc.parametrize("engine", engines)


CONTRACT = Path(__file__).resolve().parent

CASES_ON_SPARK = 8
"""Cases of one table that run on Spark by default; the others are among the slow tests."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        both = item.get_closest_marker("on_both")
        if both is None or item.get_closest_marker("spark") is None:
            continue
        given = item.callspec.params  # type: ignore[attr-defined]
        first = both.kwargs.get("first", {})
        if both.kwargs.get("slow") or any(given[name] != first[name] for name in first):
            item.add_marker("slow")
    tables: Counter[object] = Counter()
    for item in items:
        if CONTRACT not in item.path.parents or item.get_closest_marker("spark") is None:
            continue
        tables[item.function] += 1  # type: ignore[attr-defined]
        if tables[item.function] > CASES_ON_SPARK:  # type: ignore[attr-defined]
            item.add_marker("slow")


@pytest.fixture
def open_shop(
    engine: str, request: pytest.FixtureRequest, tmp_path: Path
) -> Callable[..., Recommender]:
    """`open_shop(root=None, rank=4, ...)`: the tables under a root, by default a fresh one, on the
    engine."""
    if engine == "spark":
        request.getfixturevalue("spark")

    def opened(root: str | Path | None = None, **settings: Any) -> Recommender:
        return unlearn_spark.open(root or tmp_path / "tables", engine, progress=silent, **settings)

    return opened


@pytest.fixture
def run_job(
    engine: str, request: pytest.FixtureRequest, run_in_process: Callable[..., Any]
) -> Callable[..., Any]:
    """`run_job("train", ...)`: that job in this process, on the engine."""
    if engine == "spark":
        request.getfixturevalue("spark")
    return lambda name, *arguments: run_in_process(name, *arguments, "--engine", engine)


@pytest.fixture
def shop(open_shop: Callable[..., Recommender]) -> Recommender:
    """Empty tables under a fresh root."""
    return open_shop()


@pytest.fixture
def read(engine: str, request: pytest.FixtureRequest) -> Callable[..., Read]:
    """`read(path, format)`: an input as the engine reads it, without any tables."""
    if engine == "spark":
        spark = request.getfixturevalue("spark")
        from unlearn_spark.spark.ingest import formats

        def on_spark(path: str, format: str) -> Read:
            with formats.explained(path, format):
                rows = formats.read_ratings(spark, path, format, {}).frame.collect()
            return Read(
                sorted((str(r.user_id), str(r.item_id)) for r in rows if r.problem is None),
                sorted(r.problem for r in rows if r.problem is not None),
            )

        return on_spark

    from unlearn_spark.embedded import ingest
    from unlearn_spark.embedded.formats import read_ratings

    def embedded(path: str, format: str) -> Read:
        found = ingest.read(read_ratings(path, format, {}), None, threads=2)
        rows = found.usable.select(["user_id", "item_id"]).to_pylist()
        return Read(
            sorted((str(row["user_id"]), str(row["item_id"])) for row in rows),
            sorted(found.problems.elements()),
        )

    return embedded
