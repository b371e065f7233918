"""A model's tables as arrays of this process: factor rows, ledger, packed ratings."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import ColumnProperties, WriterProperties
from numpy.typing import NDArray

from unlearn_spark.core.blocks import (
    SIDES,
    RatingBlock,
    concatenate,
    places_in,
    split_into_chunks,
)
from unlearn_spark.core.objective import relative_residual
from unlearn_spark.core.threads import shared_out
from unlearn_spark.embedded.ids import as_text
from unlearn_spark.errors import InputError
from unlearn_spark.tables import factors
from unlearn_spark.tables.delta_rs import DeltaRsStore
from unlearn_spark.tables.models import ModelVersion

PACKED_COLUMNS = tuple(factors.RATING_BLOCKS_SPEC.schema.names[3:])
"""The columns of `factors.RATING_BLOCKS` that hold the arrays of a chunk."""

CHUNK_A_ROW_GROUP = WriterProperties(
    max_row_group_size=1,
    compression="SNAPPY",
    # Otherwise the footer would hold every array twice more, as its smallest and largest value, and
    # whoever opens a file reads the footer.
    column_properties=dict.fromkeys(
        PACKED_COLUMNS, ColumnProperties(dictionary_enabled=False, statistics_enabled="NONE")
    ),
)

PORTION_RATINGS = 8_000_000
"""Packed ratings that one commit writes: delta-rs holds several times their bytes meanwhile."""

ROWS_A_BATCH = 65_536
"""Factor rows that become one record batch."""


@dataclass(frozen=True)
class FactorRows:
    """The factor rows of one side, by ascending slot.

    Attributes
    ----------
    ids
        string or int64 (n,).
    slots, n_ratings : int32 (n,)
    factors : float32 (n, rank)
    """

    ids: pa.Array
    slots: NDArray[np.int32]
    n_ratings: NDArray[np.int32]
    factors: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.slots)

    def of(self, keep: NDArray[np.bool_]) -> FactorRows:
        """Only the rows where `keep` is true."""
        return FactorRows(
            self.ids.filter(pa.array(keep)),
            self.slots[keep],
            self.n_ratings[keep],
            self.factors[keep],
        )


@dataclass(frozen=True)
class Norms:
    """What the ledger keeps of some rows: gradient_norm, b_norm, factor_norm, float64 (n,)."""

    gradient_norm: NDArray[np.float64]
    b_norm: NDArray[np.float64]
    factor_norm: NDArray[np.float64]


def read_factors(store: DeltaRsStore, model: ModelVersion, side: str) -> FactorRows:
    """The factor rows of a side at the version that a model names.

    Raises
    ------
    InputError
        A vector has not the model's rank.
    """
    version = getattr(model, f"{side}_factors_version")
    names = ["id", "slot", "n_ratings", "factors"]
    table = store.read(factors.factor_table(side), version, names)
    slots = table["slot"].to_numpy()
    order = np.argsort(slots, kind="stable")
    vectors, rank = table["factors"], model.als.rank
    flat = np.concatenate(
        [np.zeros(0, np.float32), *[chunk.flatten().to_numpy() for chunk in vectors.chunks]]
    )
    if len(flat) != rank * len(slots):
        raise InputError(
            f"table {side}_factors: a row of model version {model.model_version} has not "
            f"{rank} factors; audit it, and train anew"
        )
    ids = table["id"].combine_chunks()
    return FactorRows(
        ids.take(pa.array(order)),
        slots[order].astype(np.int32, copy=False),
        table["n_ratings"].to_numpy()[order].astype(np.int32, copy=False),
        flat.reshape(-1, rank)[order],
    )


def factor_batches(rows: FactorRows, n_blocks: int) -> pa.RecordBatchReader:
    """Rows for `factors.factor_spec`, sorted by block and slot."""
    blocks = rows.slots % np.int32(n_blocks)
    order = np.lexsort((rows.slots, blocks))
    schema = factors.factor_spec(rows.ids.type).schema
    rank = rows.factors.shape[1]

    def batches() -> Iterator[pa.RecordBatch]:
        for first in range(0, len(order), ROWS_A_BATCH):
            part = order[first : first + ROWS_A_BATCH]
            vectors = pa.ListArray.from_arrays(
                pa.array(np.arange(len(part) + 1, dtype=np.int32) * rank),
                pa.array(rows.factors[part].reshape(-1)),
            )
            columns = [
                rows.ids.take(pa.array(part)),
                pa.array(blocks[part]),
                pa.array(rows.slots[part]),
                pa.array(rows.n_ratings[part]),
                vectors,
            ]
            yield pa.RecordBatch.from_arrays(columns, names=schema.names).cast(schema)

    return pa.RecordBatchReader.from_batches(schema, batches())


def ledger_table(
    side: str,
    ids: pa.Array,
    slots: NDArray[np.int32],
    chunks: NDArray[np.int32],
    n_ratings: NDArray[np.int32],
    norms: Norms,
    n_blocks: int,
    floor: float,
) -> pa.Table:
    """Rows for the ledger (`factors.LEDGER_SPEC`), sorted by block and slot."""
    blocks = slots % np.int32(n_blocks)
    order = np.lexsort((slots, blocks))
    columns = {
        "side": pa.array([side], pa.string()).take(pa.array(np.zeros(len(slots), np.int32))),
        "id": as_text(ids).take(pa.array(order)),
        "block": blocks[order],
        "slot": slots[order],
        "chunk": chunks[order],
        "n_ratings": n_ratings[order],
        "bound": relative_residual(norms.gradient_norm, norms.b_norm, floor)[order],
        "gradient_norm": norms.gradient_norm[order],
        "b_norm": norms.b_norm[order],
        "factor_norm": norms.factor_norm[order],
    }
    return pa.table(columns, schema=factors.LEDGER_SPEC.schema)


def chunk_portions(
    blocks: Mapping[str, RatingBlock], n_blocks: Mapping[str, int]
) -> Iterator[pa.Table]:
    """The packed ratings of both sides as rows of `factors.RATING_BLOCKS_SPEC`, in tables of about
    `PORTION_RATINGS` ratings."""
    schema = factors.RATING_BLOCKS_SPEC.schema
    waiting: list[pa.RecordBatch] = []
    size = 0
    for side in SIDES:
        for block, chunk, rows in split_into_chunks(blocks[side], n_blocks[side]):
            packed = rows.to_binary()
            columns = [
                pa.array([side], pa.string()),
                pa.array([block], pa.int32()),
                pa.array([chunk], pa.int32()),
                *[pa.array([packed[name]], pa.binary()) for name in PACKED_COLUMNS],
            ]
            waiting.append(pa.RecordBatch.from_arrays(columns, schema=schema))
            size += rows.n_ratings
            if size >= PORTION_RATINGS:
                yield pa.Table.from_batches(waiting)
                waiting, size = [], 0
    yield pa.Table.from_batches(waiting, schema)


class ChunkReader:
    """Reads stored chunks of packed ratings, each a row group, and nothing else of their files."""

    def __init__(self, store: DeltaRsStore, version: int, threads: int) -> None:
        self._store = store
        self._threads = threads
        self._opened: dict[tuple[str, int], list[tuple[pq.ParquetFile, dict[int, int]]]] = {}
        self._files: dict[tuple[str, int], list] = {}
        for file in store.files(factors.RATING_BLOCKS, version):
            place = file.partition["side"], int(file.partition["block"])
            self._files.setdefault(place, []).append(file)

    def read(
        self, side: str, chunks: Collection[int], n_blocks: int, slots: NDArray[np.int32]
    ) -> RatingBlock:
        """The ratings of those rows of these chunks whose slots (ascending) are wanted."""
        by_block: dict[int, list[int]] = {}
        for chunk in sorted(chunks):
            by_block.setdefault(chunk % n_blocks, []).append(chunk)
        places = [(side, block) for block in by_block]

        def read(place: tuple[str, int]) -> list[RatingBlock]:
            found = self._read_block(place, by_block[place[1]])
            return [rows.rows(places_in(rows.slots, slots)[1]) for rows in found]

        found = shared_out(read, places, self._threads)
        return concatenate([block for blocks in found for block in blocks])

    def _read_block(self, place: tuple[str, int], chunks: list[int]) -> Iterator[RatingBlock]:
        wanted = set(chunks)
        names = ["chunk", *PACKED_COLUMNS]
        for file, groups in self._open(place):
            here = sorted({groups[chunk] for chunk in wanted if chunk in groups})
            if not here:
                continue
            for row in file.read_row_groups(here, columns=names, use_threads=False).to_batches():
                for at in range(row.num_rows):
                    if row["chunk"][at].as_py() in wanted:
                        yield RatingBlock.from_binary(
                            {name: row[name][at].as_buffer() for name in PACKED_COLUMNS}
                        )

    def _open(self, place: tuple[str, int]) -> list[tuple[pq.ParquetFile, dict[int, int]]]:
        """The files of a block, each with the row group of every chunk."""
        if place not in self._opened:
            self._opened[place] = [
                (file, _groups(file))
                for file in (
                    self._store.parquet(factors.RATING_BLOCKS, entry)
                    for entry in self._files.get(place, [])
                )
            ]
        return self._opened[place]


def _groups(file: pq.ParquetFile) -> dict[int, int]:
    """By chunk number the row group that has it."""
    metadata = file.metadata
    column = file.schema_arrow.get_field_index("chunk")
    groups: dict[int, int] = {}
    for group in range(metadata.num_row_groups):
        statistics = metadata.row_group(group).column(column).statistics
        if statistics is not None and statistics.min == statistics.max:
            groups[statistics.min] = group
        else:
            chunks = file.read_row_group(group, columns=["chunk"])["chunk"]
            groups.update(dict.fromkeys(chunks.to_pylist(), group))
    return groups


@dataclass(frozen=True)
class WholeModel:
    """All that is stored of a freshly fitted model.

    Attributes
    ----------
    rows, norms, chunks
        By side: the factor rows, their norms, and the number of the chunk of each row's ratings.
    blocks
        By side: the ratings.
    """

    rows: Mapping[str, FactorRows]
    norms: Mapping[str, Norms]
    chunks: Mapping[str, NDArray[np.int32]]
    blocks: Mapping[str, RatingBlock]
    n_blocks: Mapping[str, int]
    floors: Mapping[str, float]


def write_whole_model(
    store: DeltaRsStore,
    model: WholeModel,
    threads: int,
    more: Mapping[str, Callable[[], int]] | None = None,
) -> dict[str, int]:
    """Replace factors, ledger and packed ratings by those of a whole new model.

    Parameters
    ----------
    more
        Further writes to run at the same time, under the fields that take their versions.

    Returns
    -------
    dict
        The Delta version of each table, under the names of `ModelVersion`'s fields.
    """

    def write_factors(side: str) -> int:
        rows, table = model.rows[side], factors.factor_table(side)
        store.create(table, factors.factor_spec(rows.ids.type))
        return store.overwrite(table, factor_batches(rows, model.n_blocks[side]))

    def write_ledger() -> int:
        store.create(factors.LEDGER, factors.LEDGER_SPEC)
        sides = [
            ledger_table(
                side,
                model.rows[side].ids,
                model.rows[side].slots,
                model.chunks[side],
                model.rows[side].n_ratings,
                model.norms[side],
                model.n_blocks[side],
                model.floors[side],
            )
            for side in SIDES
        ]
        return store.overwrite(factors.LEDGER, pa.concat_tables(sides))

    def write_blocks() -> int:
        table = factors.RATING_BLOCKS
        store.create(table, factors.RATING_BLOCKS_SPEC)
        portions = chunk_portions(model.blocks, model.n_blocks)
        version = store.overwrite(table, next(portions), properties=CHUNK_A_ROW_GROUP)
        for portion in portions:
            version = store.append_to(table, portion, version, CHUNK_A_ROW_GROUP)
        return version

    def clear_changes() -> int:
        store.create(factors.RATING_CHANGES, factors.RATING_CHANGES_SPEC)
        return store.overwrite(
            factors.RATING_CHANGES, factors.RATING_CHANGES_SPEC.schema.empty_table()
        )

    return run_writes(
        {
            "rating_blocks_version": write_blocks,
            "user_factors_version": lambda: write_factors("user"),
            "item_factors_version": lambda: write_factors("item"),
            "ledger_version": write_ledger,
            "rating_changes_version": clear_changes,
            **(more or {}),
        },
        threads,
    )


def run_writes(writes: Mapping[str, Callable[[], int]], threads: int) -> dict[str, int]:
    """Run writes of different tables at the same time; return the version that each made."""
    versions = shared_out(lambda write: write(), list(writes.values()), threads)
    return dict(zip(writes, versions, strict=True))
