"""The job evaluate in this process: held-out errors and ranking quality.

RMSE and MAE are over held-out pairs whose user and item the model knows. Rankings leave out what
the user has rated in training, and are means over users with a relevant held-out item; a user that
the model does not know counts with 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from unlearn_spark import publishing
from unlearn_spark.config import AlsSettings
from unlearn_spark.embedded.formats import read_ratings
from unlearn_spark.embedded.ids import xxhash64_of
from unlearn_spark.embedded.ingest import read
from unlearn_spark.embedded.ratings import PAIR, read_retained
from unlearn_spark.embedded.recommend import read_vectors, seen_pairs
from unlearn_spark.embedded.score import Vectors, pairs_by_query, predict_pairs, top_n
from unlearn_spark.embedded.training import fit
from unlearn_spark.errors import InputError
from unlearn_spark.evaluation import split
from unlearn_spark.evaluation.metrics import RankingMetrics, as_json, ranking_scores
from unlearn_spark.tables.delta_rs import DeltaRsStore
from unlearn_spark.tables.models import ModelVersion

if TYPE_CHECKING:
    from unlearn_spark.core.training import Progress

Seen = Callable[[Vectors], Iterator[pa.Table]]
"""From users to tables (user_id, item_id) of at least the pairs that they have rated."""


def read_held_out(
    source: Any, format: str, columns: Mapping[str, str], threads: int, option: str = "--input"
) -> pa.Table:
    """The usable ratings of an input that an option names: user_id, item_id, rating, and more.

    Raises
    ------
    UserError
        The input is missing, empty or not of that format.
    """
    try:
        return read(read_ratings(source, format, columns), None, threads).usable
    except InputError as error:
        raise InputError(str(error).replace("--input", option, 1)) from error


def evaluate(
    store: DeltaRsStore,
    model: ModelVersion,
    held_out: pa.Table,
    k: int,
    min_rating: float | None,
    threads: int,
) -> dict[str, Any]:
    """Measure a published version on held-out ratings; return the metrics (`held_out_metrics`).

    Parameters
    ----------
    held_out
        user_id, item_id (string or integer), rating; ids may be unknown.

    Raises
    ------
    InputError
        No rating is held out, or none is relevant.
    """
    users, items = (read_vectors(store, model, side).by_id() for side in ("user", "item"))

    def seen(asked: Vectors) -> Iterator[pa.Table]:
        if model.ratings_version is not None:
            yield from seen_pairs(store, model, asked.ids)

    return held_out_metrics(users, items, held_out, seen, k, min_rating, threads)


def evaluate_split(
    store: DeltaRsStore,
    als: AlsSettings,
    fraction: float,
    seed: int,
    k: int,
    min_rating: float | None,
    progress: Progress,
    threads: int,
) -> dict[str, Any]:
    """Measure a model that is fitted to one share of the ratings table on the other share.

    Nothing is published. Returns the metrics, ratings_fitted, sweeps and max_residual.

    Raises
    ------
    UserError
        There are no ratings, the fraction is not between 0 and 1, or nothing is held out.
    """
    basis = publishing.basis(store)
    versions = basis.ratings_version, basis.tombstones_version, basis.receipts_version
    train, held_out = split_by_hash(read_retained(store, *versions), fraction, seed)
    fitted = fit(train, als, threads, on_sweep=lambda report: progress(report.line()))
    users, items = (
        Vectors(fitted.ids[side], fitted.factors[side]).by_id() for side in ("user", "item")
    )

    def seen(_: Vectors) -> Iterator[pa.Table]:
        yield train.select(PAIR)

    metrics = held_out_metrics(users, items, held_out, seen, k, min_rating, threads)
    summary = fitted.summary
    return {
        **metrics,
        "ratings_fitted": summary.ratings,
        "sweeps": summary.sweeps,
        "max_residual": summary.max_residual,
    }


def split_by_hash(ratings: pa.Table, fraction: float, seed: int) -> tuple[pa.Table, pa.Table]:
    """The ratings (user_id, item_id, ...) to train on, and those that are held out.

    Raises
    ------
    InputError
        The fraction is not between 0 and 1.
    """
    below = split.threshold(fraction)
    drawn = xxhash64_of([ratings[name] for name in PAIR], seed) % split.BUCKETS
    held_out = drawn < below
    return ratings.filter(pa.array(~held_out)), ratings.filter(pa.array(held_out))


def held_out_metrics(
    users: Vectors,
    items: Vectors,
    held_out: pa.Table,
    seen: Seen,
    k: int,
    min_rating: float | None,
    threads: int,
) -> dict[str, Any]:
    """Errors and ranking measures of a model on ratings that it was not fitted to.

    Parameters
    ----------
    users, items
        By rising id.
    held_out
        user_id, item_id (compared as text where the model has another type), rating.
    seen
        Gives the ratings of some users that the model was fitted to; they are not recommended.
    k
        Places that count in rankings.
    min_rating
        From this rating up a held-out item is relevant; None: all are.

    Returns
    -------
    dict
        `ratings` and, among these, `ratings_known`, whose user and item the model has; rmse and mae
        over the known ones (None without any); the ranking measures at k, over `users` users with
        a relevant item.

    Raises
    ------
    InputError
        No rating is held out, or none is relevant.
    """
    if not held_out.num_rows:
        raise InputError("there are no held-out ratings; give some, or a larger split")
    rows = users.rows_of(held_out["user_id"]), items.rows_of(held_out["item_id"])
    known = (rows[0] >= 0) & (rows[1] >= 0)
    values = held_out["rating"].to_numpy().astype(np.float64)
    errors = values[known] - predict_pairs(users, items, rows[0][known], rows[1][known])
    relevant = held_out
    if min_rating is not None:
        relevant = held_out.filter(pa.array(values >= min_rating))
    ranking = ranking_metrics(users, items, relevant, seen, k, threads)
    return {
        "rmse": float(np.sqrt(np.mean(errors**2))) if len(errors) else None,
        "mae": float(np.mean(np.abs(errors))) if len(errors) else None,
        **as_json(ranking, k),
        "users": ranking.users,
        "ratings": held_out.num_rows,
        "ratings_known": len(errors),
    }


def ranking_metrics(
    users: Vectors, items: Vectors, relevant: pa.Table, seen: Seen, k: int, threads: int
) -> RankingMetrics:
    """Compare the k best items of every user that has a relevant one with these.

    `relevant` has a row (user_id, item_id) for each; repeated rows count once.

    Raises
    ------
    InputError
        Nothing is relevant.
    """
    if not relevant.num_rows:
        raise InputError("there are no held-out items to compare with; give held-out ratings")
    judged, user_codes = _numbered(relevant["user_id"])
    named, item_codes = _numbered(relevant["item_id"])
    pairs = np.unique(user_codes * len(named) + item_codes)
    user_codes, item_codes = np.divmod(pairs, len(named))
    user_rows, item_rows = users.rows_of(judged), items.rows_of(named)

    places = np.flatnonzero(user_rows >= 0)
    asked = users.take(user_rows[places])
    hits = np.zeros((len(judged), k), np.bool_)
    wanted = _keys(user_codes, item_rows[item_codes], len(items))
    excluded = pairs_by_query(asked, items, seen(asked))
    for found in top_n(asked, items, k, excluded, threads):
        of_user = places[found.queries]
        is_hit = np.isin(_keys(of_user, found.chosen, len(items)), wanted)
        hits[of_user, found.places - 1] = is_hit
    scores = ranking_scores(hits, np.bincount(user_codes, minlength=len(judged)))
    return RankingMetrics(
        len(judged), **{name: float(values.mean()) for name, values in scores.items()}
    )


def _numbered(ids: pa.ChunkedArray) -> tuple[pa.Array, NDArray[np.int64]]:
    """The distinct ids, and the number of each row's id among them."""
    encoded = ids.combine_chunks().dictionary_encode()
    return encoded.dictionary, encoded.indices.to_numpy().astype(np.int64)


def _keys(users: NDArray[np.int64], items: NDArray[np.integer], n_items: int) -> NDArray[np.int64]:
    """One number for each pair; pairs with an item -1 are left out."""
    return (users * n_items + items)[items >= 0]
