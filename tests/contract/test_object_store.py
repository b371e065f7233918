"""The embedded engine on an S3-like server: every job, inputs from there, and writers that race."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request

import pyarrow as pa
import pytest
from pyarrow import csv

import unlearn_spark
from contract.nights import SETTINGS, as_table, data_set, requests
from unlearn_spark.errors import ConflictError, InputError
from unlearn_spark.recommender import silent
from unlearn_spark.tables.delta_rs import DeltaRsStore

pytest.importorskip("moto.server", reason="needs moto and flask")

# In a process of its own: delta-rs holds Python's lock while it waits for an answer.
SERVER = "import sys; from moto.server import main; main(['-H', '127.0.0.1', '-p', sys.argv[1]])"
PATIENCE = 60
BUCKET = "bucket"


@pytest.fixture(scope="module")
def server():
    """The address of an S3-like server with an empty bucket."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER, str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        end = time.monotonic() + PATIENCE
        while True:
            assert process.poll() is None
            assert time.monotonic() < end
            try:
                put(f"{address}/{BUCKET}")
                break
            except OSError:
                time.sleep(0.05)
        yield address
    finally:
        process.terminate()
        process.wait()


def put(address, data=b""):
    kind = {"Content-Type": "application/octet-stream"}
    request = urllib.request.Request(address, data, kind, method="PUT")
    with urllib.request.urlopen(request) as answer:
        answer.read()


@pytest.fixture
def store(server, monkeypatch):
    """`store(path, data)` puts a file there; credentials are in the environment."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    settings = {
        "AWS_ENDPOINT_URL": server,
        "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "us-east-1",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    return lambda path, data: put(f"{server}/{BUCKET}/{path}", data)


def shop_of(root):
    return unlearn_spark.open(root, "embedded", progress=silent, **SETTINGS)


def as_csv(rows):
    out = pa.BufferOutputStream()
    csv.write_csv(rows, out)
    return out.getvalue().to_pybytes()


def test_every_job_works_on_an_object_store(store):
    rows = data_set()
    table = as_table(rows).drop_columns("rated_at")
    store("inputs/a.csv", as_csv(table.slice(0, 400)))
    store("inputs/b.csv", as_csv(table.slice(400)))
    store("asked.csv", b"request_id,scope,user_id\nr1,user,u3\n")
    root = f"s3://{BUCKET}/tables"
    shop = shop_of(root)
    found = shop.ingest_ratings(f"s3://{BUCKET}/inputs/*.csv", "csv")
    assert (found.ratings_read, found.ratings_written) == (len(rows), len(rows))
    assert shop.train().converged
    assert shop.ingest_tombstones(f"s3://{BUCKET}/asked.csv").accepted == 1
    night = shop.unlearn()
    assert night.ratings_removed == sum(row[0] == "u3" for row in rows)
    audit = shop.audit()
    assert (audit.holds, audit.tombstoned_ratings_found) == (True, 0)
    lists = shop.recommend(2)
    assert lists.output == f"{root}/recommendations"
    assert DeltaRsStore(root).rows("recommendations") == lists.rows == 2 * lists.users
    assert shop.ingest_ratings(as_table([("new", "i1", 3.0, 1)])).ratings_written == 1
    assert shop.update().ratings_added == 1
    assert shop.rollback(2).model_version == 4
    with pytest.raises(InputError, match="no such file or folder"):
        shop.ingest_ratings(f"s3://{BUCKET}/inputs/missing.csv", "csv")


def test_of_two_writers_on_an_object_store_one_loses(store):
    root = f"s3://{BUCKET}/raced"
    shop_of(root).ingest_ratings(as_table(data_set(1)))
    shop_of(root).train()
    shop_of(root).ingest_tombstones(requests(("r1", "user", "u3")))
    start, outcomes = threading.Barrier(2), []

    def work():
        shop = shop_of(root)
        start.wait()
        try:
            outcomes.append(shop.unlearn())
        except ConflictError as error:
            outcomes.append(error)

    writers = [threading.Thread(target=work) for _ in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    lost = [each for each in outcomes if isinstance(each, ConflictError)]
    assert (len(outcomes), len(lost)) == (2, 1), outcomes
    assert "run this job again" in str(lost[0])
    assert shop_of(root).unlearn().requests == 0
    assert shop_of(root).model().model_version == 2
    assert shop_of(root).audit().holds


def test_an_object_store_that_does_not_answer_is_one_line(store, monkeypatch, run_in_process):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and nobody listens
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{taken.getsockname()[1]}")
        done = run_in_process("train", "--root", f"s3://{BUCKET}/tables", "--engine", "embedded")
    assert f"root s3://{BUCKET}/tables: its storage does not answer" in done.error
    assert "Connection refused" in done.error
    assert "\x1b" not in done.error
