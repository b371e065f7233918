"""A process that runs embedded jobs in children, and lets each child kill itself at a commit.

It imports everything once; a child begins where that ended, so a job costs no start. Each line on
stdin is a JSON object with `when` (during or after), `commit` (a number from 1, over all tables; a
larger one than the job makes lets it end), `log` (a path) and `arguments` of the command line. The
answer is a line on stdout: the child's return code, negative for a signal.

A child that dies during a commit has handed over the rows, and writes no log entry.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import deltalake
import deltalake.table
import pyarrow as pa

import unlearn_spark.embedded.audit
import unlearn_spark.embedded.ingest
import unlearn_spark.embedded.night  # noqa: F401
from unlearn_spark import cli
from unlearn_spark.__main__ import JOBS
from unlearn_spark.config import AlsSettings
from unlearn_spark.embedded import training
from unlearn_spark.tables import delta_rs


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Killer:
    """Counts commits, one at a time, and kills this process at the chosen one."""

    def __init__(self, when: str, commit: int) -> None:
        self._when, self._commit, self._seen = when, commit, 0
        self._lock = threading.Lock()

    def around(self, commit: Callable[..., Any]) -> Callable[..., Any]:
        """The commit, counted."""

        def counted(*arguments: Any, **options: Any) -> Any:
            with self._lock:
                self._seen += 1
                chosen = self._seen == self._commit
                if chosen and self._when == "during":
                    arguments = tuple(map(_torn, arguments))
                    if not any(isinstance(each, pa.RecordBatchReader) for each in arguments):
                        die()
                done = commit(*arguments, **options)
                if chosen and self._when == "after":
                    die()
                return done

        return counted


def _torn(argument: Any) -> Any:
    """Rows that all arrive, and then the end; anything else as it is."""
    if isinstance(argument, pa.Table):
        argument = argument.to_reader()
    if not isinstance(argument, pa.RecordBatchReader):
        return argument

    def batches() -> Iterator[pa.RecordBatch]:
        yield from argument
        die()

    return pa.RecordBatchReader.from_batches(argument.schema, batches())


def run(order: dict[str, Any]) -> int:
    """Run a job that may be killed; return its exit code."""
    killer = Killer(order["when"], order["commit"])
    delta_rs.write_deltalake = killer.around(delta_rs.write_deltalake)
    for owner, name in (
        (deltalake.DeltaTable, "create"),
        (deltalake.DeltaTable, "restore"),
        (deltalake.table.TableMerger, "execute"),
    ):
        setattr(owner, name, killer.around(getattr(owner, name)))
    job, *arguments = order["arguments"]
    return cli._run(JOBS[job], arguments)


def warm_up() -> None:
    """Import and compile what jobs need. Starts no thread and opens no table, for a child inherits
    neither."""
    with contextlib.suppress(ImportError):  # PyArrow imports it where it is there
        importlib.import_module("pandas")
    rows = pa.table({"user_id": ["a", "b"], "item_id": ["c", "c"], "rating": [1.0, 2.0]})
    rows = rows.cast(rows.schema.set(2, pa.field("rating", pa.float32())))
    training.fit(iter(rows.to_batches()), AlsSettings(rank=4, max_sweeps=2), threads=1)


def main() -> None:
    warm_up()
    for line in sys.stdin:
        order = json.loads(line)
        child = os.fork()
        if child == 0:
            code = 1
            try:
                log = os.open(order["log"], os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
                os.dup2(log, 1)
                os.dup2(log, 2)
                code = run(order)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
