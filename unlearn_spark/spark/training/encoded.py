"""Turns a training's ratings into cached parts of both sides, once per training."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pyspark import StorageLevel
from pyspark.sql import functions as F

from unlearn_spark.config import AlsSettings, ExecutionSettings
from unlearn_spark.core.blocks import SIDES
from unlearn_spark.core.layout import choose_blocks, choose_parts
from unlearn_spark.core.solver import solver_of
from unlearn_spark.errors import InputError
from unlearn_spark.spark.frames import aggregates_of, session_parallelism
from unlearn_spark.spark.session_conf import session_conf
from unlearn_spark.spark.settings import LARGE_ROWS, NARROW_ROWS
from unlearn_spark.spark.training import encoding
from unlearn_spark.spark.training.half_sweep import SENT
from unlearn_spark.spark.training.layout import SideLayout
from unlearn_spark.spark.training.local_parts import PartReader, drop, keep

if TYPE_CHECKING:
    from pyspark.sql import DataFrame


@dataclass(frozen=True)
class Encoded:
    """Ratings as parts of both sides, and the dictionaries from ids to slots.

    Attributes
    ----------
    dictionaries
        By side: id, n_ratings, block, slot.
    parts
        By side: rating parts (`PART_SCHEMA`), each in its own partition.
    places
        By side: key and part of `parts`, in the same partitions. A cache of its own for sweeps that
        send no ratings, because Spark reads all columns of a cache.
    floors
        By side: the least denominator of its residuals (`floor_of`).
    held
        The caches that these frames read.
    token
        Names the files in which workers keep the parts.
    """

    layouts: dict[str, SideLayout]
    dictionaries: dict[str, DataFrame]
    parts: dict[str, DataFrame]
    places: dict[str, DataFrame]
    n_ratings: int
    floors: dict[str, float]
    held: list[DataFrame]
    token: str

    @property
    def anchor(self) -> str:
        """The side whose rows are the iterate: the one with fewer rows."""
        users, items = self.layouts["user"], self.layouts["item"]
        return "user" if users.n_rows < items.n_rows else "item"

    @property
    def n_rows(self) -> dict[str, int]:
        """By side: the number of rows."""
        return {side: layout.n_rows for side, layout in self.layouts.items()}

    @property
    def fits_one_task(self) -> bool:
        """Whether the ratings are so few that a single task sweeps them."""
        return all(layout.n_parts == 1 for layout in self.layouts.values())

    def ratings_of(self, side: str, sent: bool) -> tuple[DataFrame, PartReader]:
        """The parts of a side, and the reader of their ratings in a worker. If `sent`, or if there
        is a single task, Spark sends the ratings; otherwise the reader looks for kept ones."""
        if self.fits_one_task:
            return self.parts[side], SENT
        parts = self.parts if sent else self.places
        return parts[side], PartReader(self.token, side, sent)

    def release(self) -> None:
        """Drop the caches and the workers' files."""
        if not self.fits_one_task:
            drop([frame.select("key") for frame in self.places.values()], self.token)
        for frame in self.held:
            frame.unpersist()


def encode_ratings(
    ratings: DataFrame, settings: AlsSettings, execution: ExecutionSettings
) -> Encoded:
    """Number the ids and turn the ratings into cached parts of both sides.

    Parameters
    ----------
    ratings
        user_id, item_id, rating.

    Raises
    ------
    InputError
        There are no ratings.
    """
    with session_conf(ratings.sparkSession, LARGE_ROWS):
        return _encode(ratings, settings, execution)


def _encode(ratings: DataFrame, settings: AlsSettings, execution: ExecutionSettings) -> Encoded:
    parallelism = session_parallelism(ratings.sparkSession)
    with session_conf(ratings.sparkSession, NARROW_ROWS):
        fragments = encoding.fragment(ratings).persist()
        estimates, n_ratings = encoding.estimate_sizes(fragments)
    if not n_ratings:
        fragments.unpersist()
        raise InputError("there are no ratings to train on; ingest some first")
    wanted = {"user": settings.user_blocks, "item": settings.item_blocks}
    n_blocks = {
        side: choose_blocks(estimates[side], n_ratings, parallelism, wanted[side]) for side in SIDES
    }
    numbered = {side: encoding.number(fragments, side, n_blocks[side]).persist() for side in SIDES}
    dictionaries = {side: encoding.dictionary(numbered[side], n_blocks[side]) for side in SIDES}
    sizes = aggregates_of(dictionaries, F.count(F.lit(1)), F.max("slot"))
    n_parts = {
        side: choose_parts(n_ratings, n_blocks[side], execution.part_ratings, parallelism)
        for side in SIDES
    }
    together = max(n_parts.values()) == 1  # a single task sweeps all, and wants one partition
    first = {"user": 0, "item": 0 if together else n_parts["user"]}
    layouts = {
        side: SideLayout(
            side,
            n_rows=sizes[side][0],
            n_blocks=n_blocks[side],
            n_parts=n_parts[side],
            n_slots=sizes[side][1] + 1,
            first_place=first[side],
            n_places=1 if together else sum(n_parts.values()),
        )
        for side in SIDES
    }
    # On disk, because workers keep files of their own: Spark reads these only if one is missing.
    entries = encoding.encode(fragments, numbered, layouts).persist(StorageLevel.DISK_ONLY)
    placed = entries.select("side", "key", "part").persist()
    placed.count()
    fragments.unpersist()
    token = uuid.uuid4().hex
    floors = keep(entries, None if together else token, solver_of(settings).objective)
    parts = {side: encoding.entries_of(entries, side) for side in SIDES}
    places = {side: encoding.entries_of(placed, side) for side in SIDES}
    held = [placed, entries, *numbered.values()]
    return Encoded(layouts, dictionaries, parts, places, n_ratings, floors, held, token)
