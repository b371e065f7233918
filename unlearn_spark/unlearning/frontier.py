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
                                                       |                                      |
                                                       +----------> settled <----by part------+

and one takes the results, by page, into the ledger.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
from numpy.typing import NDArray
from pyspark.sql import functions as F

from unlearn_spark.als.blocks import SIDES, RatingBlock, other_side, pair_keys, raw
from unlearn_spark.als.encoding import TASK_RATINGS
from unlearn_spark.als.solver import cut_stack
from unlearn_spark.als.spark import (
    arrays_of,
    balanced_keys,
    binary_table,
    list_column,
    materialise,
    matrix_of,
    part_key,
    pieces_table,
)
from unlearn_spark.unlearning.ledger import drift, rating_terms
from unlearn_spark.unlearning.pages import (
    COLUMNS,
    NO_CHANGES,
    NOTHING,
    PAGE_ROWS,
    Page,
    RatingChanges,
    Summary,
)
from unlearn_spark.unlearning.patch import PatchSide, SettledSide, settle

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame

    from unlearn_spark.als.kernel import Objective
    from unlearn_spark.als.solver import Solver
    from unlearn_spark.config import ExecutionSettings, UnlearnSettings


Places = Sequence[tuple[int, int]]
"""(block, chunk)s."""

MOST_SWEEPS, SHARE_OF_TRAINING = 4.0, 0.25
"""Work in rounds after which sweeping everything is thought to be cheaper: so many sweeps, or this
share of what the training took, where that was more."""

MOST_RESULTS = 8
"""Rounds whose results are kept apart."""

PATCH_RATINGS = 1_000_000
"""Up to so many ratings a round takes what the round before looked at along with what is over the
mark: the two may pull at each other."""

SPARE_SHARE, SPARE_RATINGS = 0.02, 10_000
"""What a patch may solve again and again within a round: this share of a sweep's ratings, or so
many where that is more."""

_TYPES = {
    "string": pa.string(),
    "int": pa.int32(),
    "long": pa.int64(),
    "boolean": pa.bool_(),
    "binary": pa.binary(),
}


def _kinds(schema: str) -> dict[str, pa.DataType]:
    return {name: _TYPES[kind] for name, kind in (each.split() for each in schema.split(", "))}


_BINARY_COLUMNS = ", ".join(f"{name} binary" for name in COLUMNS)
_PAGES = f"side string, page int, {_BINARY_COLUMNS}, summary binary"
"""A page of the ledger; `summary` is a pickled `pages.Summary`."""

_STOCK = "side string, page int, slots binary, factors binary"
"""Factors of rows of a page, a few rows at a time."""

_ASKED = f"side string, block int, chunk int, key int, {_BINARY_COLUMNS}"
"""What a patch asks for: `slots` of a stored chunk, or (block is null) the rows of a part."""

_LOADED = f"key int, side string, counts binary, others binary, values binary, {_BINARY_COLUMNS}"
"""Packed ratings of a part, or (counts is null) its ledger entries with their changes."""

_PARTS = (
    "key int, part int, side string, slots binary, counts binary, others binary, values binary, "
    "forced binary"
)
"""`spark.PART_SCHEMA` with the side, and which rows must be solved."""

_NEEDED = "side string, page int, key int, slots binary"
_MESSAGES = "side string, key int, slots binary, factors binary"

_RESULTS = (
    "side string, page int, slots binary, factors binary, gradient_norm binary, b_norm binary, "
    "factor_norm binary, solved binary, push_slots binary, push_gradient binary, push_b binary, "
    "gram_change binary, solved_rows long, solved_ratings long, scanned_ratings long"
)
"""`patch.SettledSide` by page; its totals stand on the first row of each part and side."""

