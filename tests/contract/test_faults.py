"""What the machine, other programs and other versions of ours do to the embedded engine's tables.

Each fault is one line that names the table or the setting and the mend; nothing becomes visible,
and running again once it is mended does the work.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
from deltalake import DeltaTable, Field, write_deltalake
from deltalake.schema import PrimitiveType

import unlearn_spark
from contract.nights import SETTINGS, as_table, data_set, end_of, newest_versions, requests
from unlearn_spark import engine as engines
from unlearn_spark.config import load_settings
from unlearn_spark.errors import InputError, SettingsError
from unlearn_spark.recommender import silent
from unlearn_spark.tables import models
from unlearn_spark.tables.delta_rs import DeltaRsStore

REPOSITORY = Path(__file__).resolve().parent.parent.parent
LATER = 1_710_000_000


def shop_of(root, **settings):
    return unlearn_spark.open(
        root, "embedded", progress=silent, execution={"threads": 1}, **{**SETTINGS, **settings}
    )


@pytest.fixture(scope="module")
def ready(tmp_path_factory):
    """A root with a model, a pending request and a new rating."""
    root = tmp_path_factory.mktemp("faults") / "ready"
    shop = shop_of(root)
    shop.ingest_ratings(as_table(data_set()))
    shop.train()
    shop.ingest_tombstones(requests(("r", "user", "u3")))
    shop.ingest_ratings(as_table([("new-user", "i1", 4.0, LATER)]))
    return root


@pytest.fixture(scope="module")
def done(ready):
    """What is in the tables after the night."""
    root = ready.parent / "done"
    shutil.copytree(ready, root)
    shop_of(root).update()
    return end_of(root)


@pytest.fixture
def root(ready, tmp_path):
    shutil.copytree(ready, tmp_path / "tables")
    return tmp_path / "tables"


@contextlib.contextmanager
def disk(folder, megabytes):
    """A small file system."""
    folder.mkdir()
    options = ["-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
    mounted = (
        shutil.which("mount")
        and not subprocess.run(["mount", *options], capture_output=True, check=False).returncode
    )
    if not mounted:
        pytest.skip("may not mount a small file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def unchanged(root, before):
    """Readers see what was there; ratings that are to be forgotten may be gone."""
    found = end_of(root)
    assert before["pairs"] - found["pairs"] <= {pair for pair in before["pairs"] if pair[0] == "u3"}
    assert {**found, "pairs": None} == {**before, "pairs": None}


# --- disks ----------------------------------------------------------------------------------------


def test_a_disk_that_fills_up_during_a_night(ready, done, tmp_path, run_in_process):
    before = end_of(ready)
    failed = 0
    with disk(tmp_path / "disk", 2) as small:
        for left in range(4, 80, 12):
            root, filler = small / f"tables-{left}", small / "filler"
            shutil.copytree(ready, root)
            free = os.statvfs(small)
            filler.write_bytes(bytes(free.f_bavail * free.f_bsize - left * 1024))
            job = run_in_process("update", *options(root))
            filler.unlink()
            if job.exit_code:
                failed += 1
                assert job.error.startswith("error: table ")
                assert f"the disk of {root}/" in job.error
                assert "make room and run this job again" in job.error
                unchanged(root, before)
                shop_of(root).update()
            assert end_of(root) == done
            shutil.rmtree(root)
    assert failed > 3


def options(root):
    words = ["--root", root, "--engine", "embedded", "--set", "execution.threads=1"]
    for name, value in SETTINGS.items():
        words += ["--set", f"{'unlearn' if name == 'tau' else 'als'}.{name}={value}"]
    return words


def test_files_that_may_not_grow(root, ready, done):
    """As where mounting is not allowed: the operating system refuses to lengthen a file."""
    limit = 3000
    job = subprocess.run(
        [sys.executable, "-m", "unlearn_spark", "update", *map(str, options(root))],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        check=False,
    )
    assert job.returncode == 2, job.stderr
    assert "make room and run this job again" in job.stderr.splitlines()[-1]
    assert "Traceback" not in job.stderr
    unchanged(root, end_of(ready))
    shop_of(root).update()
    assert end_of(root) == done


def test_a_root_that_may_not_be_written(ready, tmp_path, run_in_process):
    with disk(tmp_path / "disk", 4) as small:
        root = small / "tables"
        shutil.copytree(ready, root)
        subprocess.run(["mount", "-o", "remount,ro", str(small)], check=True)
        job = run_in_process("update", *options(root))
        assert f"--root {root}: {root} is not writable; name another" in job.error
        # It may become so after the check.
        with pytest.raises(InputError, match=r"table ratings: .* is not writable"):
            DeltaRsStore(str(root)).append("ratings", DeltaRsStore(str(root)).read("ratings"))
        assert end_of(root) == end_of(ready)


def test_a_root_that_another_program_holds_open(root, ready, done):
    """It goes on reading what it has opened; the job does not wait for it."""
    store = DeltaRsStore(str(root))
    model = models.published(store)
    version = model.ratings_version
    with contextlib.ExitStack() as held:
        for path in root.rglob("*.*"):
            if path.is_file():
                held.enter_context(path.open("rb"))
        files = [store.parquet("ratings", file) for file in store.files("ratings", version)]
        shop_of(root).update()
        assert end_of(root) == done
        rows = pa.concat_tables([file.read() for file in files])
        assert rows.num_rows == len(data_set())
        users = store.read("user_factors", model.user_factors_version, ["id"])["id"].to_pylist()
        assert "u3" in users


# --- features and versions of tables --------------------------------------------------------------


def commit(root, table, *actions):
    log = root / table / "_delta_log"
    number = len(list(log.glob("*.json")))
    info = {"commitInfo": {"timestamp": 1, "operation": "UPGRADE PROTOCOL"}}
    lines = [json.dumps(action) for action in (*actions, info)]
    (log / f"{number:020d}.json").write_text("\n".join(lines) + "\n")


def protocol(reader=("deletionVectors",), writer=("deletionVectors",)):
    return {
        "protocol": {
            "minReaderVersion": 3,
            "minWriterVersion": 7,
            "readerFeatures": list(reader),
            "writerFeatures": list({*reader, *writer}),
        }
    }


@pytest.mark.parametrize("table", ["ratings", "user_factors", "ledger", "models"])
@pytest.mark.parametrize("feature", ["rowTracking", "madeUp"])
def test_a_table_that_delta_rs_cannot_write(root, ready, run_in_process, table, feature):
    commit(root, table, protocol(writer=["deletionVectors", feature]))
    job = run_in_process("update", *options(root))
    assert f"table {table} has Delta features" in job.error
    assert feature.lower() in job.error.lower()
    assert job.error.endswith("run with --engine spark")
    unchanged(root, end_of(ready))
    assert shop_of(root).audit().holds  # which reads it


@pytest.mark.parametrize(
    ("action", "named"),
    [
        (protocol(reader=["deletionVectors", "madeUp"]), "madeUp"),
        ({"protocol": {"minReaderVersion": 4, "minWriterVersion": 8}}, "minimum reader version 4"),
    ],
)
def test_a_table_that_delta_rs_cannot_read(root, run_in_process, action, named):
    commit(root, "ratings", action)
    job = run_in_process("update", *options(root))
    assert "table ratings has Delta features" in job.error
    assert named in job.error


def rewritten(root, change):
    """Change the rows of the models table."""
    table = DeltaTable(str(root / "models"))
    rows = [change(row) for row in table.to_pyarrow_table().to_pylist()]
    schema = pa.Table.from_pylist(rows).schema
    for name in models.SPEC.schema.names:
        place = schema.get_field_index(name)
        schema = schema.set(place, models.SPEC.schema.field(name))
    written = pa.Table.from_pylist(rows, schema=schema)
    write_deltalake(table, written, mode="overwrite", schema_mode="overwrite")


def with_settings(change):
    def changed(row):
        settings = json.loads(row["settings"])
        change(settings)
        return {**row, "settings": json.dumps(settings)}

    return changed


NEWER = {
    "a setting": (with_settings(lambda found: found["als"].update(momentum=0.9)), "als.momentum"),
    "a value": (with_settings(lambda found: found["als"].update(dtype="bfloat16")), "als.dtype"),
    "a section": (with_settings(lambda found: found.update(context={"rank": 2})), "context"),
    "a column": (lambda row: {**row, "context_factors_version": 3}, "context_factors_version"),
}


@pytest.mark.parametrize("what", sorted(NEWER))
def test_a_model_that_a_newer_version_wrote(root, run_in_process, what):
    change, named = NEWER[what]
    rewritten(root, change)
    before = newest_versions(root)
    for name, *more in (
        ("update",),
        ("train",),
        ("audit",),
        ("recommend", "--top", "2"),
        ("rollback", "--to", "1"),
    ):
        job = run_in_process(name, *options(root), *more)
        assert "table models: model version 1 was written by a newer version" in job.error
        assert named in job.error
        assert job.error.endswith("upgrade unlearn-spark")
    assert newest_versions(root) == before


def test_unknown_columns_do_not_matter_to_readers(root):
    """A newer version may have added them; readers of what both know go on, and writers stop."""
    for path in root.glob("*/_delta_log"):
        handle = DeltaTable(str(path.parent))
        handle.alter.add_columns([Field("added", PrimitiveType("string"), nullable=True)])
    shop = shop_of(root)
    before = end_of(root)
    assert shop.recommend(2).rows > 0
    assert shop.audit().holds
    for job in (
        shop.update,
        shop.train,
        lambda: shop.ingest_ratings(as_table([("new", "i1", 3.0, 1)])),
        lambda: shop.ingest_tombstones(requests(("late", "user", "u9"))),
    ):
        with pytest.raises(InputError, match=r"newer version .*column added .*upgrade"):
            job()
    assert end_of(root) == before


# --- memory ---------------------------------------------------------------------------------------

MANY = 30_000
"""Ratings whose sorting needs more than 1 MiB."""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    root = tmp_path_factory.mktemp("memory") / "tables"
    shop_of(root).ingest_ratings(as_table(data_set(1, users=2000, items=100, n=MANY)))
    return root


def test_memory_that_does_not_suffice_is_refused_before_work_starts(
    large, tmp_path, run_in_process
):
    before = newest_versions(large)
    words = ["--root", large, "--engine", "embedded", "--set", "execution.memory=1m"]
    job = run_in_process("train", *words)
    assert "this job needs about 1.4 MiB in one process" in job.error
    assert "execution.memory is 1.0 MiB" in job.error
    assert job.error.endswith("raise it, or run with --engine spark")
    assert newest_versions(large) == before
    text = tmp_path / "many.csv"
    text.write_text("user_id,item_id,rating\n" + "user,item,3\n" * 50_000)
    words[1] = tmp_path / "new"
    job = run_in_process("ingest_ratings", *words, "--input", text, "--format", "csv")
    assert "this job needs about" in job.error
    assert not (tmp_path / "new").exists()


def test_what_is_too_large_goes_to_spark(large, monkeypatch):
    # Whatever session other tests have left in this process.
    monkeypatch.setattr(engines, "_is_spark_meant", lambda settings: False)
    settings = load_settings(root=str(large), overrides=["execution.memory=1m"])
    need = engines.need_of_tables(DeltaRsStore(str(large)))
    assert engines.choose(settings, need) == "spark"
    assert engines.choose(settings, 1 << 19) == "embedded"


WITHOUT_SPARK = """
import sys
from importlib.abc import MetaPathFinder
class Hidden(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("pyspark", "delta"):
            raise ModuleNotFoundError(name, name=name)
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: (
    None if name.partition(".")[0] in ("pyspark", "delta") else found(name, *more)
)
sys.meta_path.insert(0, Hidden())
from unlearn_spark.__main__ import main
main()
"""


def test_what_is_too_large_ends_with_one_line_where_spark_is_not_installed(large):
    words = ["train", "--root", str(large), "--set", "execution.memory=1m"]
    job = subprocess.run(
        [sys.executable, "-c", WITHOUT_SPARK, *words],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        check=False,
    )
    assert job.returncode == 2, job.stderr
    (line,) = job.stderr.strip().splitlines()
    assert "this job needs about 1.4 MiB in one process" in line
    assert "pip install 'unlearn-spark[spark]'" in line


def test_memory_without_a_unit_is_refused():
    with pytest.raises(SettingsError, match=r"execution\.memory"):
        load_settings(root="x", overrides=["execution.memory=lots"])
