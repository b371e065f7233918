"""Which engine does a job: settings, the process and memory decide, and Spark is never started.

Modules and the environment are faked, so that these hold wherever the tests run.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pyarrow as pa
import pytest

from unlearn_spark import engine
from unlearn_spark.config import Settings, load_settings
from unlearn_spark.errors import SettingsError, UserError

MEMORY = 1 << 30


@pytest.fixture(autouse=True)
def plain_process(monkeypatch):
    """A process that knows nothing of Spark, on a machine that has it installed."""
    for name in engine.SPARK_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delitem(sys.modules, "pyspark.sql", raising=False)
    monkeypatch.setattr(engine, "find_spec", lambda name: name)


def settings(root="/tables", **sections):
    return Settings.model_validate(
        {"root": root, **sections, "execution": {"memory": "1g", **sections.get("execution", {})}}
    )


def asked(name):
    return settings(execution={"engine": name})


def without_spark(monkeypatch):
    monkeypatch.setattr(engine, "find_spec", lambda name: None)


def test_what_fits_is_embedded():
    assert engine.choose(settings()) == "embedded"
    assert engine.choose(settings(), MEMORY) == "embedded"
    assert engine.choose(settings(), MEMORY + 1) == "spark"


@pytest.mark.parametrize(
    "given",
    [
        {"root": None, "catalog": "main.shop"},
        {"spark": {"remote": "sc://host"}},
        {"spark": {"master": "local[2]"}},
        {"root": "dbfs:/tables"},
        {"root": "/Volumes/main/shop"},
    ],
    ids=lambda given: next(reversed(given)),
)
def test_settings_of_spark_mean_spark(given):
    assert engine.choose(settings(**given)) == "spark"


@pytest.mark.parametrize("name", sorted(engine.SPARK_VARIABLES))
def test_a_process_that_spark_started_means_spark(monkeypatch, name):
    monkeypatch.setenv(name, "1")
    assert engine.choose(settings()) == "spark"
    assert engine.choose(asked("embedded")) == "embedded"


def test_variables_that_say_nothing(monkeypatch):
    """A machine with Spark installed is no reason, nor is a shell that has sourced its scripts."""
    for name in ("SPARK_HOME", "SPARK_ENV_LOADED", "PYSPARK_PYTHON", "JAVA_HOME"):
        monkeypatch.setenv(name, "1")
    assert engine.choose(settings()) == "embedded"


@pytest.mark.parametrize("running", [True, False])
def test_a_session_that_runs_means_spark(monkeypatch, running):
    session = SimpleNamespace(getActiveSession=lambda: object() if running else None)
    monkeypatch.setitem(sys.modules, "pyspark", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "pyspark.sql", SimpleNamespace(SparkSession=session))
    assert engine.choose(settings()) == ("spark" if running else "embedded")


def test_what_is_asked_for_counts_more():
    assert engine.choose(asked("spark")) == "spark"
    master = settings(execution={"engine": "embedded"}, spark={"master": "local[2]"})
    assert engine.choose(master) == "embedded"
    with pytest.raises(SettingsError, match="catalog: the embedded engine finds tables by path"):
        engine.choose(settings(root=None, catalog="a.b", execution={"engine": "embedded"}))


def test_a_job_that_is_too_large_says_what_it_needs_and_what_there_is(monkeypatch):
    need = 5 * MEMORY // 2
    says = r"needs about 2\.5 GiB in one process, execution\.memory is 1\.0 GiB; raise it, or "
    with pytest.raises(SettingsError, match=says + "run with --engine spark"):
        engine.choose(asked("embedded"), need)
    without_spark(monkeypatch)
    with pytest.raises(UserError, match=says + r"install Spark: pip install 'unlearn-spark\[spark"):
        engine.choose(settings(), need)


def test_spark_that_is_not_installed_is_named(monkeypatch):
    without_spark(monkeypatch)
    assert engine.choose(settings()) == "embedded"
    for given in (asked("spark"), settings(spark={"master": "yarn"})):
        with pytest.raises(UserError, match="spark is asked for; install Spark: pip install"):
            engine.choose(given)
    monkeypatch.setattr(engine, "find_spec", lambda name: name == "pyspark" or None)
    with pytest.raises(UserError, match="install Spark"):  # without delta
        engine.choose(asked("spark"))


@pytest.mark.parametrize(
    ("text", "size"), [("1k", 1 << 10), ("300M", 300 << 20), ("2gb", 2 << 30), ("1T", 1 << 40)]
)
def test_sizes(text, size):
    assert engine.memory_limit(settings(execution={"memory": text})) == size


def test_half_of_the_machine_by_default(monkeypatch):
    pages = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 1000}
    monkeypatch.setattr(engine.os, "sysconf", pages.__getitem__)
    assert engine.memory_limit(load_settings(root="x")) == 4096 * 500


def test_needs_of_inputs(tmp_path):
    assert engine.need_of_input("s3://bucket/ratings") == 0
    assert engine.need_of_input(tmp_path / "absent") == 0
    (tmp_path / "a.parquet").write_bytes(b"x" * 1000)
    (tmp_path / "b.csv").write_bytes(b"x" * 1000)
    parquet = engine.need_of_input(tmp_path / "a.parquet")
    text = engine.need_of_input(str(tmp_path / "b.csv"))
    assert parquet > text > 1000
    assert engine.need_of_input(tmp_path) == parquet + text
    table = pa.table({"user_id": range(100)})
    assert engine.need_of_input(table) == 2 * table.nbytes
    assert engine.need_of_input(table.to_pandas()) >= 2 * table.nbytes
