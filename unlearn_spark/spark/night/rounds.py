"""The frontier loop: re-solve what a change disturbed, then what that disturbed, until quiet.

    changes --push--> ledger --rows over tau--> patch: re-solve --push--> ledger outside of it
                        ^                                                        |
                        +--------------------------------------------------------+

Every factor row carries an upper bound of its residual. When no bound exceeds tau, every row of
both sides solves its retained ratings' equations to tau, and nothing else has to be read to know
it. The idea of starting from the trained factors is Unlearn-ALS (Xu et al. 2023, arXiv
2302.06676); the bounds make it local.

On Spark the ledger and the factors are pages (`pages.Page`), packed into a few binary rows each. A
round is two jobs and a look at scalars: one loads what the patch needs and settles it,

    ledger pages --asks--> rating chunks, changes --by part--> ratings --needs, by page--> factors
                                                                  |                           |
                                                                  +------> settled <--by part-+

and one takes the results, by page, into the ledger.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Collection, Container, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from pyspark.sql import functions as F

from unlearn_spark.core.blocks import SIDES
from unlearn_spark.core.bounds import drift
from unlearn_spark.core.layout import TASK_RATINGS
from unlearn_spark.core.ledger_page import NOTHING, PAGE_ROWS, Paging, Summary
from unlearn_spark.core.rounds import (
    LAZY_ROUNDS,
    MOST_SWEEPS,
    PATCH_RATINGS,
    SHARE_OF_TRAINING,
    TOGETHER_RATINGS,
    Work,
)
from unlearn_spark.spark.frames import materialise
from unlearn_spark.spark.night import factor_tasks as exchange
from unlearn_spark.spark.night.page_tasks import (
    ENTRIES,
    PAGES,
    Levels,
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
    settler,
    wanted_keeper,
)
from unlearn_spark.spark.placement import balanced_keys, part_key
from unlearn_spark.tables.sql import in_blocks_of_sides, one_of

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame
    from pyspark.sql.group import GroupedData

    from unlearn_spark.config import ExecutionSettings, ResolvedUnlearn
    from unlearn_spark.core.solver import Solver


MOST_RESULTS = 8
"""Rounds whose results are kept apart."""

FEW_SHARE = 0.25
"""A patch with fewer ratings than this share of all rows picks the factors that it needs where they
are read; for more, all are packed, and kept for the rounds to come."""

SPARE_SHARE, SPARE_RATINGS = 0.02, 10_000
"""What a patch may solve again and again within a round: this share of a sweep's ratings, or so
many where that is more."""


@dataclass
class Frontier:
    """The state of one night, and the steps that change it.

    Attributes
    ----------
    solver
        Objective, rank and precision.
    rows
        By side: slot, factors - as published, also of rows that left, and new rows. Read when they
        are needed.
    chunks
        Packed ratings of both sides (`encoding.CHUNK_SCHEMA`).
    n_blocks
        By side.
    floors
        By side what residuals are relative to at least.
    training_sweeps
        Sweeps that the model's training took; 0 where that is not known.
    pages
        The ledger of both sides (`PAGES`); after every step true bounds.
    near
        By side the blocks whose entries `pages` has; None: all.
    ledger, touched, changes
        Of the published model; the rows whose ratings change tonight; all changes since the ratings
        were packed.
    stock
        The factors of `rows` (`exchange.STOCK`), from the first round on that needs many of them.
    results
        Of each round (`RESULTS`), oldest first.
    """

    solver: Solver
    rows: dict[str, DataFrame]
    chunks: DataFrame
    settings: ResolvedUnlearn
    execution: ExecutionSettings
    parallelism: int
    n_blocks: dict[str, int]
    floors: dict[str, float]
    work: Work
    progress: Callable[[str], None] = lambda message: None
    training_sweeps: int = 0
    grams: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    rounds: int = 0
    pages: DataFrame = field(init=False)
    near: Mapping[str, Collection[int]] | None = field(init=False, default=None)
    stock: DataFrame | None = field(init=False, default=None)
    ledger: DataFrame = field(init=False)
    touched: DataFrame = field(init=False)
    changes: DataFrame = field(init=False)
    results: list[DataFrame] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        n_pages = self._whole_waves(-(-max(1, self.work.rows) // PAGE_ROWS))
        self.paging = Paging(balanced_keys(n_pages), self.n_blocks)

    def _whole_waves(self, n_tasks: int) -> int:
        """At least so many tasks, and such a number that none of many waits for a last few."""
        if n_tasks <= self.parallelism:
            return n_tasks
        return -(-n_tasks // self.parallelism) * self.parallelism

    @property
    def mark(self) -> float:
        """The residual over which rows of a patch are solved.

        In implicit mode every move disturbs every row through the Gram matrix, so that to solve a
        row early, for the sake of later rounds, makes the more work for the others.
        """
        return self.settings.tau if self.solver.objective.implicit_prefs else self.settings.mark

    @property
    def _page(self) -> Column:
        """The key of the page that a block lies in."""
        return F.expr(part_key("block", self.paging.keys)).alias("page")

    def _by_page(self, frame: DataFrame) -> GroupedData:
        """Rows that have a `page`, grouped by it, a task for each page.

        With the session's number of partitions several would meet in one, while others stay empty.
        """
        return frame.repartition(len(self.paging.keys), "page").groupBy("page")

    @property
    def _levels(self) -> Levels:
        return Levels(self.n_blocks, self.settings.tau, self.mark, self.floors)

    # --- reading -----------------------------------------------------------------------------

    def current(self, side: str, rows: DataFrame, *, few: bool = False) -> DataFrame:
        """Rows of a side (slot, factors and more) with the factors that were re-solved tonight.

        Those are sent to every task where they are `few`; no row is moved then.
        """
        if not self.results:
            return rows
        moved = (
            self._all_results()
            .where(F.col("side") == side)
            .mapInArrow(exchange.moved_unpacker(self.solver.rank), exchange.MOVED)
        )
        if not few:
            moved = moved.repartition(len(self.paging.keys), "slot")
        newer = moved.groupBy("slot").agg(F.max_by("factors", "round").alias("newer"))
        return (
            rows.join(F.broadcast(newer) if few else newer, "slot", "left")
            .withColumn("factors", F.coalesce("newer", "factors"))
            .drop("newer")
        )

    def entries(self) -> DataFrame:
        """The ledger of both sides as rows (`ENTRIES`), by block and slot; all of a block
        lie in one partition."""
        return self.pages.mapInArrow(entry_unpacker(self.n_blocks), ENTRIES)

    def ratings_of(
        self,
        patch: Mapping[str, str],
        keys: tuple[int, ...],
        chunks: Mapping[str, Collection[int] | None],
    ) -> DataFrame:
        """Ratings and ledger entries (`LOADED`) of the chosen rows alone, by part.

        Parameters
        ----------
        patch
            By side which rows (`pages.CHOICES`).
        keys
            One for each part; a row belongs to part `slot % len(keys)`.
        chunks
            By side the stored chunks in which these rows lie, where they are known and few: no
            other is read.
        """
        chosen, of = self.pages.where(F.col("side").isin(list(patch))), dict(patch)
        levels = self._levels
        wanted = chosen.mapInArrow(chunk_finder(of, levels), WANTED)
        rows = chosen.mapInArrow(entry_finder(of, levels, keys), LOADED)
        near = [
            self.chunks.where(F.col("side") == side).where(self._in_chunks(side, chunks.get(side)))
            for side in patch
        ]
        stored = (
            _union(near)
            .join(F.broadcast(wanted), ["side", "block", "chunk"])
            .select("side", "wanted", "slots", "counts", "others", "values")
            .mapInArrow(wanted_keeper(keys), LOADED)
        )
        # As many partitions as parts: adaptive execution would join them by their size.
        return stored.unionByName(rows).repartition(len(keys), "key")

    def _in_chunks(self, side: str, chunks: Collection[int] | None) -> Column:
        """These chunks of a side, in a form by which files are skipped; None: all."""
        if chunks is None:
            return F.lit(True)
        by_block: dict[int, list[int]] = {}
        for chunk in sorted(chunks):
            by_block.setdefault(chunk % self.n_blocks[side], []).append(chunk)
        here = [
            f"(block = {block} AND {one_of('chunk', found)})" for block, found in by_block.items()
        ]
        return F.expr(" OR ".join(here) or "false")

    # --- steps -------------------------------------------------------------------------------

    def open(
        self,
        ledger: DataFrame,
        touched: Mapping[str, DataFrame],
        earlier: DataFrame,
        news: DataFrame,
        tonight: int,
        gram_changes: Mapping[str, NDArray[np.float64] | None],
        near: Mapping[str, Collection[int]] | None = None,
    ) -> None:
        """Make the pages from the published ledger, and put tonight's ratings into it.

        Parameters
        ----------
        ledger
            side, id, block, slot, chunk, n_ratings, gradient_norm, b_norm, factor_norm: one entry
            for every row of the published model.
        touched
            By side: id, block, slot, n_ratings, factors of rows whose ratings changed, new ones
            among them, as they are now; of those that left the factors that they had.
        earlier, news
            side, block, slot, other_slot, value, change (-1 removed, +1 added), model_version:
            changes since the chunks were packed, and tonight's.
        tonight
            The `model_version` of tonight's changes.
        gram_changes
            By side: float64 (rank, rank) change of its Gram matrix because rows left or came;
            None in explicit mode.
        near
            By side the blocks of these rows, where the other blocks need not be opened before a
            round starts: none of their bounds exceeds tau, and no Gram matrix changed.
        """
        drifts = {s: drift(m) if m is not None else 0.0 for s, m in gram_changes.items()}
        needed = self._by_page(news.select("side", self._page, "slot", "other_slot")).applyInArrow(
            change_need_finder(self.paging), exchange.NEEDED
        )
        force = self.settings.direct_rows == "resolve"
        opener = page_opener(self.solver, tonight, drifts, force, self._levels)
        # Ids of the two sides may be of different types; the ledger has them as strings.
        named = {
            side: rows.withColumn("id", F.col("id").cast("string"))
            for side, rows in touched.items()
        }
        self.ledger, self.touched = ledger, _sides(named)
        self.changes = earlier.unionByName(news)
        self.near = near
        messages = self._fetched(needed, self._packed(self.touched))
        self.pages = self._checkpoint(
            self._by_page(self._states(_in_blocks(near)))
            .cogroup(messages.repartition(len(self.paging.keys), "key").groupBy("key"))
            .applyInArrow(opener, PAGES)
        )
        for side, change in gram_changes.items():
            if change is not None:
                self.grams[side] = change + self.grams[side]

    def _open_the_others(self) -> None:
        """Add the entries of the blocks that were left closed. Tonight's ratings are not theirs."""
        opener = page_opener(self.solver, 0, dict.fromkeys(SIDES, 0.0), False, self._levels)
        others = self._by_page(self._states(~_in_blocks(self.near))).applyInArrow(
            lambda state: opener(state, exchange.NO_MESSAGES), PAGES
        )
        self.near = None
        self.pages = self.pages.unionByName(self._checkpoint(others))

    def _states(self, where: Column) -> DataFrame:
        """Entries, touched rows and changes in some blocks, by page; they are told apart by what
        they lack."""
        place = ("side", self._page, "slot")
        counted = ("id", "n_ratings")
        norms = ("gradient_norm", "b_norm", "factor_norm")
        changed = ("other_slot", "value", "change", "model_version")
        return _union(
            [
                self.ledger.where(where).select(*place, *counted, "chunk", *norms),
                self.touched.where(where).select(*place, *counted),
                self.changes.where(where).select(*place, *changed),
            ]
        )

    def run(self) -> dict[str, Summary] | None:
        """Rounds until no bound exceeds tau; returns how the sides stand then, or None when the
        loop is not the cheaper way."""
        try:
            return self._run(max(MOST_SWEEPS, SHARE_OF_TRAINING * self.training_sweeps))
        finally:
            if self.stock is not None:
                self.stock.unpersist()

    def _run(self, most_work: float) -> dict[str, Summary] | None:
        while True:
            state = self.summary()
            over = {side: state[side].over for side in SIDES if state[side].over}
            if not over:
                return state
            if self.near is not None:
                self._open_the_others()
                continue
            if self.rounds >= self.settings.max_rounds or self.work.sweeps > most_work:
                return None
            self.resolve(self._patch(state), state, over)
            rows = " and ".join(f"{n} {side}" for side, n in over.items())
            worst = max(state[side].worst for side in SIDES)
            self.progress(
                f"round {self.rounds}: {rows} rows over tau, largest bound {worst:.1e}; "
                f"{self.work.sweeps:.3f} sweeps so far"
            )

    def summary(self) -> dict[str, Summary]:
        """How each side stands."""
        found = dict.fromkeys(SIDES, NOTHING)
        for row in self.pages.select("side", "summary").collect():
            found[row["side"]] += pickle.loads(row["summary"])
        return found

    def _patch(self, state: Mapping[str, Summary]) -> dict[str, str]:
        """What the next round looks at.

        As long as that is little, rows over the mark and what the round before looked at: rows of
        the two sides that pull at each other are settled together. Else at first rows over tau
        alone, later those over the mark, and where no single task can hold them those of one side,
        spread over tasks.
        """
        over = [side for side in SIDES if state[side].over]
        patch = {side: "either" if side in over else "looked" for side in SIDES}

        def ratings(patch: Mapping[str, str]) -> int:
            return sum(state[side].ratings[name] for side, name in patch.items())

        if ratings(patch) > min(PATCH_RATINGS, self.execution.part_ratings):
            name = "over" if self.rounds < LAZY_ROUNDS else "either"
            patch = dict.fromkeys(over, name)
        if ratings(patch) > min(TOGETHER_RATINGS, self.execution.part_ratings):
            # The side with less to do first: its rows often quieten the other.
            side = min(over, key=lambda name: state[name].ratings[patch[name]])
            patch = {side: patch[side]}
        return {side: name for side, name in patch.items() if state[side].ratings[name]}

    def resolve(
        self, patch: Mapping[str, str], state: Mapping[str, Summary], eager: Container[str]
    ) -> None:
        """Look at the rows of a patch: scan them, re-solve those over the mark, and push what
        moved into the rows outside.

        A patch of both sides is solved by one task; rows of one side may be spread over several.
        `eager`: the sides with rows over tau.
        """
        self.rounds += 1
        ratings = sum(state[side].ratings[name] for side, name in patch.items())
        chunks = {side: state[side].chunks[name] for side, name in patch.items()}
        result = self._settle(patch, ratings, chunks, eager)
        rank = self.solver.rank
        changes = {side: np.zeros((rank, rank)) for side in SIDES}
        for row in result.select(*TOTALS).where("gram_change IS NOT NULL").collect():
            self.work.add(row["solved_ratings"], row["solved_rows"], row["scanned_ratings"])
            changes[row["side"]] += np.frombuffer(row["gram_change"]).reshape(rank, rank)
        drifts = dict.fromkeys(SIDES, 0.0)
        if self.solver.objective.implicit_prefs:
            self.grams = {side: self.grams[side] + changes[side] for side in SIDES}
            drifts = {side: drift(changes[side]) for side in SIDES}
        taker = result_taker(drifts, ratings <= PATCH_RATINGS, self._levels)
        news = result.drop("factors", *[name for name in TOTALS if name != "side"])
        self.pages = self._checkpoint(
            self._by_page(self.pages).cogroup(self._by_page(news)).applyInArrow(taker, PAGES)
        )
        self.results.append(result.withColumn("round", F.lit(self.rounds)))
        if len(self.results) >= MOST_RESULTS:
            # One frame for many: a long chain would make every plan longer.
            self.results = [self._checkpoint(self._all_results())]

    def _all_results(self) -> DataFrame:
        wanted = ("side", "page", "slots", "factors", "solved", "round")
        return _union([frame.select(*wanted) for frame in self.results])

    def _stock_for(self, needed: DataFrame, ratings: int) -> DataFrame:
        """Factors (`exchange.STOCK`) of the needed rows (`exchange.NEEDED`) at least, of a patch of
        so many ratings."""
        if self.stock is not None:
            return self.stock
        rows = _sides(self.rows)
        if ratings <= FEW_SHARE * self.work.rows:
            asked = needed.mapInArrow(exchange.need_unpacker, exchange.ASKED)
            return self._packed(rows.join(F.broadcast(asked), ["side", "slot"], "left_semi"))
        self.stock = self._packed(rows).persist()
        return self.stock

    def _packed(self, rows: DataFrame) -> DataFrame:
        """Factor rows (side, slot, factors) as `exchange.STOCK`."""
        pack = exchange.packer(self.solver.rank, self.paging)
        return rows.select("side", "slot", "factors").mapInArrow(pack, exchange.STOCK)

    def _fetched(self, needed: DataFrame, stock: DataFrame) -> DataFrame:
        """Factors as they are now (`exchange.MESSAGES`) of needed rows (`exchange.NEEDED`)."""
        stock = stock.select(
            *("side", "page", "slots", "factors"),
            F.lit(None).cast("binary").alias("solved"),
            F.lit(0).alias("round"),
        )
        if self.results:
            stock = stock.unionByName(self._all_results())
        return (
            self._by_page(needed)
            .cogroup(self._by_page(stock))
            .applyInArrow(exchange.fetcher(self.solver.rank), exchange.MESSAGES)
        )

    def _settle(
        self,
        patch: Mapping[str, str],
        ratings: int,
        chunks: Mapping[str, Collection[int] | None],
        eager: Container[str],
    ) -> DataFrame:
        """What became of a patch (`RESULTS`)."""
        n_parts = -(-ratings // self.execution.part_ratings)
        if len(patch) == 1:
            n_parts = max(n_parts, min(self.parallelism, ratings // TASK_RATINGS), 1)
            n_parts = self._whole_waves(n_parts)
        keys = balanced_keys(n_parts)
        spare = max(SPARE_RATINGS, SPARE_SHARE * 2 * self.work.ratings)
        parts = self.ratings_of(patch, keys, chunks).persist()
        needed = parts.mapInArrow(exchange.need_finder(self.paging), exchange.NEEDED)
        messages = self._fetched(needed, self._stock_for(needed, ratings))
        settled = (
            parts.groupBy("key")
            .cogroup(messages.repartition(len(keys), "key").groupBy("key"))
            .applyInArrow(
                settler(self.solver, self._levels, self.grams, spare, eager, self.paging),
                RESULTS,
            )
        )
        result = self._checkpoint(settled)
        parts.unpersist()
        return result

    def _checkpoint(self, frame: DataFrame) -> DataFrame:
        return materialise(frame, self.execution.checkpoint)


def _sides(frames: Mapping[str, DataFrame]) -> DataFrame:
    """The rows of both sides, told apart by `side`."""
    return _union([frames[side].withColumn("side", F.lit(side)) for side in SIDES])


def _union(frames: Sequence[DataFrame]) -> DataFrame:
    """All rows, with nulls for the columns that a frame lacks."""
    return reduce(lambda left, right: left.unionByName(right, allowMissingColumns=True), frames)


def _in_blocks(blocks: Mapping[str, Collection[int]] | None) -> Column:
    """Is a row (side, block) in one of these? None: in any."""
    return F.lit(True) if blocks is None else F.expr(in_blocks_of_sides(blocks))
