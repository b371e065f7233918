"""The frontier loop: re-solve what a change disturbed, then what that disturbed, until quiet.

    changes --push--> ledger --rows over tau--> re-solve --push--> ledger of the other side
                        ^                                               |
                        +-----------------------------------------------+

Every factor row carries an upper bound of its residual. When no bound exceeds tau, every row of
both sides solves its retained ratings' equations to tau, and nothing else has to be read to know
it. The idea of starting from the trained factors is Unlearn-ALS (Xu et al. 2023, arXiv
2302.06676); the bounds make it local.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
from numpy.typing import NDArray
from pyspark.sql import functions as F

from unlearn_spark.als.blocks import RatingBlock, concatenate, raw
from unlearn_spark.als.kernel import relative_residual, row_residuals, solve_rows
from unlearn_spark.als.spark import (
    PART_SCHEMA,
    SIDES,
    arrays_of,
    balanced_keys,
    binary_table,
    list_column,
    materialise,
    matrix_of,
    other_side,
    part_key,
    part_of,
)
from unlearn_spark.tables.factors import bound_expression
from unlearn_spark.unlearning.ledger import drift, gram, moved_terms, rating_terms

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame

    from unlearn_spark.als.sweep import Solver
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
)

_LOADED = (
    "key int, slots binary, counts binary, others binary, values binary, "
    "slot int, other int, value float, change int, seq long"
)
_SOLVED = (
    "slots binary, factors binary, gradient_norms binary, b_norms binary, solved binary, "
    "push_slots binary, push_gradients binary, push_bs binary, gram_change binary, "
    "n_solved long, n_ratings long, scanned_ratings long"
)
_FACTOR_ROWS = (
    "slot int, factors array<float>, gradient_norm double, b_norm double, factor_norm double, "
    "solved boolean"
)
_PUSHES = "slot int, gradient double, b double"


Places = Sequence[tuple[int, int]]
"""(block, chunk)s."""

MOST_PLACES = 512
"""Beyond this many chunks whole blocks are looked through."""

MOST_SWEEPS = 4.0
"""Work in rounds after which sweeping everything is thought to be cheaper."""

MOST_MOVED = 8
"""Rounds of one side whose results are kept apart."""

BROADCAST_ROWS = 1_000_000
"""Up to this many small rows are sent to every executor instead of shuffling factors."""


@dataclass(frozen=True)
class SideState:
    """How the ledger of one side stands.

    Attributes
    ----------
    over
        Rows whose bound exceeds tau.
    ratings
        Ratings of the rows whose bound exceeds the lower mark.
    worst
        The largest bound.
    places
        Chunks in which those rows lie; None: too many to list.
    """

    over: int
    ratings: int
    worst: float
    places: Places | None


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
        pushes = both.groupBy("side", "key").applyInArrow(push, "side string, " + _PUSHES)
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
            *[c for c in LEDGER_COLUMNS if c not in ("gradient_norm", "b_norm", "factor_norm")],
            grown.alias("gradient_norm"),
            F.greatest(F.col("b_norm") - F.coalesce("b", F.lit(0.0)), F.lit(0.0)).alias("b_norm"),
            "factor_norm",
        )

    def run(self) -> float | None:
        """Rounds until no bound exceeds tau; returns the largest, or None when the loop is not the
        cheaper way."""
        while True:
            state = self.summary()
            over = {side: state[side] for side in SIDES if state[side].over}
            if not over:
                return max(state[side].worst for side in SIDES)
            if self.rounds >= self.settings.max_rounds or self.work.sweeps > MOST_SWEEPS:
                return None
            # The side with less to do first: its rows often quieten the other.
            side = min(over, key=lambda name: over[name].ratings)
            self.rounds += 1
            self.resolve(side, over[side])
            self.progress(
                f"round {self.rounds}: {over[side].over} {side} rows over tau, "
                f"largest bound {over[side].worst:.1e}; {self.work.sweeps:.3f} sweeps so far"
            )

    def summary(self) -> dict[str, SideState]:
        """How each side stands."""
        tau = self.settings.tau
        marked = bound_expression() > self.settings.mark
        place = F.when(marked & (F.col("chunk") >= 0), F.struct("block", "chunk"))
        rows = (
            self.ledger.groupBy("side")
            .agg(
                F.count_if(bound_expression() > tau).alias("over"),
                F.coalesce(F.sum(F.when(marked, F.col("n_ratings"))), F.lit(0)).alias("ratings"),
                F.coalesce(F.max(bound_expression()), F.lit(0.0)).alias("worst"),
                F.collect_set(place).alias("places"),
            )
            .withColumn("places", F.when(F.size("places") <= MOST_PLACES, F.col("places")))
            .collect()
        )
        found = {
            row["side"]: SideState(
                row["over"],
                row["ratings"],
                row["worst"],
                None if row["places"] is None else [tuple(place) for place in row["places"]],
            )
            for row in rows
        }
        return {side: found.get(side, SideState(0, 0, 0.0, [])) for side in SIDES}

    def resolve(self, side: str, state: SideState) -> None:
        """Look at the rows of a side over the lower mark: scan them, re-solve those that need it,
        and push what moved into the other side."""
        mark = self.settings.mark
        active = self.ledger.where((F.col("side") == side) & (bound_expression() > mark))
        useful = max(1, min(self.parallelism, state.ratings // 200_000))
        n_parts = max(useful, -(-state.ratings // self.execution.part_ratings))
        result = self._solve(side, active, balanced_keys(n_parts), mark, state)
        figures = result.select("gram_change", "n_solved", "n_ratings", "scanned_ratings").collect()
        for row in figures:
            self.work.add(row["n_ratings"], row["n_solved"], row["scanned_ratings"])
        rows = result.mapInArrow(_factor_rows(self.solver.rank), _FACTOR_ROWS)
        pushes = result.mapInArrow(_push_rows, _PUSHES).withColumn("side", F.lit(other_side(side)))
        drifts = {}
        if self.solver.objective.implicit_prefs:
            k = self.solver.rank
            change = sum(
                (np.frombuffer(row["gram_change"]).reshape(k, k) for row in figures),
                np.zeros((k, k)),
            )
            self.grams[side] = self.grams[side] + change
            drifts[side] = drift(change)
        fresh = rows.select(
            F.lit(side).alias("side"),
            "slot",
            F.col("gradient_norm").alias("g"),
            F.col("b_norm").alias("n"),
            F.col("factor_norm").alias("f"),
        )
        replaced = self.ledger.join(fresh, ["side", "slot"], "left").select(
            *[c for c in LEDGER_COLUMNS if c not in ("gradient_norm", "b_norm", "factor_norm")],
            F.coalesce("g", "gradient_norm").alias("gradient_norm"),
            F.coalesce("n", "b_norm").alias("b_norm"),
            F.coalesce("f", "factor_norm").alias("factor_norm"),
        )
        self.ledger = self._checkpoint(self._pushed(replaced, pushes, drifts))
        moved = rows.where("solved").select("slot", "factors")
        self.moved[side].append(moved.withColumn("round", F.lit(self.rounds)))
        if len(self.moved[side]) >= MOST_MOVED:
            # One frame for many: a long chain would make every plan longer.
            merged = self.solved(side)
            assert merged is not None
            self.moved[side] = [self._checkpoint(merged.withColumn("round", F.lit(self.rounds)))]

    def _solve(
        self,
        side: str,
        active: DataFrame,
        keys: tuple[int, ...],
        mark: float,
        state: SideState,
    ) -> DataFrame:
        other = other_side(side)
        parts = self.ratings_of(side, active, keys, state.places).persist()
        needed = parts.mapInArrow(_distinct_others, "key int, slot int")
        if state.ratings <= BROADCAST_ROWS:  # at most one needed row for each rating
            needed = F.broadcast(needed)
        theirs = self.current(other, needed).select(
            "key", "slot", "factors", F.lit(False).alias("own"), F.lit(False).alias("forced")
        )
        mine = active.select(
            part_key("slot", keys).alias("key"),
            "slot",
            (F.col("gradient_norm") == float("inf")).alias("forced"),
        )
        if state.ratings <= BROADCAST_ROWS:
            mine = F.broadcast(mine)
        mine = self.current(side, mine).select(
            "key", "slot", "factors", F.lit(True).alias("own"), "forced"
        )
        messages = theirs.unionByName(mine).repartition(len(keys), "key")
        solve = _row_solver(self.solver, mark, self.grams.get(other))
        result = self._checkpoint(
            parts.groupBy("key").cogroup(messages.groupBy("key")).applyInArrow(solve, _SOLVED)
        )
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
    """(key, slot) of the other side's rows that each part needs; a part lies in one partition."""
    needed: dict[int, list[NDArray[np.int32]]] = {}
    for batch in batches:
        for row in arrays_of(batch):
            slots = np.unique(np.frombuffer(row["others"], np.int32))
            needed.setdefault(row["key"], []).append(slots)
    for key, found in needed.items():
        slots = np.unique(np.concatenate(found))
        keys = np.full(len(slots), key, np.int32)
        yield pa.RecordBatch.from_arrays([pa.array(keys), pa.array(slots)], ["key", "slot"])


