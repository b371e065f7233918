"""What a session is built with."""

import os
import subprocess
import sys
from pathlib import Path

import pyspark
import pytest

from unlearn_spark.config import CHECKOUT
from unlearn_spark.errors import UserError
from unlearn_spark.spark import session


def test_a_users_options_of_the_jvm_come_after_the_products_own():
    ours = {"spark.driver.extraJavaOptions": "-Xss16m", "spark.ui.enabled": "false"}
    further = {
        "spark.driver.extraJavaOptions": "-XX:+UseParallelGC",
        "spark.executor.extraJavaOptions": "-Xss4m",
        "spark.ui.enabled": "true",
        "spark.sql.shuffle.partitions": 8,
    }
    assert session.with_further(ours, further) == {
        "spark.driver.extraJavaOptions": "-Xss16m -XX:+UseParallelGC",
        "spark.executor.extraJavaOptions": "-Xss4m",
        "spark.ui.enabled": "true",
        "spark.sql.shuffle.partitions": "8",
    }


def test_spark_submit_starts_its_jvm_with_the_same_options():
    defaults = CHECKOUT / "conf" / "spark-defaults.conf"
    lines = [line.split(maxsplit=1) for line in defaults.read_text().splitlines()]
    conf = {line[0]: line[1] for line in lines if line[0] != "#"}
    assert conf["spark.driver.extraJavaOptions"].split() == list(session.JAVA_OPTIONS)


def test_a_session_has_the_defaults_but_where_a_user_set_another(spark):
    assert spark.conf.get("parquet.enable.dictionary#factors.list.element") == "false"
    assert spark.conf.get("spark.sql.session.timeZone") == "UTC"
    assert spark.conf.get("spark.sql.shuffle.partitions") == "2"  # set by the fixture


@pytest.mark.spark
def test_a_session_that_runs_gets_a_users_settings_and_says_which_it_cannot_change():
    program = """
from pyspark.sql import SparkSession
from unlearn_spark.config import Settings
from unlearn_spark.spark.session import get_spark
running = SparkSession.builder.master("local[1]").config("spark.ui.enabled", "false").getOrCreate()
conf = {
    "spark.sql.shuffle.partitions": "7",
    "spark.sql.session.timeZone": "Asia/Tokyo",
    "spark.ui.enabled": False,
    "spark.executor.memory": "3g",
}
spark = get_spark(Settings(spark=dict(conf=conf)))
print(spark.conf.get("spark.sql.shuffle.partitions"), spark.conf.get("spark.sql.session.timeZone"))
"""
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=True
    )
    assert run.stdout.split() == ["7", "Asia/Tokyo"]
    told = [line for line in run.stderr.splitlines() if line.startswith("unlearn-spark:")]
    assert len(told) == 1
    assert "spark.executor.memory of spark.conf cannot be changed" in told[0]


@pytest.mark.spark
def test_spark_submit_means_spark(tmp_path):
    """A driver that spark-submit starts; neither it nor the choice needs a session."""
    driver = tmp_path / "driver.py"
    driver.write_text(
        f"""import sys
sys.path.insert(0, {str(CHECKOUT)!r})
from unlearn_spark import engine
from unlearn_spark.config import Settings
print("chosen:", engine.choose(Settings(root="tables")), "pyspark" in sys.modules)
"""
    )
    submit = Path(pyspark.__file__).parent / "bin" / "spark-submit"
    run = subprocess.run(
        [submit, "--master", "local[1]", driver],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        env={**os.environ, "PYSPARK_PYTHON": sys.executable},
    )
    assert "chosen: spark False" in run.stdout


class Locked:
    """A session of a cluster that lets nobody change anything."""

    def __init__(self, **values):
        self.values = values
        self.conf = self

    def set(self, key, value):
        raise PermissionError(key)

    def get(self, key, default=None):
        return self.values.get(key, default)


def test_a_session_in_another_time_zone_that_cannot_be_changed_is_refused():
    zone = "spark.sql.session.timeZone"
    wanted = {zone: "UTC", "spark.sql.execution.arrow.maxRecordsPerBatch": "200000"}
    session._set_up(Locked(**{zone: "UTC"}), wanted)
    with pytest.raises(UserError, match=f"forbids to change {zone}, which is Asia/Tokyo; set it"):
        session._set_up(Locked(**{zone: "Asia/Tokyo"}), wanted)
