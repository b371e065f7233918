"""Keeps rating parts in files beside the workers, so that a training sends them to Python once.

To send a part from Spark's cache to a worker in every sweep would be slow. So `keep` writes each
part, sorted, to a memory-mapped file on the machine whose cache has the part. Spark schedules the
part's tasks there, and sweeps send them only factors. If a task does not find the file (an executor
was lost, a disk was full), it reports the part as missing. The driver then repeats the sweep and
sends the ratings, which the workers keep again.

The files lie in the application's directory that Spark makes on every node and removes at the end.
`drop` removes them earlier.
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
        Whether Spark sends the ratings, which are then kept. Otherwise `read` looks for the file
        that `keep` or an earlier sweep wrote.
    """

    token: str | None = None
    side: str = ""
    sent: bool = True

    def read(self, pieces: pa.Table) -> tuple[int, RatingBlock | None]:
        """A part's number and its ratings, or None if they are missing; runs in a worker.

        Parameters
        ----------
        pieces
            The part's rows (`PART_SCHEMA`); only key and part if the ratings were not sent.
        """
        if self.sent:
            number, block = part_of(pieces)
            self.keep(number, block)
            return number, block
        number = pieces["part"][0].as_py()
        try:
            with pa.memory_map(str(self._path(number))) as source:
                return part_of(pa.ipc.open_file(source).read_all())
        except OSError:  # mostly FileNotFoundError
            return number, None

    def keep(self, number: int, block: RatingBlock) -> None:
        """Write a part to the file that `read` looks for; runs in a worker."""
        if self.token is None:
            return
        path = self._path(number)
        mine = path.with_suffix(f".{os.getpid()}")
        table = binary_table([{"part": number, **block.to_binary()}])
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with pa.OSFile(str(mine), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
                writer.write_table(table)
            mine.replace(path)  # atomic, because another attempt may write the same part
        except OSError:  # `read` reports the part as missing, and the driver sends it
            with suppress(OSError):
                mine.unlink()

    def _path(self, number: int) -> Path:
        assert self.token is not None
        return _directory(self.token) / f"{self.side}-{number}.arrow"


def _directory(token: str) -> Path:
    return Path(SparkFiles.getRootDirectory()) / f"unlearn-spark-{token}"


def keep(entries: DataFrame, token: str | None, objective: Objective) -> dict[str, float]:
    """Write the parts of both sides to files on the machines that have them in Spark's cache, and
    return each side's floor (`floor_of`).

    Parameters
    ----------
    entries
        The result of `encoding.encode`, cached.
    token
        Names the training; None: write no files.
    """

    # By partition of the cache: a grouping by part would sort the ratings in the JVM.

    def write(batches: Iterable[pa.RecordBatch]) -> Iterable[pa.RecordBatch]:
        pieces = defaultdict(list)
        for batch in batches:
            for row in arrays_of(batch):
                pieces[row["side"], row["part"]].append(row)
        while pieces:  # mostly one part per partition
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
    """Remove the files of a training from the machines that have its parts in Spark's cache.

    `parts` has the column `key` of each side's parts.
    """

    def remove(batches: Iterable[pa.RecordBatch]) -> Iterable[pa.RecordBatch]:
        for batch in batches:
            shutil.rmtree(_directory(token), ignore_errors=True)
            yield batch

    both = parts[0].unionByName(parts[1])
    both.mapInArrow(remove, "key int").count()
