"""The ratings table in this process: what requests cover, what a model learns, and deletion."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from deltalake import ColumnProperties, WriterProperties
from numpy.typing import NDArray

from unlearn_spark.core.threads import shared_out
from unlearn_spark.embedded.ids import typed_ids, user_keys, xxhash64
from unlearn_spark.errors import InputError
from unlearn_spark.tables import ratings, requests
from unlearn_spark.tables.delta_rs import DeltaRsStore
from unlearn_spark.tables.models import ModelVersion
from unlearn_spark.tables.relational import query

PAIR = ("user_id", "item_id")

FILE_LAYOUT = WriterProperties(
    data_page_row_count_limit=ratings.PAGE_ROWS,
    # Few times repeat, and their large dictionary would be read for any page.
    column_properties={"rated_at": ColumnProperties(dictionary_enabled=False)},
    compression="SNAPPY",
)
"""How files of the table are written, so that a night reads little of them."""


def id_types(store: DeltaRsStore) -> dict[str, pa.DataType] | None:
    """Types of the table's user_id and item_id, string or int64; None before the first ingest."""
    if not store.exists(ratings.TABLE):
        return None
    with store.reading(ratings.TABLE, columns=PAIR) as reader:
        return {name: reader.schema.field(name).type for name in PAIR}


def user_blocks(store: DeltaRsStore) -> int:
    """Number of partitions of the table, as chosen by the first ingest."""
    return ratings.user_blocks(store.column_metadata(ratings.TABLE, "user_block"))


def covered(rows: pa.Table, rules: pa.Table) -> pa.Table:
    """Which rules cover which rows.

    Parameters
    ----------
    rows
        user_id, item_id (string or int64), rated_at, and any other columns.
    rules
        From `requests.rules`.

    Returns
    -------
    pa.Table
        place (int64: the number of the row) and request_id, one row per row and rule that covers
        it, sorted by these.
    """
    named = {}
    for side in ("user", "item"):
        mine = rules.filter(pc.equal(rules["by"], side))
        ids = typed_ids(mine["id"], rows.schema.field(f"{side}_id").type)
        named[side] = mine.set_column(1, "id", ids).filter(ids.is_valid())
    hit = np.zeros(rows.num_rows, np.bool_)
    for side, mine in named.items():
        if mine.num_rows:
            ids = mine["id"].combine_chunks().unique()
            hit |= pc.is_in(rows[f"{side}_id"], ids).to_numpy(zero_copy_only=False)
    places = np.flatnonzero(hit)
    candidates = rows.select([*PAIR, "rated_at"]).take(pa.array(places))
    return query(
        """
        WITH hits AS (
            SELECT place, request_id, rated_at, item, "from", "to", until, item_id
            FROM candidates JOIN of_users ON user_id = of_users.id
            UNION ALL
            SELECT place, request_id, rated_at, item, "from", "to", until, item_id
            FROM candidates JOIN of_items ON item_id = of_items.id
        )
        SELECT place, request_id FROM hits
        WHERE (item IS NULL OR item = CAST(item_id AS VARCHAR))
            AND ("from" IS NULL OR coalesce(rated_at >= "from", false))
            AND ("to" IS NULL OR coalesce(rated_at < "to", false))
            AND (until IS NULL OR coalesce(rated_at <= until, true))
        ORDER BY place, request_id
        """,
        candidates=candidates.append_column("place", pa.array(places, pa.int64())),
        of_users=named["user"],
        of_items=named["item"],
    )


def without(rows: pa.Table, places: pa.ChunkedArray) -> pa.Table:
    """The rows except those at these places."""
    if not len(places):
        return rows
    kept = np.ones(rows.num_rows, np.bool_)
    kept[places.to_numpy()] = False
    return rows.filter(pa.array(kept))


def retained(rows: pa.Table, rules: pa.Table | None) -> pa.Table:
    """The rows that no rule covers."""
    return rows if rules is None else without(rows, covered(rows, rules)["place"])


def read_retained(
    store: DeltaRsStore,
    version: int,
    tombstones_version: int | None,
    receipts_version: int | None,
    columns: Sequence[str] = (*PAIR, "rating"),
) -> pa.Table:
    """The ratings of a version that no request covers: what a model may learn from.

    The other versions are as for `requests.rules_of`.
    """
    rules = requests.rules_of(store, tombstones_version, receipts_version)
    return _read_without(store, version, rules, columns)


def _read_without(
    store: DeltaRsStore,
    version: int | None,
    rules: pa.Table | None,
    columns: Sequence[str],
    where: str | None = None,
) -> pa.Table:
    """The rows of a version that meet a condition in SQL and that no rule covers."""
    if rules is None:
        return store.read(ratings.TABLE, version, columns, where)
    wanted = list(dict.fromkeys([*columns, *PAIR, "rated_at"]))
    rows = store.read(ratings.TABLE, version, wanted, where)
    return retained(rows, rules).select(list(columns))


