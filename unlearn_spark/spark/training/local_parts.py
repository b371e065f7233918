"""Rating parts in files beside the workers, so that the ratings reach Python once in a training.

Taking a part out of Spark's cache, through Arrow and a pipe into a worker, is about a tenth of a
sweep, and a training would do it in every sweep. So `keep` leaves
each part, sorted, in a memory-mapped file, which every worker of the machine shares. Sweeps send
factors alone, to where Spark has the part in its cache, which is where the file is; a part that is
not there after all (an executor was lost, a disk was full) is reported as missing, and the driver
sends it to the workers, which keep it again.

The files lie in the directory that Spark makes for an application's files on every node, and
removes at its end, as it does with its own shuffle files. `drop` removes them earlier.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
from pyspark import SparkFiles

from unlearn_spark.core.blocks import SIDES, RatingBlock
from unlearn_spark.core.objective import Objective, floor_of, target_magnitudes
from unlearn_spark.spark.arrow import arrays_of, binary_table
from unlearn_spark.spark.training.messages import part_of

if TYPE_CHECKING:
    from pyspark.sql import DataFrame


@dataclass(frozen=True)
class PartReader:
    """How a half-sweep gets the ratings of its parts; small and picklable.

    Attributes
    ----------
    token
        Names the training; None: parts are sent and not kept.
    side
        "user" or "item".
    sent
        The ratings come with the factors, and are kept; else they are looked for where `keep` or an
        earlier sweep has left them.
    """

    token: str | None = None
    side: str = ""
    sent: bool = True

    def read(self, pieces: pa.Table) -> tuple[int, RatingBlock | None]:
        """A part's number and its ratings, None where they are missing; runs in a worker.

        Parameters
        ----------
        pieces
            The part's rows (`PART_SCHEMA`); if it was not sent, key and part of them.
        """
        if self.sent:
            number, block = part_of(pieces)
            self.keep(number, block)
            return number, block
        number = pieces["part"][0].as_py()
        try:
            with pa.memory_map(str(self._path(number))) as source:
                return part_of(pa.ipc.open_file(source).read_all())
        except OSError:  # above all FileNotFoundError
            return number, None

    def keep(self, number: int, block: RatingBlock) -> None:
        """Leave a part where `read` looks for it; runs in a worker."""
        if self.token is None:
            return
        path = self._path(number)
        mine = path.with_suffix(f".{os.getpid()}")
        table = binary_table([{"part": number, **block.to_binary()}])
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with pa.OSFile(str(mine), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
                writer.write_table(table)
            mine.replace(path)  # whole or not at all: another attempt may write the same part
        except OSError:  # the part will be missing, which the driver hears and answers
            with suppress(OSError):
                mine.unlink()

    def _path(self, number: int) -> Path:
        assert self.token is not None
        return _directory(self.token) / f"{self.side}-{number}.arrow"


def _directory(token: str) -> Path:
    return Path(SparkFiles.getRootDirectory()) / f"unlearn-spark-{token}"


def keep(entries: DataFrame, token: str | None, objective: Objective) -> dict[str, float]:
    """Leave the parts of both sides on the machines on which Spark has them in its cache, and
    measure what their residuals are relative to at least.

    A pass over the partitions of the cache; to group them by part, Spark would sort the ratings in
    the JVM, which took more memory there than all else.

    Parameters
    ----------
    entries
        What `encoding.encode` made, cached.
    token
        Names the training; None: parts are measured alone.

    Returns
    -------
    dict
        By side `floor_of` its rows.
    """

    def write(batches: Iterable[pa.RecordBatch]) -> Iterable[pa.RecordBatch]:
        pieces = defaultdict(list)
        for batch in batches:
            for row in arrays_of(batch):
                pieces[row["side"], row["part"]].append(row)
        while pieces:  # of a partition, mostly one part
            (side, part), rows = pieces.popitem()
            block = RatingBlock.from_pieces(rows)
            PartReader(token, side).keep(part, block)
            magnitudes = target_magnitudes(block.indptr, block.values, objective)
            yield pa.RecordBatch.from_pydict(
                {
                    "side": pa.array([side] * len(magnitudes), pa.string()),
                    "magnitude": pa.array(magnitudes.keys(), pa.int32()),
                    "n_rows": pa.array(magnitudes.values(), pa.int64()),
                }
            )

    found: dict[str, Counter[int]] = {side: Counter() for side in SIDES}
    for row in entries.mapInArrow(write, "side string, magnitude int, n_rows long").collect():
        found[row["side"]][row["magnitude"]] += row["n_rows"]
    return {side: floor_of(magnitudes) for side, magnitudes in found.items()}


def drop(parts: Sequence[DataFrame], token: str) -> None:
    """Remove the files of a training from the machines on which its parts are cached.

    Parameters
    ----------
    parts
        Column `key` of the parts of both sides.
    """

    def remove(batches: Iterable[pa.RecordBatch]) -> Iterable[pa.RecordBatch]:
        for batch in batches:
            shutil.rmtree(_directory(token), ignore_errors=True)
            yield batch

    both = parts[0].unionByName(parts[1])
    both.mapInArrow(remove, "key int").count()
