"""Installs Delta's jars and our defaults where this interpreter's Spark finds them."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from unlearn_spark.config import CHECKOUT
from unlearn_spark.spark.java import ensure_java, jars_directory


def install_jars() -> list[str]:
    """Copy Delta's jars into this interpreter's pyspark, so that plain `spark-submit` has them.

    Ivy resolves them, as in delta-spark's own helper. Returns the names of the copied jars.
    """
    target = jars_directory()
    if any(target.glob("delta-spark*.jar")):
        return []
    from delta import configure_spark_with_delta_pip
    from pyspark.sql import SparkSession

    ensure_java()
    builder = SparkSession.builder.master("local[1]").config("spark.ui.enabled", "false")
    session = configure_spark_with_delta_pip(builder).getOrCreate()
    resolved = [
        Path(uri.removeprefix("file://"))
        for uri in session.sparkContext.getConf().get("spark.jars", "").split(",")
        if uri
    ]
    session.stop()
    copied = []
    for jar in resolved:
        # Ivy names its copies organisation_artifact-version.jar. Only these two organisations are
        # Delta's own; of the other libraries Spark ships its own versions.
        organisation, _, artifact = jar.name.partition("_")
        if organisation in ("io.delta", "io.unitycatalog"):
            shutil.copyfile(jar, target / artifact)
            copied.append(artifact)
    return copied


def link_defaults() -> None:
    """Let plain `spark-submit` of this interpreter's pyspark find conf/spark-defaults.conf."""
    if CHECKOUT:
        defaults = CHECKOUT / "conf" / "spark-defaults.conf"
        link = jars_directory().parent / "conf" / "spark-defaults.conf"
        link.parent.mkdir(exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(defaults)


if __name__ == "__main__":
    from unlearn_spark.spark.session import prepare_workers
    from unlearn_spark.spark.worker_daemon import warm_up

    names = install_jars()
    link_defaults()
    print("Delta jars:", ", ".join(names) if names else "already there", file=sys.stderr)
    print("compiling the kernels, once", file=sys.stderr)
    prepare_workers()
    warm_up()