def _row_solver(
    solver: Solver, mark: float, other_gram: NDArray[np.float64] | None
) -> Callable[[pa.Table, pa.Table], pa.Table]:
    rank, objective = solver.rank, solver.objective

    def solve(left: pa.Table, right: pa.Table) -> pa.Table:
        if not left.num_rows:
            return pa.table({name: pa.array([], kind) for name, kind in _SOLVED_KINDS.items()})
        block = part_of(left)[1]
        own = right.filter(right["own"]).sort_by("slot")
        theirs = right.filter(pa.compute.invert(right["own"])).sort_by("slot")
        slots = own["slot"].to_numpy()
        if not np.array_equal(slots, block.slots):
            raise ValueError("active rows and their ratings differ; the rating blocks are damaged")
        before = matrix_of(own["factors"], rank)
        forced = own["forced"].to_numpy(zero_copy_only=False)
        neighbours = theirs["slot"].to_numpy()
        y = matrix_of(theirs["factors"], rank)
        index = np.searchsorted(neighbours, block.others).astype(np.int32)
        if block.n_ratings and (
            index.max() >= len(neighbours) or (neighbours[index] != block.others).any()
        ):
            raise ValueError("a rating names a row without factors; the rating blocks are damaged")
        gradient, b = row_residuals(
            block.indptr, index, block.values, y, before, objective, gram=other_gram
        )
        needs = (relative_residual(gradient, b) > mark) | forced
        after = before.copy()
        sub = block.rows(needs)
        sub_index = np.searchsorted(neighbours, sub.others).astype(np.int32)
        pushes = (np.zeros(len(neighbours)), np.zeros(len(neighbours)))
        change = np.zeros((rank, rank))
        if len(sub.slots):
            solved = solve_rows(
                sub.indptr,
                sub_index,
                sub.values,
                y,
                objective,
                gram=other_gram,
                dtype=np.float64 if solver.dtype == "float64" else np.float32,
            ).factors
            after[needs] = solved
            gradient[needs], b[needs] = row_residuals(
                sub.indptr, sub_index, sub.values, y, solved, objective, gram=other_gram
            )
            moved = moved_terms(
                sub.indptr, sub_index, sub.values, y, solved, before[needs], objective
            )
            pushes = moved.norms()
            change = gram(solved) - gram(before[needs])
        return binary_table(
            [
                {
                    "slots": raw(block.slots, np.int32),
                    "factors": raw(after, np.float32),
                    "gradient_norms": raw(gradient, np.float64),
                    "b_norms": raw(b, np.float64),
                    "solved": raw(needs, np.bool_),
                    "push_slots": raw(neighbours, np.int32),
                    "push_gradients": raw(pushes[0], np.float64),
                    "push_bs": raw(pushes[1], np.float64),
                    "gram_change": raw(change, np.float64),
                    "n_solved": sub.n_rows,
                    "n_ratings": sub.n_ratings,
                    "scanned_ratings": block.n_ratings,
                }
            ],
            **{n: pa.int64() for n in ("n_solved", "n_ratings", "scanned_ratings")},
        )

    return solve


