"""What a session is built with."""

import subprocess
import sys
from pathlib import Path

from unlearn_spark import session


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
    defaults = Path(session.__file__).parent.parent / "conf" / "spark-defaults.conf"
    lines = [line.split(maxsplit=1) for line in defaults.read_text().splitlines()]
    conf = {line[0]: line[1] for line in lines if line[0] != "#"}
    assert conf["spark.driver.extraJavaOptions"].split() == list(session.JAVA_OPTIONS)


def test_a_session_has_the_defaults_but_where_a_user_set_another():
    keys = ("parquet.enable.dictionary#factors.list.element", "spark.sql.session.timeZone")
    program = f"""
from unlearn_spark.config import Settings
from unlearn_spark.session import get_spark
settings = Settings(spark=dict(master="local[1]", conf=dict([({keys[1]!r}, "Asia/Tokyo")])))
spark = get_spark(settings)
print(*[spark.conf.get(key) for key in {keys!r}])
"""
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=True
    )
    assert run.stdout.split() == ["false", "Asia/Tokyo"]
    assert "Ignoring" not in run.stderr