_TOTALS = ("side", "gram_change", "solved_rows", "solved_ratings", "scanned_ratings")
_MOVED = "slot int, factors array<float>, round int"
_ENTRIES = (
    "side string, slot int, block int, chunk int, gradient_norm double, b_norm double, "
    "factor_norm double"
)


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
    rows
        By side: slot, n_ratings, factors - as published, and new rows. Those that left have no
        ratings.
    chunks
        Packed ratings of both sides (`encoding.CHUNK_SCHEMA`).
    n_blocks
        By side.
    n_rows
        Of both sides.
    training_sweeps
        Sweeps that the model's training took; 0 where that is not known.
    pages
        The ledger of both sides (`_PAGES`); after every step true bounds.
    stock
        The factors of `rows` (`_STOCK`).
    results
        Of each round (`_RESULTS`), oldest first.
    """

    solver: Solver
    rows: dict[str, DataFrame]
    chunks: DataFrame
    settings: UnlearnSettings
    execution: ExecutionSettings
    parallelism: int
    n_blocks: dict[str, int]
    work: Work
    progress: Callable[[str], None] = lambda message: None
    training_sweeps: int = 0
    grams: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    rounds: int = 0
    pages: DataFrame = field(init=False)
    stock: DataFrame = field(init=False)
    results: list[DataFrame] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self.page_keys = balanced_keys(-(-max(1, self.work.rows) // PAGE_ROWS))

    @property
    def mark(self) -> float:
        """The residual over which rows of a patch are solved.

        In implicit mode every move disturbs every row through the Gram matrix, so that to solve a
        row early, for the sake of later rounds, makes the more work for the others.
        """
        return self.settings.tau if self.solver.objective.implicit_prefs else self.settings.mark

    # --- reading -----------------------------------------------------------------------------

    def current(self, side: str) -> DataFrame:
        """(slot, factors) of a side, with what was re-solved tonight."""
        rows = self.rows[side].select("slot", "factors")
        if not self.results:
            return rows
        moved = (
            self._everything()
            .where(F.col("side") == side)
            .mapInArrow(_moved_rows(self.solver.rank), _MOVED)
        )
        newer = moved.groupBy("slot").agg(F.max_by("factors", "round").alias("newer"))
        return rows.join(newer, "slot", "left").select(
            "slot", F.coalesce("newer", "factors").alias("factors")
        )

    def entries(self) -> DataFrame:
        """The ledger of both sides as rows: side, slot, block, chunk and the three norms."""
        n_blocks = self.n_blocks

        def unpack(batches: Iterable[pa.RecordBatch]) -> Iterable[pa.RecordBatch]:
            for batch in batches:
                for row in arrays_of(batch):
                    page = Page.from_binary(row)
                    yield pa.RecordBatch.from_pydict(
                        {
                            "side": pa.array([row["side"]] * len(page.slots), pa.string()),
                            "slot": page.slots,
                            "block": page.slots % np.int32(n_blocks[row["side"]]),
                            "chunk": page.chunks,
                            "gradient_norm": page.gradient_norm,
                            "b_norm": page.b_norm,
                            "factor_norm": page.factor_norm,
                        }
                    )

        return self.pages.mapInArrow(unpack, _ENTRIES)

    def ratings_of(
        self, patch: Mapping[str, str], keys: tuple[int, ...], places: Mapping[str, Places | None]
    ) -> DataFrame:
        """Rating parts (`_PARTS`) of the chosen rows alone, as they are with all changes.

        Parameters
        ----------
        patch
            By side which rows (`pages.CHOICES`, or every row).
        keys
            One for each part; a row belongs to part `slot % len(keys)`.
        places
            By side the (block, chunk)s in which these rows lie, where they are known and few: no
            other file is read.
        """
        asked = self.pages.where(F.col("side").isin(list(patch))).mapInArrow(
            _ask(dict(patch), self.mark, keys, self.n_blocks), _ASKED
        )
        chunks = [
            self.chunks.where(F.col("side") == side).where(_at(places.get(side))) for side in patch
        ]
        wanted = asked.where("block IS NOT NULL").select(
            "side", "block", "chunk", F.col("slots").alias("wanted")
        )
        stored = (
            reduce(lambda left, right: left.unionByName(right), chunks)
            .join(F.broadcast(wanted), ["side", "block", "chunk"])
            .select("side", "wanted", "slots", "counts", "others", "values")
            .mapInArrow(_keep_wanted(keys), _LOADED)
        )
        nothing = F.lit(None).cast("binary")
        rows = asked.where("block IS NULL").select(
            "key",
            "side",
            *[nothing.alias(name) for name in ("counts", "others", "values")],
            *COLUMNS,
        )
        numbers = {key: part for part, key in enumerate(keys)}

        def join_up(table: pa.Table) -> pa.Table:
            loaded = arrays_of(table)
            key = loaded[0]["key"]
            found: list[dict[str, Any]] = []
            for side in SIDES:
                mine = [row for row in loaded if row["side"] == side]
                if mine:
                    place = {"key": key, "part": numbers[key], "side": side}
                    found += [{**place, **piece} for piece in _part_pieces(mine)]
            return pieces_table(found, **_kinds(_PARTS))

        # As many partitions as parts: adaptive execution would join them by their size.
        loaded = stored.unionByName(rows).repartition(len(keys), "key")
        return (
            loaded.groupBy("key")
            .applyInArrow(join_up, _PARTS)
            .repartition(len(keys), "key")  # so that cogroups find the parts where they lie
        )

    # --- steps -------------------------------------------------------------------------------

    def open(
        self,
        ledger: DataFrame,
        changes: DataFrame,
        tonight: int,
        gram_changes: Mapping[str, NDArray[np.float64] | None],
    ) -> None:
        """Make the pages from the published ledger, and put tonight's ratings into it.

        Parameters
        ----------
        ledger
            side, slot, chunk, gradient_norm, b_norm, factor_norm; of rows that left as well.
        changes
            side, slot, other_slot, value, change (-1 removed, +1 added), model_version: since the
            chunks were packed, tonight's included.
        tonight
            The `model_version` of tonight's changes.
        gram_changes
            By side: float64 (rank, rank) change of its Gram matrix because rows left or came;
            None in explicit mode.
        """
        rank, n_blocks, page_keys = self.solver.rank, self.n_blocks, self.page_keys
        page = part_key("slot", page_keys).alias("page")
        drifts = {s: drift(m) if m is not None else 0.0 for s, m in gram_changes.items()}
        objective = self.solver.objective
        force = self.settings.direct_rows == "resolve"
        levels = (self.settings.tau, self.mark)
        rows = reduce(
            lambda left, right: left.unionByName(right),
            [self.rows[side].withColumn("side", F.lit(side)) for side in SIDES],
        )
        changes = changes.select(
            "side", page, "slot", "other_slot", "value", "change", "model_version"
        )

        def pack(table: pa.Table) -> pa.Table:
            number = table["page"][0].as_py()
            packed: list[dict[str, Any]] = []
            for side in SIDES:
                mine = table.filter(pa.compute.equal(table["side"], side)).sort_by("slot")
                if mine.num_rows:
                    slots, factors = mine["slot"].to_numpy(), matrix_of(mine["factors"], rank)
                    packed += _stock_rows({"side": side, "page": number}, slots, factors)
            return pieces_table(packed, **_kinds(_STOCK))

        def need(table: pa.Table) -> pa.Table:
            key = table["page"][0].as_py()
            needed: list[dict[str, Any]] = []
            for side in SIDES:
                mine = table.filter(pa.compute.equal(table["side"], side))
                for name, of in (("slot", side), ("other_slot", other_side(side))):
                    slots = np.unique(mine[name].to_numpy()).astype(np.int32)
                    needed += _needed_rows(of, key, slots, page_keys)
            return binary_table(needed, **_kinds(_NEEDED))

        def make(left: pa.Table, right: pa.Table) -> pa.Table:
            made, messages = [], arrays_of(right)
            known = {
                side: _known([row for row in messages if row["side"] == side], rank)
                for side in SIDES
            }
            for side in SIDES:
                state = left.filter(pa.compute.equal(left["side"], side))
                if state["n_ratings"].null_count == state.num_rows:
                    continue  # no rows of this side
                opened = _opened(state)
                pushes = _pushes_of(
                    opened, tonight, known[side], known[other_side(side)], objective
                )
                opened = opened.pushed(*pushes, drifts[other_side(side)], force)
                number = state["page"][0].as_py()
                made.append(_page_row(side, number, opened, n_blocks[side], *levels))
            kinds = _kinds(_PAGES)
            return binary_table(made, **kinds) if made else pa.schema(kinds).empty_table()

        self.stock = self._checkpoint(
            rows.select("side", page, "slot", "factors").groupBy("page").applyInArrow(pack, _STOCK)
        )
        news = changes.where(F.col("model_version") == tonight)
        needed = news.select("side", "page", "slot", "other_slot").groupBy("page")
        states = reduce(
            lambda left, right: left.unionByName(right, allowMissingColumns=True),
            [
                rows.where("n_ratings > 0").select("side", page, "slot", "n_ratings"),
                ledger.select(
                    "side", page, "slot", "chunk", "gradient_norm", "b_norm", "factor_norm"
                ),
                changes,
            ],
        )
        self.pages = self._checkpoint(
            states.groupBy("page")
            .cogroup(self._fetched(needed.applyInArrow(need, _NEEDED)).groupBy("key"))
            .applyInArrow(make, _PAGES)
        )
        for side, change in gram_changes.items():
            if change is not None:
                self.grams[side] = change + self.grams[side]

    def run(self) -> dict[str, Summary] | None:
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

        Rows over the mark, and as long as that is little what the round before looked at: rows of
        the two sides that pull at each other are settled together. What no single task can hold
        is one side's rows over the mark, spread over tasks.
        """
        over = [side for side in SIDES if state[side].over]
        patch = {side: "either" if side in over else "looked" for side in SIDES}

        def ratings(patch: Mapping[str, str]) -> int:
            return sum(state[side].ratings[name] for side, name in patch.items())

        if ratings(patch) > min(PATCH_RATINGS, self.execution.part_ratings):
            patch = dict.fromkeys(over, "marked")
        if ratings(patch) > self.execution.part_ratings:
            # The side with less to do first: its rows often quieten the other.
            side = min(over, key=lambda name: state[name].ratings["marked"])
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
        places = {side: state[side].places[name] for side, name in patch.items()}
        result = self._settle(
            patch, ratings, {s: sorted(p) if p is not None else None for s, p in places.items()},
            eager,
        )  # fmt: skip
        rank = self.solver.rank
        changes = {side: np.zeros((rank, rank)) for side in SIDES}
        for row in result.select(*_TOTALS).where("gram_change IS NOT NULL").collect():
            self.work.add(row["solved_ratings"], row["solved_rows"], row["scanned_ratings"])
            changes[row["side"]] += np.frombuffer(row["gram_change"]).reshape(rank, rank)
        drifts = dict.fromkeys(SIDES, 0.0)
        if self.solver.objective.implicit_prefs:
            self.grams = {side: self.grams[side] + changes[side] for side in SIDES}
            drifts = {side: drift(changes[side]) for side in SIDES}
        again = ratings <= PATCH_RATINGS
        n_blocks, levels = self.n_blocks, (self.settings.tau, self.mark)

        def take(left: pa.Table, right: pa.Table) -> pa.Table:
            made, results = [], arrays_of(right)
            for row in arrays_of(left):
                side = row["side"]
                mine = [one for one in results if one["side"] == side]
                page = _after(Page.from_binary(row), mine, drifts[other_side(side)], again)
                made.append(_page_row(side, row["page"], page, n_blocks[side], *levels))
            kinds = _kinds(_PAGES)
            return binary_table(made, **kinds) if made else pa.schema(kinds).empty_table()

        news = result.drop("factors", *[name for name in _TOTALS if name != "side"])
        self.pages = self._checkpoint(
            self.pages.groupBy("page").cogroup(news.groupBy("page")).applyInArrow(take, _PAGES)
        )
        self.results.append(result.withColumn("round", F.lit(self.rounds)))
        if len(self.results) >= MOST_RESULTS:
            # One frame for many: a long chain would make every plan longer.
            self.results = [self._checkpoint(self._everything())]

    def _everything(self) -> DataFrame:
        return reduce(
            lambda left, right: left.unionByName(right),
            [frame.select("side", "page", "slots", "factors", "solved", "round")
             for frame in self.results],
        )  # fmt: skip

    def _fetched(self, needed: DataFrame) -> DataFrame:
        """The factors (`_MESSAGES`) of the rows that are needed (`_NEEDED`), as they are now."""
        stock = self.stock.select(
            *("side", "page", "slots", "factors"),
            F.lit(None).cast("binary").alias("solved"),
            F.lit(0).alias("round"),
        )
        if self.results:
            stock = stock.unionByName(self._everything())
        return (
            needed.groupBy("page")
            .cogroup(stock.groupBy("page"))
            .applyInArrow(_fetcher(self.solver.rank), _MESSAGES)
        )

    def _settle(
        self,
        patch: Mapping[str, str],
        ratings: int,
        places: Mapping[str, Places | None],
        eager: Container[str],
    ) -> DataFrame:
        """What became of a patch (`_RESULTS`)."""
        n_parts = -(-ratings // self.execution.part_ratings)
        if len(patch) == 1:
            n_parts = max(n_parts, min(self.parallelism, ratings // TASK_RATINGS), 1)
            if n_parts > self.parallelism:  # whole waves of tasks
                n_parts = -(-n_parts // self.parallelism) * self.parallelism
        keys = balanced_keys(n_parts)
        page_keys = self.page_keys
        spare = max(SPARE_RATINGS, SPARE_SHARE * 2 * self.work.ratings)
        parts = self.ratings_of(patch, keys, places).persist()
        messages = self._fetched(parts.mapInArrow(_needed(page_keys), _NEEDED))
        levels = (self.settings.tau, self.mark)
        settled = (
            parts.groupBy("key")
            .cogroup(messages.repartition(len(keys), "key").groupBy("key"))
            .applyInArrow(
                _settler(self.solver, levels, self.grams, spare, eager, page_keys), _RESULTS
            )
        )
        result = self._checkpoint(settled)
        parts.unpersist()
        return result

    def _checkpoint(self, frame: DataFrame) -> DataFrame:
        return materialise(frame, self.execution.checkpoint)


def _at(places: Places | None) -> Column:
    """The chunks at these places, in a form by which files are skipped."""
    if places is None:
        return F.lit(True)
    by_block: dict[int, list[int]] = {}
    for block, chunk in sorted(places):
        by_block.setdefault(block, []).append(chunk)
    here = [
        f"(block = {block} AND chunk IN ({', '.join(map(str, chunks))}))"
        for block, chunks in by_block.items()
    ]
    return F.expr(" OR ".join(here) or "false")


# --- worker side: plain arrays -----------------------------------------------------------------


def _page_row(
    side: str, number: int, page: Page, n_blocks: int, tau: float, mark: float
) -> dict[str, Any]:
    """A row of `_PAGES`."""
    summary = pickle.dumps(page.summary(n_blocks, tau, mark))
    return {"side": side, "page": number, **page.to_binary(), "summary": summary}


def _opened(state: pa.Table) -> Page:
    """A page from the rows, entries and changes of one side, told apart by what they lack."""

    def which(column: str) -> dict[str, NDArray[Any]]:
        valid = state.filter(state[column].is_valid())
        return {
            name: valid[name].to_numpy()
            for name in valid.schema.names
            if name != "side" and not valid[name].null_count
        }

    rows, stored, changes = which("n_ratings"), which("gradient_norm"), which("other_slot")
    empty = {
        name: np.zeros(0, kind)
        for name, kind in [
            ("slot", np.int32), ("chunk", np.int32), ("gradient_norm", np.float64),
            ("b_norm", np.float64), ("factor_norm", np.float64),
        ]
    }  # fmt: skip
    stored = {**empty, **stored}
    taken = NO_CHANGES
    if len(changes["slot"]):
        taken = RatingChanges(
            *(changes[n] for n in ("slot", "other_slot", "value", "change", "model_version"))
        )
    return Page.opened(
        rows["slot"],
        rows["n_ratings"],
        {**stored, "slots": stored["slot"], "chunks": stored["chunk"]},
        taken,
    )


def _pushes_of(
    page: Page,
    tonight: int,
    mine: tuple[NDArray[np.int32], NDArray[np.float32]],
    others: tuple[NDArray[np.int32], NDArray[np.float32]],
    objective: Objective,
) -> tuple[NDArray[np.int32], NDArray[np.float64], NDArray[np.float64]]:
    """(slots, gradient, b): what tonight's changes do to the equations of a page's rows.

    Parameters
    ----------
    mine, others
        (slots, factors) of this side's rows and of the other side's, as they were.
    """
    news = page.changes.of(page.changes.order == tonight)
    news = news.of(np.isin(news.rows, page.slots))
    if not len(news):
        return np.zeros(0, np.int32), np.zeros(0), np.zeros(0)
    slots, rows = np.unique(news.rows, return_inverse=True)
    y = mine[1][np.searchsorted(mine[0], slots)]
    places = np.searchsorted(others[0], news.others)
    added = news.signs > 0
    change = [
        rating_terms(rows[which], places[which], news.values[which], y, others[1], objective)
        for which in (added, ~added)
    ]
    gradient, b = (change[0] - change[1]).norms()
    return slots, gradient, b


def _after(page: Page, results: list[dict[str, Any]], drift: float, again: bool) -> Page:
    """A page after a round. What a patch says of its own rows is final: no push, and no drift,
    comes on top."""

    def column(name: str, kind: type[np.generic]) -> NDArray[Any]:
        arrays = [np.frombuffer(row[name], kind) for row in results]
        return np.concatenate([np.zeros(0, kind), *arrays])

    page = page.pushed(
        column("push_slots", np.int32),
        column("push_gradient", np.float64),
        column("push_b", np.float64),
        drift,
    )
    norms = {name: column(name, np.float64) for name in ("gradient_norm", "b_norm", "factor_norm")}
    return page.looked_at(column("slots", np.int32), norms, column("solved", np.bool_), again)


def _ask(
    patch: dict[str, str], mark: float, keys: tuple[int, ...], n_blocks: dict[str, int]
) -> Callable[[Iterable[pa.RecordBatch]], Iterable[pa.RecordBatch]]:
    nothing = dict.fromkeys(COLUMNS)

    def of_page(side: str, page: Page) -> Iterator[dict[str, Any]]:
        mine = page.of(page.chosen(patch[side], mark))
        stored = mine.chunks >= 0
        slots = mine.slots[stored]
        places = pair_keys(slots % np.int32(n_blocks[side]), mine.chunks[stored])
        for place in np.unique(places):
            yield {
                "side": side,
                "block": int(place >> 32),
                "chunk": int(place & 0xFFFFFFFF),
                "key": None,
                **nothing,
                "slots": raw(slots[places == place], np.int32),
            }
        for part, rows in mine.split(len(keys)):
            place = {"side": side, "block": None, "chunk": None, "key": keys[part]}
            yield {**place, **rows.to_binary()}

    def ask(batches: Iterable[pa.RecordBatch]) -> Iterable[pa.RecordBatch]:
        for batch in batches:
            for row in arrays_of(batch):
                asked = list(of_page(row["side"], Page.from_binary(row)))
                if asked:
                    yield from binary_table(asked, **_kinds(_ASKED)).to_batches()

    return ask


def _keep_wanted(
    keys: tuple[int, ...],
) -> Callable[[Iterable[pa.RecordBatch]], Iterable[pa.RecordBatch]]:
    nothing = dict.fromkeys(COLUMNS)

    def pieces(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
        block = RatingBlock.from_binary(row)
        block = block.rows(np.isin(block.slots, np.frombuffer(row["wanted"], np.int32)))
        part = block.slots % len(keys)
        for number in np.unique(part):
            packed = block.rows(part == number).to_binary()
            counted = {name: packed[name] for name in ("counts", "others", "values")}
            place = {"key": keys[number], "side": row["side"]}
            yield {**place, **counted, **nothing, "slots": packed["slots"]}

    def keep(batches: Iterable[pa.RecordBatch]) -> Iterable[pa.RecordBatch]:
        for batch in batches:
            for row in arrays_of(batch):
                kept = list(pieces(row))
                if kept:
                    yield from pieces_table(kept, **_kinds(_LOADED)).to_batches()

    return keep


def _part_pieces(loaded: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The ratings of one side of a part with their changes, piece by piece, and which rows are
    forced."""
    pages = [Page.from_binary(row) for row in loaded if row["counts"] is None]
    block = RatingBlock.from_pieces([row for row in loaded if row["counts"] is not None])
    for page in pages:
        block = page.changes.applied(block)
    slots = np.concatenate([page.slots for page in pages])
    order = np.argsort(slots)
    if not np.array_equal(slots[order], block.slots):
        raise ValueError("active rows and their ratings differ; the rating blocks are damaged")
    forced = np.isinf(np.concatenate([page.gradient_norm for page in pages]))[order]
    first = 0
    for piece in block.pieces():
        mine = forced[first : first + piece.n_rows]
        first += piece.n_rows
        yield {**piece.to_binary(), "forced": raw(mine, np.bool_)}


def _needed(
    page_keys: tuple[int, ...],
) -> Callable[[Iterable[pa.RecordBatch]], Iterable[pa.RecordBatch]]:
    """By page and part the rows whose factors the part needs, its own among them; the pieces of a
    part lie in one partition."""

    def need(batches: Iterable[pa.RecordBatch]) -> Iterable[pa.RecordBatch]:
        found: dict[tuple[str, int], list[NDArray[np.int32]]] = {}
        for batch in batches:
            for row in arrays_of(batch):
                for side, name in ((row["side"], "slots"), (other_side(row["side"]), "others")):
                    slots = np.unique(np.frombuffer(row[name], np.int32))
                    found.setdefault((side, row["key"]), []).append(slots)
        for (side, key), arrays in found.items():
            slots = np.unique(np.concatenate(arrays))
            for row in _needed_rows(side, key, slots, page_keys):
                yield from binary_table([row], **_kinds(_NEEDED)).to_batches()

    return need


def _needed_rows(
    side: str, key: int, slots: NDArray[np.int32], page_keys: tuple[int, ...]
) -> Iterator[dict[str, Any]]:
    """Rows of `_NEEDED`."""
    for page, mine in _by_page(slots, page_keys):
        yield {"side": side, "page": page, "key": key, "slots": raw(slots[mine], np.int32)}


def _by_page(
    slots: NDArray[np.int32], page_keys: tuple[int, ...]
) -> Iterator[tuple[int, NDArray[np.intp]]]:
    """(key of a page, places in `slots` of its rows)."""
    numbers = slots % len(page_keys)
    for number in np.unique(numbers):
        yield page_keys[number], np.flatnonzero(numbers == number)


def _stock_rows(
    place: dict[str, Any], slots: NDArray[np.int32], factors: NDArray[np.float32]
) -> Iterator[dict[str, Any]]:
    for own, stack in cut_stack(slots, factors[None]):
        yield {**place, "slots": raw(own, np.int32), "factors": raw(stack[0], np.float32)}


def _fetcher(rank: int) -> Callable[[pa.Table, pa.Table], pa.Table]:
    """Answers what parts need from the factors of a page."""

    def fetch(left: pa.Table, right: pa.Table) -> pa.Table:
        kinds = _kinds(_MESSAGES)
        stock = sorted(arrays_of(right), key=lambda row: row["round"])
        answers: list[dict[str, Any]] = []
        for side in SIDES:
            asked = [row for row in arrays_of(left) if row["side"] == side]
            mine = [_solved_of(row, rank) for row in stock if row["side"] == side]
            if not asked or not mine:
                continue
            slots = np.concatenate([known for known, _ in mine])
            factors = np.concatenate([values for _, values in mine])
            # Later rounds stand behind: of a slot's rows the last one counts.
            known, from_end = np.unique(slots[::-1], return_index=True)
            rows = len(slots) - 1 - from_end
            for row in asked:
                wanted = np.frombuffer(row["slots"], np.int32)
                places = rows[np.searchsorted(known, wanted)]
                place = {"side": side, "key": row["key"]}
                answers += _stock_rows(place, wanted, factors[places])
        return pieces_table(answers, **kinds) if answers else pa.schema(kinds).empty_table()

    return fetch


def _solved_of(row: dict[str, Any], rank: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """(slots, factors) of a row of stock, or of those that a round solved."""
    slots = np.frombuffer(row["slots"], np.int32)
    factors = np.frombuffer(row["factors"], np.float32).reshape(-1, rank)
    if row["solved"] is None:
        return slots, factors
    solved = np.frombuffer(row["solved"], np.bool_)
    return slots[solved], factors[solved]


def _settler(
    solver: Solver,
    levels: tuple[float, float],
    grams: dict[str, NDArray[np.float64]],
    spare: float,
    eager: Container[str],
    page_keys: tuple[int, ...],
) -> Callable[[pa.Table, pa.Table], pa.Table]:
    def solve(left: pa.Table, right: pa.Table) -> pa.Table:
        kinds = _kinds(_RESULTS)
        if not left.num_rows:
            return pa.schema(kinds).empty_table()
        pieces, messages = arrays_of(left), arrays_of(right)
        sides = {
            side: _patch_side(
                [piece for piece in pieces if piece["side"] == side],
                [row for row in messages if row["side"] == side],
                solver.rank,
                side in eager,
            )
            for side in SIDES
        }
        settled = settle(solver, sides, *levels, grams, spare)
        rows = [row for side in SIDES for row in _result_rows(side, settled[side], page_keys)]
        return pieces_table(rows, **kinds)

    return solve


def _known(
    messages: list[dict[str, Any]], rank: int
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """(slots, factors) by slot from messages of one side; a slot may come twice."""
    slots = [np.frombuffer(row["slots"], np.int32) for row in messages]
    factors = [np.frombuffer(row["factors"], np.float32).reshape(-1, rank) for row in messages]
    known, first = np.unique(np.concatenate([np.zeros(0, np.int32), *slots]), return_index=True)
    return known, np.concatenate([np.zeros((0, rank), np.float32), *factors])[first]


def _patch_side(
    pieces: list[dict[str, Any]], messages: list[dict[str, Any]], rank: int, eager: bool
) -> PatchSide:
    """One side of a part from its rating pieces and the factor rows that came with them."""
    pieces = sorted(pieces, key=lambda row: np.frombuffer(row["slots"], np.int32)[:1].tolist())
    forced = [np.frombuffer(row["forced"], np.bool_) for row in pieces]
    return PatchSide(
        *_known(messages, rank),
        RatingBlock.from_pieces(pieces),
        np.concatenate([np.zeros(0, np.bool_), *forced]),
        eager,
    )


def _result_rows(
    side: str, settled: SettledSide, page_keys: tuple[int, ...]
) -> Iterator[dict[str, Any]]:
    """Rows of `_RESULTS`."""
    totals: dict[str, Any] = {
        "gram_change": raw(settled.gram_change, np.float64),
        "solved_rows": settled.solved_rows,
        "solved_ratings": settled.solved_ratings,
        "scanned_ratings": settled.scanned_ratings,
    }
    factor_norm = np.linalg.norm(settled.factors.astype(np.float64), axis=1)
    pushes = dict(_by_page(settled.push_slots, page_keys))
    own = dict(_by_page(settled.slots, page_keys))
    none = np.zeros(0, np.intp)
    for page in sorted({page_keys[0], *pushes, *own}):
        rows, pushed = own.get(page, none), pushes.get(page, none)
        yield {
            "side": side,
            "page": page,
            "slots": raw(settled.slots[rows], np.int32),
            "factors": raw(settled.factors[rows], np.float32),
            "gradient_norm": raw(settled.gradient_norm[rows], np.float64),
            "b_norm": raw(settled.b_norm[rows], np.float64),
            "factor_norm": raw(factor_norm[rows], np.float64),
            "solved": raw(settled.solved[rows], np.bool_),
            "push_slots": raw(settled.push_slots[pushed], np.int32),
            "push_gradient": raw(settled.push_gradient[pushed], np.float64),
            "push_b": raw(settled.push_b[pushed], np.float64),
            **totals,
        }
        totals = dict.fromkeys(totals)


def _moved_rows(rank: int) -> Callable[[Iterable[pa.RecordBatch]], Iterable[pa.RecordBatch]]:
    def unpack(batches: Iterable[pa.RecordBatch]) -> Iterable[pa.RecordBatch]:
        for batch in batches:
            for row in arrays_of(batch):
                slots, factors = _solved_of(row, rank)
                yield pa.RecordBatch.from_pydict(
                    {
                        "slot": slots,
                        "factors": list_column(factors),
                        "round": np.full(len(slots), row["round"], np.int32),
                    }
                )

    return unpack
