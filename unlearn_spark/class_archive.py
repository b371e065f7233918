"""An archive of the classes that a job's JVM loads, with which later jobs start sooner.

    python -m unlearn_spark.class_archive DIR jobs/unlearn.py --root /data/recommender

runs the job as usual and leaves the archive in DIR; jobs that are given `spark.class_archive: DIR`
and start a JVM of their own take their classes from there. To find, parse and verify fifteen
thousand of them is a large part of what a night of few requests takes in a new JVM.

Java's own means (class data sharing, since Java 13). It refuses an archive of other jars or of
another Java by itself, and loads classes as ever. It also refuses one while a directory of files is
on the class path, and Spark's `conf` is: in its place Spark is given an empty one, and its
`spark-defaults.conf` by name.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import click

from unlearn_spark.errors import SettingsError

FILE, CONF, DEFAULTS = "classes.jsa", "conf", "spark-defaults.conf"


def java_options(file: Path, *, record: bool = False) -> str:
    """Options of a JVM that takes classes from an archive; with `record`, of one that leaves those
    that it loaded there when it ends."""
    # Java writes its warnings to stdout, where a job's JSON goes. Of an archive that does not fit
    # they tell; when one is made, they are a thousand lines of classes that cannot be in it.
    level, option = (
        ("error", "ArchiveClassesAtExit") if record else ("warning", "SharedArchiveFile")
    )
    return f"-Xlog:disable -Xlog:all={level}:stderr -XX:{option}={file}"


def launch(directory: Path, spark_home: Path) -> tuple[str, dict[str, str]]:
    """Options of the JVM and environment variables to start it with; neither, and a word on stderr,
    where there is no archive, for which no night should fail.

    Raises
    ------
    SettingsError
        As `launch_variables`.
    """
    file = directory.absolute() / FILE
    if not file.exists():
        print(
            f"unlearn-spark: spark.class_archive: {file.parent} has no {FILE}; "
            "make one with python -m unlearn_spark.class_archive",
            file=sys.stderr,
        )
        return "", {}
    return java_options(file), launch_variables(file.parent, spark_home)


def launch_variables(directory: Path, spark_home: Path) -> dict[str, str]:
    """Environment variables with which pyspark starts a JVM that has no directory of files on its
    class path, but the same settings.

    Raises
    ------
    SettingsError
        Spark is configured by more than a `spark-defaults.conf` of its own.
    """
    for name in ("SPARK_CONF_DIR", "PYSPARK_SUBMIT_ARGS", "HADOOP_CONF_DIR", "YARN_CONF_DIR"):
        if name in os.environ:
            raise SettingsError(f"spark.class_archive: {name} is set; unset one of the two")
    home = os.environ.get("SPARK_HOME")
    if home and Path(home).resolve() != spark_home.resolve():
        raise SettingsError(
            f"spark.class_archive: SPARK_HOME is {home} and not this Python's own pyspark; "
            "unset one of the two"
        )
    conf = spark_home / "conf"
    files = [file for file in conf.glob("*") if file.suffix != ".template"]
    if others := [file for file in files if file.name != DEFAULTS]:
        raise SettingsError(
            f"spark.class_archive: Spark would not see {others[0]}; remove one of the two"
        )
    empty = directory / CONF
    empty.mkdir(parents=True, exist_ok=True)
    variables = {"SPARK_CONF_DIR": str(empty)}
    if files:
        defaults = shlex.quote(str(files[0]))
        variables["PYSPARK_SUBMIT_ARGS"] = f"--properties-file {defaults} pyspark-shell"
    return variables


@contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Processes that are started inside have these variables, none of which is set outside."""
    os.environ.update(variables)
    try:
        yield
    finally:
        for name in variables:
            del os.environ[name]


def record(directory: Path, command: Sequence[str]) -> int:
    """Run a job (script and arguments) and leave an archive of its classes; returns its exit code.

    Raises
    ------
    SettingsError
        As `launch_variables`, or Java left no archive that it can read.
    """
    from unlearn_spark.session import ensure_java, jars_directory, prepare_workers

    ensure_java()
    variables = launch_variables(directory, jars_directory().parent)
    prepare_workers()
    part = directory.absolute() / f"{FILE}.part"
    option = f"spark.conf.spark.driver.extraJavaOptions={java_options(part, record=True)}"
    job = subprocess.Popen(
        [sys.executable, *command, "--set", "spark.class_archive=null", "--set", option],
        env={**os.environ, **variables},
        stderr=subprocess.PIPE,
    )
    assert job.stderr is not None
    # The JVM holds this pipe too, and writes the archive when the job has ended.
    for line in job.stderr:
        sys.stderr.buffer.write(line)
        sys.stderr.flush()
    code = job.wait()
    try:
        if code == 0:
            _check(part)
            part.replace(directory / FILE)
    finally:
        part.unlink(missing_ok=True)
    return code


def _check(file: Path) -> None:
    """Raise SettingsError unless Java starts with this archive: of a part of one, such as a full
    disk leaves, it dies."""
    from unlearn_spark.session import java_executable

    command = [str(java_executable()), *java_options(file).split(), "-version"]
    if not file.exists() or subprocess.run(command, capture_output=True, check=False).returncode:
        raise SettingsError(
            f"{file.parent}: Java left no usable archive; it needs room for 200 MB, a job that "
            "starts a JVM, and an archive of its own classes (`java -Xshare:dump` makes it)"
        )


@click.command(
    context_settings={"ignore_unknown_options": True, "help_option_names": ["-h", "--help"]}
)
@click.argument("directory", type=click.Path(file_okay=False, path_type=Path))
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def main(directory: Path, command: tuple[str, ...]) -> None:
    """Run a job (COMMAND: its script and arguments) and leave an archive of the classes that its
    JVM loaded in DIRECTORY, for jobs with `spark.class_archive: DIRECTORY`."""
    sys.exit(record(directory, command))


if __name__ == "__main__":
    from unlearn_spark.cli import run

    run(main)
