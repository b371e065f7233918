"""Runs the rounds of the frontier loop on Spark.

The ledger and the factors are pages (`ledger_page.Page`), each a few binary rows. A round is two
Spark jobs. The first loads what the patch needs and solves it:

    ledger pages --asks--> rating chunks, changes --by part--> ratings --needs, by page--> factors
                                                                  |                           |
                                                                  +------> solved <---by part-+

The second updates the ledger's pages with the results.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Collection, Container, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from pyspark.sql import functions as F

from unlearn_spark.core.blocks import SIDES
from unlearn_spark.core.bounds import drift
from unlearn_spark.core.layout import TASK_RATINGS
from unlearn_spark.core.ledger_page import NOTHING, PAGE_ROWS, Paging, Summary, Thresholds
from unlearn_spark.core.rounds import Work, looks_again
from unlearn_spark.nightly import Rounds
from unlearn_spark.spark.frames import materialise
from unlearn_spark.spark.night.factor_tasks import (
    ASKED,
    FACTOR_PAGES,
    MESSAGES,
    MOVED,
    NEEDED,
    fetcher,
    moved_unpacker,
    need_finder,
    need_unpacker,
    packer,
)
from unlearn_spark.spark.night.page_tasks import (
    ENTRIES,
    KINDS,
    PAGES,
    change_need_finder,
    entry_unpacker,
    page_opener,
    result_taker,
)
from unlearn_spark.spark.night.patch_tasks import (
    LOADED,
    RESULTS,
    TOTALS,
    WANTED,
    chunk_finder,
    entry_finder,
    patch_solver,
    wanted_keeper,
)
from unlearn_spark.spark.placement import balanced_keys, part_key
from unlearn_spark.spark.sql import one_of

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame
    from pyspark.sql.group import GroupedData

    from unlearn_spark.config import ExecutionSettings
    from unlearn_spark.core.solver import Solver
    from unlearn_spark.spark.night.changed_model import ChangedModel


MOST_RESULTS = 8
"""After so many rounds their results become one frame, because every frame makes plans longer."""

FEW_SHARE = 0.25
"""A patch with up to this many ratings per row of the model reads only the factors that it needs.
For a larger one all factors are packed, and kept for later rounds."""


@dataclass(frozen=True)
class Placing:
    """How a night's rows are spread over Spark's tasks: pages, and the page of each block."""

    rank: int
    parallelism: int
    paging: Paging

    @classmethod
    def of(cls, rank: int, parallelism: int, n_rows: int, n_blocks: Mapping[str, int]) -> Placing:
        """A placing for a model of `n_rows` rows, both sides together."""
        n_pages = whole_waves(-(-max(1, n_rows) // PAGE_ROWS), parallelism)
        return cls(rank, parallelism, Paging(balanced_keys(n_pages), n_blocks))

    @property
    def page(self) -> Column:
        """The key of the page that a `block` lies in."""
        return F.expr(part_key("block", self.paging.keys)).alias("page")

    def by_page(self, frame: DataFrame) -> GroupedData:
        """Group rows by their column `page`, with a task for each page."""
        # In the session's number of partitions, some would have several pages and others none.
        return frame.repartition(len(self.paging.keys), "page").groupBy("page")

    def packed(self, rows: DataFrame) -> DataFrame:
        """Pack factor rows (side, slot, factors) into `FACTOR_PAGES`."""
        pack = packer(self.rank, self.paging)
        return rows.select("side", "slot", "factors").mapInArrow(pack, FACTOR_PAGES)

    def fetched(self, needed: DataFrame, factor_pages: DataFrame) -> DataFrame:
        """The factors (`MESSAGES`) of needed rows (`NEEDED`), from rows as `_as_results` makes."""
        return (
            self.by_page(needed)
            .cogroup(self.by_page(factor_pages))
            .applyInArrow(fetcher(self.rank), MESSAGES)
        )


def whole_waves(n_tasks: int, parallelism: int) -> int:
    """Round a number of tasks up to whole waves of the cluster, unless one wave is enough."""
    if n_tasks <= parallelism:
        return n_tasks
    return -(-n_tasks // parallelism) * parallelism


def open_ledger(
    placing: Placing,
    solver: Solver,
    thresholds: Thresholds,
    ledger: DataFrame,
    touched: Mapping[str, DataFrame],
    earlier: DataFrame,
    news: DataFrame,
    tonight: int,
    gram_changes: Mapping[str, NDArray[np.float64]],
    *,
    force: bool,
    checkpoint: str,
) -> DataFrame:
    """Turn the published ledger into pages (`PAGES`), and push tonight's changes into them.

    Parameters
    ----------
    ledger
        side, id, block, slot, chunk, n_ratings, gradient_norm, b_norm, factor_norm: one entry for
        every row of the published model.
    touched
        By side: id, block, slot, n_ratings (new), factors of the rows whose ratings change: new
        rows with their starting factors, the others, also those that leave, with published ones.
    earlier, news
        side, block, slot, other_slot, value, change (-1 removed, +1 added), model_version: changes
        since the chunks were packed, and tonight's.
    tonight
        The `model_version` of tonight's changes.
    gram_changes
        By side: float64 (rank, rank) change of its Gram matrix because rows leave or come; empty in
        explicit mode.
    force
        Solve every row that gains or loses a rating, whatever its residual.
    checkpoint
        `execution.checkpoint`, see `materialise`.
    """
    drifts = {side: drift(gram_changes[side]) if gram_changes else 0.0 for side in SIDES}
    # The two sides' ids may be of different types; the ledger has strings.
    text = F.col("id").cast("string")
    of_both = _sides({side: rows.withColumn("id", text) for side, rows in touched.items()})
    place, counted = ("side", placing.page, "slot"), ("id", "n_ratings")
    norms = ("gradient_norm", "b_norm", "factor_norm")
    changed = ("other_slot", "value", "change", "model_version")
    parts = (
        ledger.select(*place, *counted, "chunk", *norms),
        of_both.select(*place, *counted),
        earlier.unionByName(news).select(*place, *changed),
    )
    state = _union(
        [rows.withColumn("kind", F.lit(kind)) for kind, rows in zip(KINDS, parts, strict=True)]
    )
    needed = placing.by_page(news.select(*place, "other_slot")).applyInArrow(
        change_need_finder(placing.paging), NEEDED
    )
    messages = placing.fetched(needed, _as_results(placing.packed(of_both)))
    opener = page_opener(solver, tonight, drifts, force, thresholds)
    pages = (
        placing.by_page(state)
        .cogroup(messages.repartition(len(placing.paging.keys), "key").groupBy("key"))
        .applyInArrow(opener, PAGES)
    )
    return materialise(pages, checkpoint)


@dataclass
class Frontier:
    """The state of a night's rounds, and the Spark jobs that run a round.

    Attributes
    ----------
    solver
        Objective, rank and precision.
    rows
        By side: slot, factors (`ChangedModel.vectors`); read when they are needed.
    chunks
        Packed ratings of both sides (`encoding.CHUNK_SCHEMA`).
    pages
        The ledger of both sides (`PAGES`), whose bounds hold after every round.
    work
        The arithmetic done so far.
    grams
        By side: its present Gram matrix; empty in explicit mode.
    rounds
        The number of rounds done.
    factor_pages
        The factors of `rows` (`FACTOR_PAGES`); None before the first round that needs many.
    results
        Results of the rounds (`RESULTS`) with their `round`, oldest first.
    """

    solver: Solver
    placing: Placing
    thresholds: Thresholds
    rows: dict[str, DataFrame]
    chunks: DataFrame
    pages: DataFrame
    execution: ExecutionSettings
    work: Work
    grams: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    rounds: int = 0
    factor_pages: DataFrame | None = None
    results: list[DataFrame] = field(default_factory=list)

    # --- reading -----------------------------------------------------------------------------

    def current(self, side: str, rows: DataFrame, *, few: bool = False) -> DataFrame:
        """Replace the factors of a side's rows (slot, factors and more) by those solved tonight. If
        these are `few`, Spark broadcasts them and does not shuffle the rows."""
        if not self.results:
            return rows
        moved = (
            self._all_results()
            .where(F.col("side") == side)
            .mapInArrow(moved_unpacker(self.solver.rank), MOVED)
        )
        if not few:
            moved = moved.repartition(len(self.placing.paging.keys), "slot")
        newer = moved.groupBy("slot").agg(F.max_by("factors", "round").alias("newer"))
        return (
            rows.join(F.broadcast(newer) if few else newer, "slot", "left")
            .withColumn("factors", F.coalesce("newer", "factors"))
            .drop("newer")
        )

    def entries(self) -> DataFrame:
        """The ledger of both sides as `ENTRIES`, sorted by block and slot; a block lies in one
        partition."""
        return self.pages.mapInArrow(entry_unpacker(self.thresholds.n_blocks), ENTRIES)

    def ratings_of(
        self,
        patch: Mapping[str, str],
        keys: tuple[int, ...],
        chunks: Mapping[str, Collection[int] | None],
    ) -> DataFrame:
        """Load ratings and ledger entries (`LOADED`) of the chosen rows, by part.

        Parameters
        ----------
        patch
            By side: which rows (`ledger_page.CHOICES`).
        keys
            One for each part; a row belongs to part `slot % len(keys)`.
        chunks
            By side: the stored chunks of these rows, which are then the only ones read; None: too
            many to list.
        """
        chosen, of = self.pages.where(F.col("side").isin(list(patch))), dict(patch)
        thresholds = self.thresholds
        wanted = chosen.mapInArrow(chunk_finder(of, thresholds), WANTED)
        rows = chosen.mapInArrow(entry_finder(of, thresholds, keys), LOADED)
        stored_of = [
            self.chunks.where(F.col("side") == side).where(self._in_chunks(side, chunks.get(side)))
            for side in patch
        ]
        stored = (
            _union(stored_of)
            .join(F.broadcast(wanted), ["side", "block", "chunk"])
            .select("side", "wanted", "slots", "counts", "others", "values")
            .mapInArrow(wanted_keeper(keys), LOADED)
        )
        # The number keeps adaptive execution from merging small partitions.
        return stored.unionByName(rows).repartition(len(keys), "key")

    def _in_chunks(self, side: str, chunks: Collection[int] | None) -> Column:
        """A condition for these chunks of a side (None: all), by which Delta skips files."""
        if chunks is None:
            return F.lit(True)
        by_block: dict[int, list[int]] = {}
        for chunk in sorted(chunks):
            by_block.setdefault(chunk % self.thresholds.n_blocks[side], []).append(chunk)
        here = [
            f"(block = {block} AND {one_of('chunk', found)})" for block, found in by_block.items()
        ]
        return F.expr(" OR ".join(here) or "false")

    # --- steps -------------------------------------------------------------------------------

    def release(self) -> None:
        """Drop the cached factors."""
        if self.factor_pages is not None:
            self.factor_pages.unpersist()

    def summary(self) -> dict[str, Summary]:
        """The summary of each side."""
        found = dict.fromkeys(SIDES, NOTHING)
        for row in self.pages.select("side", "summary").collect():
            found[row["side"]] += pickle.loads(row["summary"])
        return found

    def resolve(
        self, patch: Mapping[str, str], state: Mapping[str, Summary], eager: Container[str]
    ) -> None:
        """Run a round: scan the rows of a patch, re-solve those over the mark, and push their moves
        into the rows outside.

        One task solves a patch of both sides; several may share a patch of one side. `state` is
        the summary before the round, `eager` the sides with rows over tau.
        """
        self.rounds += 1
        ratings = sum(state[side].ratings[name] for side, name in patch.items())
        chunks = {side: state[side].chunks[name] for side, name in patch.items()}
        result = self._solved(patch, ratings, chunks, eager)
        rank = self.solver.rank
        changes = {side: np.zeros((rank, rank)) for side in SIDES}
        for row in result.select(*TOTALS).where("gram_change IS NOT NULL").collect():
            self.work.add(row["solved_ratings"], row["solved_rows"], row["scanned_ratings"])
            changes[row["side"]] += np.frombuffer(row["gram_change"]).reshape(rank, rank)
        drifts = dict.fromkeys(SIDES, 0.0)
        if self.solver.objective.implicit_prefs:
            self.grams = {side: self.grams[side] + changes[side] for side in SIDES}
            drifts = {side: drift(changes[side]) for side in SIDES}
        taker = result_taker(drifts, looks_again(ratings), self.thresholds)
        news = result.drop("factors", *[name for name in TOTALS if name != "side"])
        self.pages = self._checkpoint(
            self.placing.by_page(self.pages)
            .cogroup(self.placing.by_page(news))
            .applyInArrow(taker, PAGES)
        )
        self.results.append(result.withColumn("round", F.lit(self.rounds)))
        if len(self.results) >= MOST_RESULTS:
            self.results = [self._checkpoint(self._all_results())]

    def _all_results(self) -> DataFrame:
        wanted = ("side", "page", "slots", "factors", "solved", "round")
        return _union([frame.select(*wanted) for frame in self.results])

    def _factors_for(self, needed: DataFrame, ratings: int) -> DataFrame:
        """Factors before the rounds (`FACTOR_PAGES`) of at least the needed rows (`NEEDED`), for a
        patch of so many ratings."""
        if self.factor_pages is not None:
            return self.factor_pages
        rows = _sides(self.rows)
        if ratings <= FEW_SHARE * self.work.rows:
            asked = needed.mapInArrow(need_unpacker, ASKED)
            return self.placing.packed(rows.join(F.broadcast(asked), ["side", "slot"], "left_semi"))
        self.factor_pages = self.placing.packed(rows).persist()
        return self.factor_pages

    def _fetched(self, needed: DataFrame, ratings: int) -> DataFrame:
        """The present factors (`MESSAGES`) of needed rows (`NEEDED`)."""
        pages = _as_results(self._factors_for(needed, ratings))
        if self.results:
            pages = pages.unionByName(self._all_results())
        return self.placing.fetched(needed, pages)

    def _solved(
        self,
        patch: Mapping[str, str],
        ratings: int,
        chunks: Mapping[str, Collection[int] | None],
        eager: Container[str],
    ) -> DataFrame:
        """Solve a patch, and keep its `RESULTS`."""
        n_parts = -(-ratings // self.execution.part_ratings)
        if len(patch) == 1:
            n_parts = max(n_parts, min(self.placing.parallelism, ratings // TASK_RATINGS), 1)
            n_parts = whole_waves(n_parts, self.placing.parallelism)
        keys = balanced_keys(n_parts)
        parts = self.ratings_of(patch, keys, chunks).persist()
        needed = parts.mapInArrow(need_finder(self.placing.paging), NEEDED)
        messages = self._fetched(needed, ratings)
        solved = (
            parts.groupBy("key")
            .cogroup(messages.repartition(len(keys), "key").groupBy("key"))
            .applyInArrow(
                patch_solver(
                    self.solver,
                    self.thresholds,
                    self.grams,
                    self.work.spare,
                    eager,
                    self.placing.paging,
                ),
                RESULTS,
            )
        )
        result = self._checkpoint(solved)
        parts.unpersist()
        return result

    def _checkpoint(self, frame: DataFrame) -> DataFrame:
        return materialise(frame, self.execution.checkpoint)


@dataclass(frozen=True)
class Resolved:
    """A changed model after its rounds.

    Attributes
    ----------
    frontier
        Present factors and ledger entries, and the work done.
    end
        By side: its summary; None if the rounds gave up.
    """

    frontier: Frontier
    end: Mapping[str, Summary] | None

    @property
    def is_done(self) -> bool:
        """Whether no bound is over tau."""
        return self.end is not None

    @property
    def rounds(self) -> Rounds:
        """What the rounds did; the worst bound is infinite if they gave up."""
        end = self.end or {}
        return Rounds(
            rounds=self.frontier.rounds,
            work_sweeps=self.frontier.work.sweeps,
            worst=max((side.worst for side in end.values()), default=math.inf),
            solved={side: found.solved for side, found in end.items()},
        )

    @property
    def solved_blocks(self) -> dict[str, frozenset[int]]:
        """By side: the blocks of the re-solved rows; only if the rounds are done."""
        assert self.end is not None
        return {side: found.solved_blocks for side, found in self.end.items()}

    def factors(self, changed: ChangedModel) -> tuple[DataFrame, DataFrame]:
        """The present user and item factors (id, factors) of all rows that have ratings."""
        users, items = (
            self.frontier.current(side, changed.present(side).select("id", "slot", "factors"))
            for side in SIDES
        )
        return users, items


def _sides(frames: Mapping[str, DataFrame]) -> DataFrame:
    """The rows of both sides, with a column `side`."""
    return _union([frames[side].withColumn("side", F.lit(side)) for side in SIDES])


def _union(frames: Sequence[DataFrame]) -> DataFrame:
    """The rows of all frames, with nulls for columns that a frame lacks."""
    return reduce(lambda left, right: left.unionByName(right, allowMissingColumns=True), frames)


def _as_results(factor_pages: DataFrame) -> DataFrame:
    """Pages of factors in columns that results of rounds also have, as of round 0."""
    return factor_pages.select(
        *("side", "page", "slots", "factors"),
        F.lit(None).cast("binary").alias("solved"),
        F.lit(0).alias("round"),
    )
