"""What the workers' daemon leaves on the module path, and what workers load."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pyspark

from unlearn_spark.spark.worker_daemon import without_archives

HOME = Path(pyspark.__file__).parent


def test_only_the_archives_of_an_importable_pyspark_leave_the_path(tmp_path):
    mine = tmp_path / "mine.zip"
    with zipfile.ZipFile(mine, "w") as archive:
        archive.writestr("module.py", "")
    carried = [*HOME.glob("python/lib/*.zip"), *HOME.glob("jars/spark-core*.jar")]
    assert len(carried) >= 3
    path = [str(tmp_path), *map(str, carried), str(mine), str(HOME.parent)]
    assert without_archives(path) == [str(tmp_path), str(mine), str(HOME.parent)]


def test_where_the_archives_are_all_there_is_they_stay(tmp_path):
    path = [str(tmp_path), *map(str, HOME.glob("python/lib/*.zip"))]
    assert without_archives(path) == path


def test_workers_load_no_settings():
    """On a cluster, where they are not forked from our daemon, each would wait for it."""
    program = (
        "import sys, unlearn_spark.spark.training.half_sweep; print('pydantic' in sys.modules)"
    )
    command = [sys.executable, "-c", program]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False"]
