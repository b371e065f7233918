"""An archive of Java's classes: made by a job, used by the next, and refused where it would hide a
user's own configuration of Spark."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from unlearn_spark import class_archive
from unlearn_spark.errors import SettingsError

REPOSITORY = Path(__file__).resolve().parent.parent
THEIRS = ("SPARK_CONF_DIR", "PYSPARK_SUBMIT_ARGS", "HADOOP_CONF_DIR", "YARN_CONF_DIR", "SPARK_HOME")


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch):
    for name in THEIRS:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def spark_home(tmp_path):
    (tmp_path / "spark" / "conf").mkdir(parents=True)
    return tmp_path / "spark"


def test_spark_is_given_an_empty_directory_and_its_defaults_by_name(spark_home, tmp_path):
    defaults = spark_home / "conf" / "spark-defaults.conf"
    defaults.write_text("spark.executor.memory 3g\n")
    (spark_home / "conf" / "workers.template").touch()
    variables = class_archive.launch_variables(tmp_path / "archive", spark_home)
    assert list(Path(variables["SPARK_CONF_DIR"]).iterdir()) == []
    assert variables["PYSPARK_SUBMIT_ARGS"] == f"--properties-file {defaults} pyspark-shell"


def test_without_defaults_spark_is_given_none(spark_home, tmp_path):
    variables = class_archive.launch_variables(tmp_path / "archive", spark_home)
    assert list(variables) == ["SPARK_CONF_DIR"]


@pytest.mark.parametrize("name", THEIRS)
def test_a_configuration_of_the_environment_is_not_passed_over(
    name, spark_home, tmp_path, monkeypatch
):
    monkeypatch.setenv(name, str(tmp_path))
    with pytest.raises(SettingsError, match=f"spark.class_archive: {name} is .*; unset one"):
        class_archive.launch_variables(tmp_path / "archive", spark_home)


def test_a_configuration_in_a_file_is_not_passed_over(spark_home, tmp_path):
    (spark_home / "conf" / "hive-site.xml").touch()
    with pytest.raises(SettingsError, match=r"would not see .*hive-site"):
        class_archive.launch_variables(tmp_path / "archive", spark_home)


def test_the_environment_is_put_back():
    with class_archive.environment({"SPARK_CONF_DIR": "/nowhere"}):
        assert os.environ["SPARK_CONF_DIR"] == "/nowhere"
    assert "SPARK_CONF_DIR" not in os.environ


def test_a_missing_archive_is_told_and_fails_nothing(tmp_path):
    program = f"""
from unlearn_spark.config import Settings
from unlearn_spark.session import get_spark
get_spark(Settings(spark=dict(master="local[1]", class_archive={str(tmp_path)!r}))).stop()
"""
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=True
    )
    assert f"{tmp_path} has no classes.jsa; make one with python -m" in run.stderr


@pytest.mark.slow
def test_a_job_leaves_an_archive_and_the_next_takes_its_classes_from_there(tmp_path):
    ratings, archive, log = tmp_path / "r.csv", tmp_path / "archive", tmp_path / "classes.log"
    ratings.write_text("user_id,item_id,rating\n1,1,3\n2,1,4\n")

    def job(root):
        script = str(REPOSITORY / "jobs" / "ingest_ratings.py")
        arguments = ["--root", str(tmp_path / root), "--input", str(ratings), "--format", "csv"]
        return [script, *arguments, "--set", "spark.master=local[2]"]

    def run(*command, code=0):
        done = subprocess.run(
            [sys.executable, *command],
            cwd=tmp_path,  # where a dying Java leaves its report
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert done.returncode == code, done.stderr
        if code == 0:
            assert json.loads(done.stdout.splitlines()[-1])["ratings_written"] == 2
        return done

    run("-m", "unlearn_spark.class_archive", str(archive), *job("first"))
    file = archive / class_archive.FILE
    assert sorted(path.name for path in archive.iterdir()) == ["classes.jsa", "conf"]
    with_it = ("--set", f"spark.class_archive={archive}", "--set")
    logged = f"spark.conf.spark.driver.extraJavaOptions=-Xlog:class+load:file={log}"
    run(*job("second"), *with_it, logged)
    loaded = [line for line in log.read_text().splitlines() if "org.apache.spark.sql" in line]
    assert sum("shared objects file (top)" in line for line in loaded) > len(loaded) / 2
    # An archive of other jars or another Java: Java loads classes as ever.
    whole = file.read_bytes()
    file.unlink()
    file.write_bytes(bytes(len(whole)))
    run(*job("third"), *with_it, "spark.driver_memory=1g")
    # A part of one: Java dies of it.
    file.write_bytes(whole[: len(whole) // 2])
    broken = run(*job("fourth"), *with_it, "spark.driver_memory=1g", code=2)
    assert "Spark did not start" in broken.stderr
    assert "without spark.class_archive it may: then make that anew" in broken.stderr


def test_a_job_that_starts_no_jvm_leaves_no_archive(tmp_path):
    script = tmp_path / "job.py"
    script.write_text("")
    with pytest.raises(SettingsError, match="Java left no usable archive"):
        class_archive.record(tmp_path / "archive", [str(script)])