def fitted_rules(store: DeltaRsStore, model: ModelVersion) -> pa.Table | None:
    """The rules that said what a model version could not learn."""
    return requests.rules_of(store, model.tombstones_version, model.receipts_version)


def known_ratings(model: ModelVersion) -> str:
    """SQL for: the row, at the ratings version that a model names, was there at its training.

    Raises
    ------
    InputError
        The model names no ratings.
    """
    if model.ratings_version is None:
        raise InputError(
            f"model version {model.model_version} names no ratings; train a model here first"
        )
    return f"ingest_id <= {model.ratings_ingest_id or 0}"


def fitted(
    store: DeltaRsStore,
    model: ModelVersion,
    columns: Sequence[str] = (*PAIR, "rating"),
) -> pa.Table:
    """The rows that a model version was fitted to, at the versions that it names.

    Raises
    ------
    InputError
        The model names no ratings.
    """
    known, rules = known_ratings(model), fitted_rules(store, model)
    return _read_without(store, model.ratings_version, rules, columns, known)


def newest_ingest(store: DeltaRsStore, version: int) -> int:
    """The largest ingest_id in a version of the table, 0 when it is empty."""
    found = pc.max(store.read(ratings.TABLE, version, ["ingest_id"])["ingest_id"]).as_py()
    return int(found or 0)


def among(rows: pa.Table, pairs: pa.Table) -> NDArray[np.bool_]:
    """Which rows have their (user_id, item_id) among the pairs, bool (n,)."""
    items = pairs["item_id"].combine_chunks().unique()
    users = pairs["user_id"].combine_chunks().unique()

    def codes(table: pa.Table) -> pa.ChunkedArray:
        user, item = pc.index_in(table["user_id"], users), pc.index_in(table["item_id"], items)
        return pc.add(pc.multiply(user.cast("int64"), len(items)), item.cast("int64"))

    # A foreign id has no code.
    found = pc.is_in(codes(rows), codes(pairs).combine_chunks().drop_null())
    return found.to_numpy(zero_copy_only=False)


def in_blocks(blocks: Sequence[int]) -> str:
    """SQL for: the row is in one of these user blocks."""
    return f"user_block IN ({', '.join(map(str, blocks))})" if blocks else "false"


def delete(store: DeltaRsStore, pairs: pa.Table, version: int, threads: int) -> int:
    """Remove pairs (user_id, item_id in the table's types) from the newest `version`; return the
    Delta version afterwards. The log holds the numbers of the blocks, and no id.

    The files of the blocks concerned are written anew. A deletion from blocks with more than
    `MOST_ROWS` ratings takes several commits.

    Raises
    ------
    ConflictError
        There are pairs, and `version` is not the newest version or another job commits meanwhile.
    """
    if not pairs.num_rows:
        return version
    users = pairs["user_id"].combine_chunks().dictionary_encode()
    of_users, _ = user_keys(xxhash64(users.dictionary), user_blocks(store))
    of_pairs = of_users[users.indices.to_numpy()]

    def left(block: int) -> pa.Table:
        rows = store.read(ratings.TABLE, version, ratings.COLUMNS, in_blocks([block]))
        gone = pairs.filter(pa.array(of_pairs == block))
        return in_file_order(rows.filter(pa.array(~among(rows, gone))))

    for blocks in _groups(store, version, np.unique(of_pairs).tolist()):
        # Read before the write begins: delta-rs takes the rows in threads that its reads need too.
        rows = pa.concat_tables(shared_out(left, blocks, threads))
        version = store.replace_where(ratings.TABLE, rows, in_blocks(blocks), version, FILE_LAYOUT)
    return version


MOST_ROWS = 20_000_000
"""Most ratings that a deletion holds in memory, unless a block has more."""


def _groups(store: DeltaRsStore, version: int, blocks: Sequence[int]) -> Iterator[list[int]]:
    """Blocks in groups of at most `MOST_ROWS` ratings each, or of one block."""
    sizes: dict[int, int] = {}
    for file in store.files(ratings.TABLE, version):
        block = int(file.partition["user_block"])
        sizes[block] = sizes.get(block, 0) + file.rows
    group: list[int] = []
    for block in blocks:
        if group and sum(sizes.get(each, 0) for each in [*group, block]) > MOST_ROWS:
            yield group
            group = []
        group.append(block)
    if group:
        yield group


def in_file_order(rows: pa.Table) -> pa.Table:
    """Rows of one block, sorted as its files are."""
    keys = rows["user_key"].to_numpy()
    if (keys[1:] >= keys[:-1]).all():
        return rows
    return rows.sort_by([(name, "ascending") for name in ("user_key", *PAIR)])
