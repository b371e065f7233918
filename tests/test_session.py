"""What a session is built with."""

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
