"""Finds a night's work: the ratings that must leave the published model, and those that must enter.

It compares with the ratings version that the published model names, not with the newest. So if a
job died after it deleted ratings, the next one finds the same work again.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from unlearn_spark.embedded.ids import typed_ids, user_keys, xxhash64
from unlearn_spark.embedded.ratings import (
    PAIR,
    among,
    covered,
    fitted_rules,
    id_types,
    retained,
    user_blocks,
)
from unlearn_spark.errors import InputError
from unlearn_spark.nightly import MOST_NAMED, Counts, unanswered
from unlearn_spark.tables import ratings, requests, tombstones
from unlearn_spark.tables.delta_rs import DeltaRsStore
from unlearn_spark.tables.models import ModelVersion
from unlearn_spark.tables.relational import query

COLUMNS = (*PAIR, "rating", "rated_at", "ingest_id")

FEW_NAMED = 2000
"""Most users or items whose ratings are looked for by name; for more, all are read."""


@dataclass(frozen=True)
class News:
    """Requests and ratings that arrived since the published model.

    Attributes
    ----------
    pending, lifts
        Requests without a receipt, and reinstatements since the published model
        (`nightly.unanswered`).
    new
        Rows (`COLUMNS`) of later ingestions than the model's.
    ratings_version, ingest_id, tombstones_version
        The Delta versions and the newest ingest that were read.
    """

    pending: pa.Table
    lifts: pa.Table
    new: pa.Table
    ratings_version: int
    ingest_id: int
    tombstones_version: int | None

    @property
    def n_requests(self) -> int:
        return int(self.pending.num_rows)

    @property
    def may_add(self) -> bool:
        """Whether ratings may enter the model."""
        return bool(self.new.num_rows or self.lifts.num_rows)


@dataclass(frozen=True)
class Changes:
    """A night's changes of the model and of the ratings table.

    Attributes
    ----------
    removed
        By request_id of every pending request: the number of ratings that it covers, in the model
        or not.
    stored
        user_id, item_id of the ratings to delete: the covered ones in the table's newest version.
    pairs
        user_id, item_id, value float, change int (-1 leaves the model, +1 enters it).
    """

    removed: dict[str, int]
    stored: pa.Table
    pairs: pa.Table
    counts: Counts


def find_news(store: DeltaRsStore, model: ModelVersion) -> News:
    """Find pending requests and newly ingested ratings; read no rating that the model knows.

    Raises
    ------
    InputError
        The model names no ratings.
    """
    if model.ratings_version is None:
        raise InputError(f"model version {model.model_version} names no ratings; train it here")
    ratings_version = store.version(ratings.TABLE)
    tombstones_version = tombstones.version(store)
    pending, lifts = unanswered(store, model, tombstones_version)
    ingest_id = model.ratings_ingest_id or 0
    where = f"ingest_id > {ingest_id}" if ratings_version != model.ratings_version else "false"
    new = store.read(ratings.TABLE, ratings_version, COLUMNS, where)
    return News(
        pending,
        lifts,
        new,
        ratings_version,
        int(pc.max(new["ingest_id"]).as_py() or ingest_id),
        tombstones_version,
    )


def collect_changes(store: DeltaRsStore, model: ModelVersion, news: News) -> Changes:
    """Find the ratings that leave the model and those that enter it. Reads the user blocks that the
    requests name, and all ratings only if a request or a reinstatement names an item."""
    types = id_types(store)
    assert types is not None
    assert model.ratings_version is not None
    nothing = news.new.slice(0, 0)
    leaving, stored = nothing, nothing.select(PAIR)
    removed = dict.fromkeys(news.pending["request_id"].to_pylist(), 0)
    if news.n_requests:
        rules = requests.rules(news.pending, guard=False)
        named = _named(store, news.pending, types)
        before = store.read(ratings.TABLE, model.ratings_version, COLUMNS, named)
        hits = covered(before, rules)
        is_hit = _mask(before, hits)
        leaving = before.filter(pa.array(is_hit & _is_fitted(store, model, before)))
        found = [_asked_pairs(before, hits)]
        stored = before.filter(pa.array(is_hit)).select(PAIR)
        if news.ratings_version != model.ratings_version:
            # A job that died may have deleted some of them, and more may have been ingested since.
            now = store.read(ratings.TABLE, news.ratings_version, COLUMNS, named)
            hits = covered(now, rules)
            stored = now.filter(pa.array(_mask(now, hits))).select(PAIR)
            found.append(_asked_pairs(now, hits))
        removed |= _counted(pa.concat_tables(found))
    added = nothing
    if news.may_add:
        added = _added(store, model, news, types)
        replaced = _replaced(store, model, added, types)
        if leaving.num_rows and replaced.num_rows:
            replaced = replaced.filter(pa.array(~among(replaced, leaving)))
    else:
        replaced = nothing
    pairs = pa.concat_tables([_changed(leaving, -1), _changed(replaced, -1), _changed(added, 1)])
    counts = Counts(
        news.n_requests,
        sorted(name for name, n in removed.items() if not n)[:MOST_NAMED],
        leaving.num_rows,
        added.num_rows,
        added.num_rows - replaced.num_rows - leaving.num_rows,
    )
    return Changes(removed, stored, pairs, counts)


def _mask(rows: pa.Table, hits: pa.Table) -> np.ndarray:
    mask = np.zeros(rows.num_rows, np.bool_)
    mask[hits["place"].to_numpy()] = True
    return mask


def _is_fitted(store: DeltaRsStore, model: ModelVersion, rows: pa.Table) -> np.ndarray:
    """Which rows (`COLUMNS`) of any version of the table the model was fitted to, bool (n,)."""
    known = rows["ingest_id"].to_numpy() <= (model.ratings_ingest_id or 0)
    rules = fitted_rules(store, model)
    return known if rules is None else known & ~_mask(rows, covered(rows, rules))


def _asked_pairs(rows: pa.Table, hits: pa.Table) -> pa.Table:
    """user_id, item_id, request_id for each hit."""
    pairs = rows.select(PAIR).take(hits["place"])
    return pairs.append_column("request_id", hits["request_id"])


def _counted(pairs: pa.Table) -> dict[str, int]:
    counted = query(
        "SELECT request_id, count(*) AS n FROM (SELECT DISTINCT * FROM pairs) GROUP BY request_id",
        pairs=pairs,
    )
    return dict(zip(*[column.to_pylist() for column in counted.columns], strict=True))


def _named(store: DeltaRsStore, asked_for: pa.Table, types: dict[str, pa.DataType]) -> str | None:
    """SQL that ratings of the users and items meet which these requests name, and few others; None:
    read all."""
    by_item = pc.is_in(asked_for["scope"], pa.array(["item"]))
    users = asked_for.filter(pc.invert(by_item))["user_id"].drop_null().unique()
    items = (
        asked_for.filter(pc.or_(by_item, pc.equal(asked_for["scope"], requests.LIFT)))["item_id"]
        .drop_null()
        .unique()
    )
    return _among_users_or_items(
        store, typed_ids(users, types["user_id"]), typed_ids(items, types["item_id"])
    )


def _among_users_or_items(
    store: DeltaRsStore, users: pa.Array, items: pa.Array | None
) -> str | None:
    """SQL that ratings of these users and of these items meet, and few others; None: read all."""
    users = users.drop_null()
    items = pa.array([], pa.int64()) if items is None else items.drop_null()
    if len(users) > FEW_NAMED or len(items) > FEW_NAMED:
        return None
    terms = []
    if len(users):
        blocks, keys = user_keys(xxhash64(users), user_blocks(store))
        terms.append(f"user_block IN ({_listed(blocks)}) AND user_key IN ({_listed(keys)})")
    if len(items):
        names = items.to_pylist()
        if not pa.types.is_integer(items.type):
            names = ["'" + name.replace("'", "''") + "'" for name in names]
        terms.append(f"item_id IN ({', '.join(map(str, names))})")
    return " OR ".join(f"({term})" for term in terms) or "false"


def _listed(numbers: np.ndarray) -> str:
    return ", ".join(map(str, np.unique(numbers).tolist()))


def _added(
    store: DeltaRsStore, model: ModelVersion, news: News, types: dict[str, pa.DataType]
) -> pa.Table:
    """The retained ratings that enter the model: those ingested since, and those that a
    reinstatement lets in."""
    rows = news.new
    if news.lifts.num_rows:
        named = _named(store, news.lifts, types)
        let_in = store.read(ratings.TABLE, news.ratings_version, COLUMNS, named)
        ids = {name: typed_ids(news.lifts[name].drop_null().unique(), types[name]) for name in PAIR}
        lifted = pc.or_(*[pc.is_in(let_in[name], known.drop_null()) for name, known in ids.items()])
        let_in = let_in.filter(lifted)
        let_in = let_in.filter(pa.array(~_is_fitted(store, model, let_in)))
        if rows.num_rows and let_in.num_rows:
            let_in = let_in.filter(pa.array(~among(let_in, rows)))
        rows = pa.concat_tables([rows, let_in])
    return retained(rows, requests.rules_of(store, news.tombstones_version, model.receipts_version))


def _replaced(
    store: DeltaRsStore, model: ModelVersion, added: pa.Table, types: dict[str, pa.DataType]
) -> pa.Table:
    """The rows of the model's version whose pair is added anew, and that it was fitted to."""
    users = added["user_id"].combine_chunks().unique()
    named = _among_users_or_items(store, users, None)
    before = store.read(ratings.TABLE, model.ratings_version, COLUMNS, named)
    if not before.num_rows:
        return before
    before = before.filter(pa.array(among(before, added)))
    return before.filter(pa.array(_is_fitted(store, model, before)))


def _changed(rows: pa.Table, change: int) -> pa.Table:
    changes = pa.array(np.full(rows.num_rows, change, np.int32))
    return pa.table(
        {
            "user_id": rows["user_id"],
            "item_id": rows["item_id"],
            "value": rows["rating"],
            "change": changes,
        }
    )
