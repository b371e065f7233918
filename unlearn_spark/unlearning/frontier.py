"""The frontier loop: re-solve what a change disturbed, then what that disturbed, until quiet.

    changes --push--> ledger --rows over tau--> patch: re-solve --push--> ledger outside of it
                        ^                                                        |
                        +--------------------------------------------------------+

Every factor row carries an upper bound of its residual. When no bound exceeds tau, every row of
both sides solves its retained ratings' equations to tau, and nothing else has to be read to know
it. The idea of starting from the trained factors is Unlearn-ALS (Xu et al. 2023, arXiv
2302.06676); the bounds make it local.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
from numpy.typing import NDArray
from pyspark.sql import functions as F

from unlearn_spark.als.blocks import SIDES, RatingBlock, concatenate, other_side
from unlearn_spark.als.encoding import TASK_RATINGS
from unlearn_spark.als.spark import (
    PART_SCHEMA,
    arrays_of,
    balanced_keys,
    binary_table,
    list_column,
    materialise,
    matrix_of,
    part_key,
)
from unlearn_spark.tables.factors import bound_expression
from unlearn_spark.unlearning.ledger import drift, rating_terms
from unlearn_spark.unlearning.patch import PatchSide, settle

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame, Row

    from unlearn_spark.als.solver import Solver
    from unlearn_spark.config import ExecutionSettings, UnlearnSettings


LEDGER_COLUMNS = (
    "side",
    "slot",
    "block",
    "chunk",
    "n_ratings",
    "gradient_norm",
    "b_norm",
    "factor_norm",
    "looked",
    "solved",
)
"""`looked`: the last round looked at the row, and was small enough for that to be of use.
`solved`: the row was re-solved tonight."""

_LOADED = (
    "key int, slots binary, counts binary, others binary, values binary, "
    "slot int, other int, value float, change int, seq long"
)
_SETTLED = (
    "side string, slots binary, factors binary, gradient_norm binary, b_norm binary, "
    "solved binary, push_slots binary, push_gradient binary, push_b binary, gram_change binary, "
    "solved_rows long, solved_ratings long, scanned_ratings long"
)
"""`patch.SettledSide`, a row for each part and side."""

_SETTLED_KINDS = {
    name: {"string": pa.string(), "long": pa.int64(), "binary": pa.binary()}[kind]
    for name, kind in (field.split() for field in _SETTLED.split(", "))
}
_FACTOR_ROWS = (
    "side string, slot int, factors array<float>, gradient_norm double, b_norm double, "
    "factor_norm double, solved boolean"
)
_PUSHES = "side string, slot int, gradient double, b double"


Places = Sequence[tuple[int, int]]
"""(block, chunk)s."""

MOST_PLACES = 512
"""Beyond this many chunks whole blocks are looked through."""

MOST_SWEEPS, SHARE_OF_TRAINING = 4.0, 0.25
"""Work in rounds after which sweeping everything is thought to be cheaper: so many sweeps, or this
share of what the training took, where that was more."""

MOST_MOVED = 8
"""Rounds of one side whose results are kept apart."""

BROADCAST_ROWS = 1_000_000
"""Up to this many small rows are sent to every executor instead of shuffling factors."""

PATCH_RATINGS = 1_000_000
"""Up to so many ratings a round takes what the round before looked at along with what is over the
mark: the two may pull at each other."""

SPARE_SHARE, SPARE_RATINGS = 0.02, 10_000
"""What a patch may solve again and again within a round: this share of a sweep's ratings, or so
many where that is more."""


@dataclass(frozen=True)
class Choice:
    """Rows of one side that a round may look at.

    Attributes
    ----------
    rows
        Which ledger entries.
    ratings
        How many they have.
    places
        Chunks in which they lie; None: too many to list.
    """

    rows: Column
    ratings: int
    places: Places | None


@dataclass(frozen=True)
class SideState:
    """How the ledger of one side stands.

    Attributes
    ----------
    over
        Rows whose bound exceeds tau.
    worst
        The largest bound.
    solved, solved_blocks
        Rows that were re-solved tonight, and the blocks in which they lie.
    marked
        The rows over the lower mark.
    looked
        The rows that the last round looked at.
    either
        Both.
    """

    over: int
    worst: float
    solved: int
    solved_blocks: Sequence[int]
    marked: Choice
    looked: Choice
    either: Choice


@dataclass
class Work:
    """Arithmetic done so far, and the size of a sweep to measure it by."""

    rank: int
    ratings: int
    rows: int
    done: float = 0.0

    def add(self, ratings: int, rows: int, scanned: int = 0) -> None:
        """Solves of `rows` rows with `ratings` ratings, and residuals of `scanned` ratings."""
        self.done += ratings * self.rank**2 + rows * self.rank**3 + scanned * self.rank

    @property
    def sweeps(self) -> float:
        """In units of one full sweep: ratings on both sides x rank^2 + rows x rank^3."""
        whole = 2 * self.ratings * self.rank**2 + self.rows * self.rank**3
        return self.done / whole if whole else 0.0


@dataclass
class Frontier:
    """The state of one night, and the steps that change it.

    Attributes
    ----------
    solver
        Objective, rank and precision.
    factors
        By side: slot, factors - as published, rows that left taken out and new rows put in.
    chunks
        Packed ratings of both sides (`encoding.CHUNK_SCHEMA`).
    changes
        side, slot, other_slot, value, change, model_version: since the chunks were packed,
        tonight's included.
    ledger
        Both sides, columns of `LEDGER_COLUMNS`; after every step true bounds.
    training_sweeps
        Sweeps that the model's training took; 0 where that is not known.
    """

    solver: Solver
    factors: dict[str, DataFrame]
    chunks: DataFrame
    changes: DataFrame
    ledger: DataFrame
    settings: UnlearnSettings
    execution: ExecutionSettings
    parallelism: int
    work: Work
    progress: Callable[[str], None] = lambda message: None
    rounds: int = 0
    moved: dict[str, list[DataFrame]] = field(default_factory=lambda: {s: [] for s in SIDES})
    grams: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    training_sweeps: int = 0

    @property
    def mark(self) -> float:
        """The residual over which rows of a patch are solved.

        In implicit mode every move disturbs every row through the Gram matrix, so that to solve a
        row early, for the sake of later rounds, makes the more work for the others.
        """
        return self.settings.tau if self.solver.objective.implicit_prefs else self.settings.mark

    # --- reading -----------------------------------------------------------------------------

    def solved(self, side: str) -> DataFrame | None:
        """(slot, factors) of the rows that were re-solved tonight, as they are now."""
        rounds = self.moved[side]
        if not rounds:
            return None
        if len(rounds) == 1:
            return rounds[0].drop("round")
        every = reduce(lambda left, right: left.unionByName(right), rounds)
        return every.groupBy("slot").agg(F.max_by("factors", "round").alias("factors"))

    def current(self, side: str, wanted: DataFrame | None = None) -> DataFrame:
        """(slot, factors) of a side, with what was re-solved tonight.

        Parameters
        ----------
        wanted
            slot, and whatever else the result shall keep; every row by default.
        """
        rows = self.factors[side]
        if wanted is not None:
            rows = wanted.join(rows, "slot")
        moved = self.solved(side)
        if moved is None:
            return rows
        newer = moved.withColumnRenamed("factors", "newer")
        return rows.join(newer, "slot", "left").select(
            *[name for name in rows.columns if name != "factors"],
            F.coalesce("newer", "factors").alias("factors"),
        )

    def ratings_of(
        self, side: str, active: DataFrame, keys: tuple[int, ...], places: Places | None = None
    ) -> DataFrame:
        """Rating parts (`PART_SCHEMA`) of the active rows alone.

        Parameters
        ----------
        active
            slot, block, chunk.
        keys
            One for each part; a row belongs to part `slot % len(keys)`.
        places
            The (block, chunk)s in which the active rows lie, where they are known and few: no
            other file is read.
        """
        wanted = (
            active.where("chunk >= 0")
            .groupBy("block", "chunk")
            .agg(F.collect_list("slot").alias("wanted"))
        )
        chunks = self.chunks.where(F.col("side") == side)
        if places is not None:
            chunks = chunks.where(_at(places))
        stored = (
            chunks.join(F.broadcast(wanted), ["block", "chunk"])
            .select("wanted", "slots", "counts", "others", "values")
            .mapInArrow(_keep_wanted(keys), _LOADED)
        )
        nothing = F.lit(None).cast("binary")
        overlay = (
            self.changes.where(F.col("side") == side)
            .join(F.broadcast(active.select("slot")), "slot")
            .select(
                part_key("slot", keys).alias("key"),
                *[nothing.alias(name) for name in ("slots", "counts", "others", "values")],
                "slot",
                F.col("other_slot").alias("other"),
                "value",
                "change",
                F.col("model_version").alias("seq"),
            )
        )
        numbers = {key: part for part, key in enumerate(keys)}

        def join_up(table: pa.Table) -> pa.Table:
            number = table["key"][0].as_py()
            block = _overlaid(table)
            place = {"key": number, "part": numbers[number]}
            return binary_table([{**place, **piece.to_binary()} for piece in block.pieces()])

        # As many partitions as parts: adaptive execution would join them by their size.
        loaded = stored.unionByName(overlay).repartition(len(keys), "key")
        return (
            loaded.groupBy("key")
            .applyInArrow(join_up, PART_SCHEMA)
            .repartition(len(keys), "key")  # so that cogroups find the parts where they lie
        )

    # --- steps -------------------------------------------------------------------------------

    def push_changes(self, tonight: DataFrame, gram_changes: dict[str, Any]) -> None:
        """Put tonight's ratings into the ledger.

        Parameters
        ----------
        tonight
            user_slot, item_slot, value, change (-1 removed, +1 added), user_factors, item_factors:
            the factors of both rows as they were (or start, for new rows).
        gram_changes
            By side: float64 (rank, rank) change of its Gram matrix because rows left or came;
            None in explicit mode.
        """
        parts = [
            tonight.select(
                F.lit(side).alias("side"),
                F.col(f"{side}_slot").alias("slot"),
                "value",
                "change",
                F.col(f"{side}_factors").alias("y"),
                F.col(f"{other_side(side)}_factors").alias("x"),
            )
            for side in SIDES
        ]
        rank, objective = self.solver.rank, self.solver.objective

        def push(table: pa.Table) -> pa.Table:
            slots, first, rows = np.unique(
                table["slot"].to_numpy(), return_index=True, return_inverse=True
            )
            y = matrix_of(table["y"], rank)[first]
            x = matrix_of(table["x"], rank)
            values = table["value"].to_numpy()
            added = table["change"].to_numpy() > 0
            index = np.arange(len(values))
            change = [
                rating_terms(rows[which], index[which], values[which], y, x, objective)
                for which in (added, ~added)
            ]
            gradient, b = (change[0] - change[1]).norms()
            return pa.table(
                {
                    "side": pa.array([table["side"][0].as_py()] * len(slots)),
                    "slot": pa.array(slots, pa.int32()),
                    "gradient": pa.array(gradient),
                    "b": pa.array(b),
                }
            )

        both = parts[0].unionByName(parts[1]).withColumn("key", F.pmod("slot", F.lit(64)))
        pushes = both.groupBy("side", "key").applyInArrow(push, _PUSHES)
        self.ledger = self._checkpoint(
            self._pushed(
                self.ledger,
                pushes,
                {side: drift(m) if m is not None else 0.0 for side, m in gram_changes.items()},
                force=self.settings.direct_rows == "resolve",
            )
        )
        for side, change in gram_changes.items():
            if change is not None:
                self.grams[side] = change + self.grams[side]

    def _pushed(
        self, ledger: DataFrame, pushes: DataFrame, drifts: dict[str, float], force: bool = False
    ) -> DataFrame:
        """The ledger after pushes (side, slot, gradient, b) and drifts of the Gram matrices.

        A drift of the users' Gram matrix disturbs every item, in proportion to its factor norm,
        and the reverse.
        """
        sums = pushes.groupBy("side", "slot").agg(
            F.sum("gradient").alias("gradient"), F.sum("b").alias("b")
        )
        lazily = F.lit(0.0)
        for side, amount in drifts.items():
            if amount:
                disturbed = F.col("side") == other_side(side)
                lazily = lazily + F.when(disturbed, F.lit(amount)).otherwise(F.lit(0.0))
        grown = F.col("gradient_norm") + F.coalesce("gradient", F.lit(0.0))
        grown = grown + lazily * F.col("factor_norm")
        if force:
            grown = F.when(F.col("gradient").isNotNull(), F.lit(float("inf"))).otherwise(grown)
        return ledger.join(sums, ["side", "slot"], "left").select(
            *[name for name in LEDGER_COLUMNS if name not in ("gradient_norm", "b_norm")],
            grown.alias("gradient_norm"),
            F.greatest(F.col("b_norm") - F.coalesce("b", F.lit(0.0)), F.lit(0.0)).alias("b_norm"),
        )

    def run(self) -> dict[str, SideState] | None:
        """Rounds until no bound exceeds tau; returns how the sides stand then, or None when the
        loop is not the cheaper way."""
        most_work = max(MOST_SWEEPS, SHARE_OF_TRAINING * self.training_sweeps)
        while True:
            state = self.summary()
            over = {side: state[side].over for side in SIDES if state[side].over}
            if not over:
                return state
            if self.rounds >= self.settings.max_rounds or self.work.sweeps > most_work:
                return None
            self.resolve(self._patch(state), over)
            rows = " and ".join(f"{n} {side}" for side, n in over.items())
            worst = max(state[side].worst for side in SIDES)
            self.progress(
                f"round {self.rounds}: {rows} rows over tau, largest bound {worst:.1e}; "
                f"{self.work.sweeps:.3f} sweeps so far"
            )

    def summary(self) -> dict[str, SideState]:
        """How each side stands."""
        marked = bound_expression() > self.mark
        choices = {"marked": marked, "looked": F.col("looked"), "either": marked | F.col("looked")}
        aggregates = [
            F.count_if(bound_expression() > self.settings.tau).alias("over"),
            F.coalesce(F.max(bound_expression()), F.lit(0.0)).alias("worst"),
            F.count_if("solved").alias("solved"),
            F.collect_set(F.when(F.col("solved"), F.col("block"))).alias("solved_blocks"),
        ]
        for name, these in choices.items():
            place = F.when(these & (F.col("chunk") >= 0), F.struct("block", "chunk"))
            places = F.collect_set(place)
            count = F.coalesce(F.sum(F.when(these, F.col("n_ratings"))), F.lit(0))
            some = F.when(F.size(places) <= MOST_PLACES, places)
            aggregates.append(F.struct(count.alias("n"), some.alias("places")).alias(name))
        found = {row["side"]: row for row in self.ledger.groupBy("side").agg(*aggregates).collect()}

        def state(row: Row) -> SideState:
            each = {
                name: Choice(
                    these,
                    row[name]["n"],
                    None
                    if row[name]["places"] is None
                    else [tuple(p) for p in row[name]["places"]],
                )
                for name, these in choices.items()
            }
            return SideState(row["over"], row["worst"], row["solved"], row["solved_blocks"], **each)

        nothing = Choice(F.lit(False), 0, [])
        none = SideState(0, 0.0, 0, [], nothing, nothing, nothing)
        return {side: state(found[side]) if side in found else none for side in SIDES}

    def _patch(self, state: dict[str, SideState]) -> dict[str, Choice]:
        """What the next round looks at.

        Rows over the mark, and as long as that is little what the round before looked at: rows of
        the two sides that pull at each other are settled together. What no single task can hold
        is one side's rows over the mark, spread over tasks.
        """
        over = [side for side in SIDES if state[side].over]
        patch = {side: state[side].either if side in over else state[side].looked for side in SIDES}
        most = min(PATCH_RATINGS, self.execution.part_ratings)
        if sum(choice.ratings for choice in patch.values()) > most:
            patch = {side: state[side].marked for side in over}
        if sum(choice.ratings for choice in patch.values()) > self.execution.part_ratings:
            # The side with less to do first: its rows often quieten the other.
            side = min(over, key=lambda name: patch[name].ratings)
            patch = {side: patch[side]}
        return {side: choice for side, choice in patch.items() if choice.ratings}

    def resolve(self, patch: dict[str, Choice], eager: Container[str]) -> None:
        """Look at the rows of a patch: scan them, re-solve those over the mark, and push what
        moved into the rows outside.

        A patch of both sides is solved by one task; rows of one side may be spread over several.
        `eager`: the sides with rows over tau.
        """
        self.rounds += 1
        result = self._settle(patch, eager)
        rank = self.solver.rank
        columns = ["side", "gram_change", "solved_rows", "solved_ratings", "scanned_ratings"]
        drifts: dict[str, float] = {}
        changes = {side: np.zeros((rank, rank)) for side in SIDES}
        for row in result.select(columns).collect():
            self.work.add(row["solved_ratings"], row["solved_rows"], row["scanned_ratings"])
            changes[row["side"]] += np.frombuffer(row["gram_change"]).reshape(rank, rank)
        if self.solver.objective.implicit_prefs:
            self.grams = {side: self.grams[side] + changes[side] for side in SIDES}
            drifts = {side: drift(changes[side]) for side in SIDES}
        rows = result.mapInArrow(_factor_rows(rank), _FACTOR_ROWS)
        fresh = rows.select(
            "side",
            "slot",
            F.struct("gradient_norm", "b_norm", "factor_norm", "solved").alias("fresh"),
        )
        small = sum(choice.ratings for choice in patch.values()) <= PATCH_RATINGS
        # What a patch says of its own rows is final: no push, and no drift, comes on top.
        pushed = self._pushed(self.ledger, result.mapInArrow(_push_rows, _PUSHES), drifts)
        self.ledger = self._checkpoint(
            pushed.join(fresh, ["side", "slot"], "left")
            .withColumns(
                {
                    **{
                        name: F.coalesce(F.col("fresh")[name], F.col(name))
                        for name in ("gradient_norm", "b_norm", "factor_norm")
                    },
                    "looked": F.col("fresh").isNotNull() & F.lit(small),
                    "solved": F.col("solved") | F.coalesce(F.col("fresh.solved"), F.lit(False)),
                }
            )
            .select(*LEDGER_COLUMNS)
        )
        for side in patch:
            moved = rows.where("solved").where(F.col("side") == side).select("slot", "factors")
            self.moved[side].append(moved.withColumn("round", F.lit(self.rounds)))
            if len(self.moved[side]) >= MOST_MOVED:
                # One frame for many: a long chain would make every plan longer.
                merged = self.solved(side)
                assert merged is not None
                kept = self._checkpoint(merged.withColumn("round", F.lit(self.rounds)))
                self.moved[side] = [kept]

    def _settle(self, patch: dict[str, Choice], eager: Container[str]) -> DataFrame:
        """`patch.SettledSide`s (`_SETTLED_KINDS`) of a patch; `eager`: the sides over tau."""
        ratings = sum(choice.ratings for choice in patch.values())
        n_parts = -(-ratings // self.execution.part_ratings)
        if len(patch) == 1:
            n_parts = max(n_parts, min(self.parallelism, ratings // TASK_RATINGS), 1)
        keys = balanced_keys(n_parts)
        spare = max(SPARE_RATINGS, SPARE_SHARE * 2 * self.work.ratings)
        small = ratings <= BROADCAST_ROWS  # at most one needed row for each rating
        active = {
            side: self.ledger.where((F.col("side") == side) & choice.rows)
            for side, choice in patch.items()
        }
        parts = reduce(
            lambda left, right: left.unionByName(right),
            (
                self.ratings_of(side, active[side], keys, choice.places).withColumn(
                    "side", F.lit(side)
                )
                for side, choice in patch.items()
            ),
        ).persist()
        neighbours = parts.mapInArrow(_distinct_others, "side string, key int, slot int")
        messages = []
        for side in SIDES:
            wanted = neighbours.where(F.col("side") == side).select(
                "key", "slot", F.lit(False).alias("own"), F.lit(False).alias("forced")
            )
            if side in active:
                mine = active[side].select(
                    part_key("slot", keys).alias("key"),
                    "slot",
                    F.lit(True).alias("own"),
                    (F.col("gradient_norm") == float("inf")).alias("forced"),
                )
                wanted = wanted.unionByName(mine)
            wanted = self.current(side, F.broadcast(wanted) if small else wanted)
            messages.append(wanted.withColumn("side", F.lit(side)))
        placed = messages[0].unionByName(messages[1]).repartition(len(keys), "key")
        levels = (self.settings.tau, self.mark)
        settled = (
            parts.groupBy("key")
            .cogroup(placed.groupBy("key"))
            .applyInArrow(_settler(self.solver, levels, self.grams, spare, eager), _SETTLED)
        )
        result = self._checkpoint(settled)
        parts.unpersist()
        return result

    def _checkpoint(self, frame: DataFrame) -> DataFrame:
        return materialise(frame, self.execution.checkpoint)


def _at(places: Places) -> Column:
    """The chunks at these places, in a form by which files are skipped."""
    by_block: dict[int, list[int]] = {}
    for block, chunk in sorted(places):
        by_block.setdefault(block, []).append(chunk)
    here = [
        f"(block = {block} AND chunk IN ({', '.join(map(str, chunks))}))"
        for block, chunks in by_block.items()
    ]
    return F.expr(" OR ".join(here) or "false")


# --- worker side: plain arrays -----------------------------------------------------------------


def _keep_wanted(
    keys: tuple[int, ...],
) -> Callable[[Iterable[pa.RecordBatch]], Iterable[pa.RecordBatch]]:
    def keep(batches: Iterable[pa.RecordBatch]) -> Iterable[pa.RecordBatch]:
        for batch in batches:
            for row in arrays_of(batch):
                block = RatingBlock.from_binary(row)
                block = block.rows(np.isin(block.slots, np.array(row["wanted"], np.int32)))
                part = block.slots % len(keys)
                for number in np.unique(part):
                    mine = block.rows(part == number)
                    yield from pa.table(
                        {
                            "key": pa.array([keys[number]], pa.int32()),
                            **{
                                name: pa.array([bytes(value)], pa.binary())
                                for name, value in mine.to_binary().items()
                            },
                            "slot": pa.nulls(1, pa.int32()),
                            "other": pa.nulls(1, pa.int32()),
                            "value": pa.nulls(1, pa.float32()),
                            "change": pa.nulls(1, pa.int32()),
                            "seq": pa.nulls(1, pa.int64()),
                        }
                    ).to_batches()

    return keep


def _overlaid(table: pa.Table) -> RatingBlock:
    """Join the chunks of one part and apply the changes, the newest of a pair last."""
    is_change = table["change"].is_valid().to_numpy()
    stored = table.filter(pa.array(~is_change)).select(["slots", "counts", "others", "values"])
    block = RatingBlock.from_pieces(arrays_of(stored))
    if not is_change.any():
        return block
    changes = table.filter(pa.array(is_change))
    rows, others, values, change, seq = (
        changes[name].to_numpy() for name in ("slot", "other", "value", "change", "seq")
    )
    order = np.lexsort((change, seq, others, rows))
    rows, others, values, change = (a[order] for a in (rows, others, values, change))
    newest = np.append((np.diff(rows) != 0) | (np.diff(others) != 0), True)
    block = block.without(rows[newest], others[newest], keep_empty=False)
    added = newest & (change > 0)
    extra = RatingBlock.from_entries(
        rows[added].astype(np.int32),
        others[added].astype(np.int32),
        values[added].astype(np.float32),
    )
    return concatenate([block, extra]) if extra.n_ratings else block


def _distinct_others(batches: Iterable[pa.RecordBatch]) -> Iterable[pa.RecordBatch]:
    """(side, key, slot) of the rows whose factors each part needs beside its own; the pieces of a
    part lie in one partition."""
    needed: dict[tuple[str, int], list[NDArray[np.int32]]] = {}
    for batch in batches:
        for row in arrays_of(batch):
            slots = np.unique(np.frombuffer(row["others"], np.int32))
            needed.setdefault((other_side(row["side"]), row["key"]), []).append(slots)
    for (side, key), found in needed.items():
        slots = np.unique(np.concatenate(found))
        yield pa.RecordBatch.from_arrays(
            [
                pa.array([side] * len(slots)),
                pa.array(np.full(len(slots), key, np.int32)),
                pa.array(slots),
            ],
            ["side", "key", "slot"],
        )


def _settler(
    solver: Solver,
    levels: tuple[float, float],
    grams: dict[str, NDArray[np.float64]],
    spare: float,
    eager: Container[str],
) -> Callable[[pa.Table, pa.Table], pa.Table]:
    def solve(left: pa.Table, right: pa.Table) -> pa.Table:
        if not left.num_rows:
            return pa.schema(_SETTLED_KINDS).empty_table()
        pieces = arrays_of(left)
        sides = {
            side: _patch_side(
                [piece for piece in pieces if piece["side"] == side],
                right.filter(pa.compute.equal(right["side"], side)),
                solver.rank,
                side in eager,
            )
            for side in SIDES
        }
        settled = settle(solver, sides, *levels, grams, spare)
        return binary_table(
            [{"side": side, **settled[side].to_binary()} for side in SIDES], **_SETTLED_KINDS
        )

    return solve


def _patch_side(pieces: list[dict[str, Any]], rows: pa.Table, rank: int, eager: bool) -> PatchSide:
    """One side of a part from its rating pieces and the factor rows that came with them."""
    own = rows.filter(rows["own"]).sort_by("slot")
    known, first = np.unique(rows["slot"].to_numpy(), return_index=True)
    ratings = RatingBlock.from_pieces(pieces)
    if not np.array_equal(own["slot"].to_numpy(), ratings.slots):
        raise ValueError("active rows and their ratings differ; the rating blocks are damaged")
    return PatchSide(
        known.astype(np.int32),
        matrix_of(rows["factors"], rank)[first],
        ratings,
        own["forced"].to_numpy(zero_copy_only=False).astype(np.bool_),
        eager,
    )


def _factor_rows(
    rank: int,
) -> Callable[[Iterable[pa.RecordBatch]], Iterable[pa.RecordBatch]]:
    def unpack(batches: Iterable[pa.RecordBatch]) -> Iterable[pa.RecordBatch]:
        for batch in batches:
            for row in arrays_of(batch):
                slots = np.frombuffer(row["slots"], np.int32)
                factors = np.frombuffer(row["factors"], np.float32).reshape(-1, rank)
                norms = np.linalg.norm(factors.astype(np.float64), axis=1)
                yield from pa.table(
                    {
                        "side": pa.array([row["side"]] * len(slots), pa.string()),
                        "slot": pa.array(slots),
                        "factors": list_column(factors),
                        "gradient_norm": pa.array(np.frombuffer(row["gradient_norm"])),
                        "b_norm": pa.array(np.frombuffer(row["b_norm"])),
                        "factor_norm": pa.array(norms),
                        "solved": pa.array(np.frombuffer(row["solved"], np.bool_)),
                    }
                ).to_batches()

    return unpack


def _push_rows(batches: Iterable[pa.RecordBatch]) -> Iterable[pa.RecordBatch]:
    for batch in batches:
        for row in arrays_of(batch):
            slots = np.frombuffer(row["push_slots"], np.int32)
            yield from pa.table(
                {
                    "side": pa.array([row["side"]] * len(slots), pa.string()),
                    "slot": pa.array(slots),
                    "gradient": pa.array(np.frombuffer(row["push_gradient"])),
                    "b": pa.array(np.frombuffer(row["push_b"])),
                }
            ).to_batches()