_SOLVED_KINDS = {
    name: pa.int64() if kind == "long" else pa.binary()
    for name, kind in (field.split() for field in _SOLVED.split(", "))
}


def _factor_rows(
    rank: int,
) -> Callable[[Iterable[pa.RecordBatch]], Iterable[pa.RecordBatch]]:
    def unpack(batches: Iterable[pa.RecordBatch]) -> Iterable[pa.RecordBatch]:
        for batch in batches:
            for row in arrays_of(batch):
                factors = np.frombuffer(row["factors"], np.float32).reshape(-1, rank)
                norms = np.linalg.norm(factors.astype(np.float64), axis=1)
                yield from pa.table(
                    {
                        "slot": pa.array(np.frombuffer(row["slots"], np.int32)),
                        "factors": list_column(factors),
                        "gradient_norm": pa.array(np.frombuffer(row["gradient_norms"])),
                        "b_norm": pa.array(np.frombuffer(row["b_norms"])),
                        "factor_norm": pa.array(norms),
                        "solved": pa.array(np.frombuffer(row["solved"], np.bool_)),
                    }
                ).to_batches()

    return unpack


def _push_rows(batches: Iterable[pa.RecordBatch]) -> Iterable[pa.RecordBatch]:
    for batch in batches:
        for row in arrays_of(batch):
            gradient = np.frombuffer(row["push_gradients"])
            moved = gradient > 0
            yield from pa.table(
                {
                    "slot": pa.array(np.frombuffer(row["push_slots"], np.int32)[moved]),
                    "gradient": pa.array(gradient[moved]),
                    "b": pa.array(np.frombuffer(row["push_bs"])[moved]),
                }
            ).to_batches()
