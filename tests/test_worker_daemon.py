"""What the workers' daemon leaves on the module path."""

import zipfile
from pathlib import Path

import pyspark

from unlearn_spark.worker_daemon import without_archives

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
