"""Fixtures shared by all tests: one small session, a fresh store each, and jobs run in-process."""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import small_session

from unlearn_spark import cli
from unlearn_spark.__main__ import JOBS
from unlearn_spark.config import Settings
from unlearn_spark.spark.session import get_spark
from unlearn_spark.tables.delta_spark import SparkStore

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.hookimpl(tryfirst=True)  # before tests are deselected by their marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test that takes the session, so that `-m "not spark"` needs no Java."""
    for item in items:
        if "spark" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.spark)


@pytest.fixture(scope="session")
def spark() -> Iterator[Any]:
    """One session for the whole run: two cores, two shuffle partitions, UTC."""
    settings = Settings.model_validate(
        {"spark": {"master": "local[2]", "driver_memory": "3g", "conf": small_session.CONF}}
    )
    session = get_spark(settings)
    yield session
    session.stop()


@pytest.fixture
def store(spark: Any, tmp_path: Path) -> SparkStore:
    """Empty tables under a fresh folder."""
    return SparkStore(spark, root=str(tmp_path / "tables"))


@pytest.fixture(scope="session")
def ml_small() -> Path:
    """MovieLens latest-small `ratings.csv`: 100,004 ratings, 671 users, 9,066 items.

    Looked for in the folder that UNLEARN_DATA names, else beside the repository.
    """
    folder = Path(os.environ.get("UNLEARN_DATA") or REPOSITORY.parent / "shared" / "data")
    path = folder / "ml-latest-small" / "ratings.csv"
    if not path.exists():
        pytest.skip(f"no {path}: set UNLEARN_DATA to the folder that holds ml-latest-small/")
    return path


@dataclass(frozen=True)
class JobResult:
    """What a job left: its exit code, its last line on stdout (None: no output), its stderr."""

    exit_code: int
    json: dict[str, Any] | None
    stderr: str

    @property
    def error(self) -> str:
        """The one line that a job ends with on a user's mistake."""
        assert self.exit_code == 2, f"exit code {self.exit_code}\n{self.stderr}"
        line = self.stderr.strip().splitlines()[-1]
        assert line.startswith("error: ")
        assert "Traceback" not in self.stderr
        return line


@pytest.fixture(scope="session")
def run_in_process() -> Callable[..., JobResult]:
    """`run_in_process("train", "--root", root, ...)`: that job in this process."""

    def run(name: str, *arguments: object) -> JobResult:
        words = [str(argument) for argument in arguments]
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = cli._run(JOBS[name], words)
        lines = out.getvalue().strip().splitlines()
        return JobResult(code, json.loads(lines[-1]) if lines else None, err.getvalue())

    return run


@pytest.fixture
def run_job(spark: Any, run_in_process: Callable[..., JobResult]) -> Callable[..., JobResult]:
    """`run_job("train", ...)`: that job in this process, on Spark unless `--engine` says
    otherwise."""

    def run(name: str, *arguments: object) -> JobResult:
        if "--engine" not in arguments:
            arguments = (*arguments, "--engine", "spark")
        return run_in_process(name, *arguments)

    return run
