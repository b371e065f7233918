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

from unlearn_spark import cli
from unlearn_spark.__main__ import JOBS
from unlearn_spark.config import Settings
from unlearn_spark.spark.session import get_spark
from unlearn_spark.tables.store import Store

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def spark() -> Iterator[Any]:
    """One session for the whole run: two cores, two shuffle partitions, UTC."""
    settings = Settings.model_validate(
        {
            "spark": {
                "master": "local[2]",
                "driver_memory": "3g",
                "conf": {"spark.sql.shuffle.partitions": 2},
            }
        }
    )
    session = get_spark(settings)
    yield session
    session.stop()


@pytest.fixture
def store(spark: Any, tmp_path: Path) -> Store:
    """Empty tables under a fresh folder."""
    return Store(spark, root=str(tmp_path / "tables"))


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


@pytest.fixture
def run_job(spark: Any) -> Callable[..., JobResult]:
    """`run_job("ingest_ratings", "--root", root, ...)`: that job in this process."""

    def run(name: str, *arguments: object) -> JobResult:
        command = JOBS[name]
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = cli._run(command, [str(argument) for argument in arguments])
        lines = out.getvalue().strip().splitlines()
        return JobResult(code, json.loads(lines[-1]) if lines else None, err.getvalue())

    return run
