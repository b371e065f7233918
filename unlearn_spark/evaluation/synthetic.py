"""Generate ratings that look like a shop's: long tails, a low-rank taste, noise, years of times.

Needs NumPy and Arrow only. Ratings are written in slices of users, so memory depends on the slice
and not on the total.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.csv
import pyarrow.parquet

from unlearn_spark.errors import InputError, SettingsError
from unlearn_spark.preconditions import require_local_file

TRUE_RANK = 10
"""Rank of the generated preferences."""

SCHEMA = pa.schema(
    [
        ("user_id", pa.int64()),
        ("item_id", pa.int64()),
        ("rating", pa.float32()),
        ("rated_at", pa.timestamp("us", tz="UTC")),
    ]
)

_SLICE = 2_000_000  # ratings
_FIRST_SECOND = 1_577_836_800  # 2020-01-01
_SECONDS = 5 * 365 * 86_400
_ACTIVITY_SPREAD = 1.2  # sigma of the log-normal activity of users
_POPULARITY_SPREAD = 1.6  # and of the popularity of items


@dataclass(frozen=True)
class Synthetic:
    """What was written."""

    users: int
    items: int
    ratings: int


def write(users: int, items: int, ratings: int, seed: int, output: str | Path) -> Synthetic:
    """Write exactly `ratings` ratings, no pair twice, to a `.csv` or `.parquet` file.

    Ids are 1..users and 1..items; all occur if there are enough ratings. Ratings are 0.5, 1, ... 5.
    Times are in 2020 to 2024, in csv as seconds since 1970. The same arguments give the same file.

    Raises
    ------
    SettingsError
        A count is below one, there are more ratings than pairs, or the output's suffix is another.
    InputError
        The output cannot be written.
    """
    for name, value in (("users", users), ("items", items), ("ratings", ratings)):
        if value < 1:
            raise SettingsError(f"--{name} {value}: expected at least 1")
    if ratings > users * items:
        raise SettingsError(
            f"--ratings {ratings}: {users} users and {items} items have only {users * items} pairs"
        )
    if seed < 0:
        raise SettingsError(f"--seed {seed}: expected 0 or more")
    require_local_file("--output", str(output))
    path = Path(output)
    opened = _WRITERS.get(path.suffix.lower())
    if opened is None:
        raise SettingsError(f"--output {path}: expected a name that ends in .csv or .parquet")
    seen_users = seen_items = written = 0
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with opened(path) as writer:
            present = np.zeros(items, bool)
            for table in generate(users, items, ratings, seed):
                writer.write_table(_for_csv(table) if path.suffix.lower() == ".csv" else table)
                # A user's ratings lie in one slice.
                seen_users += len(np.unique(table.column("user_id").to_numpy()))
                present[table.column("item_id").to_numpy() - 1] = True
                written += table.num_rows
            seen_items = int(present.sum())
    except OSError as error:
        raise InputError(f"--output {path}: cannot be written ({error.strerror})") from error
    return Synthetic(seen_users, seen_items, written)


def generate(users: int, items: int, ratings: int, seed: int) -> Iterator[pa.Table]:
    """The ratings as tables of `SCHEMA`, in the order of users."""
    rng = np.random.default_rng([seed, 0])
    activity = rng.lognormal(0.0, _ACTIVITY_SPREAD, users)
    popularity = rng.lognormal(0.0, _POPULARITY_SPREAD, items)
    degrees = _share_out(activity, ratings, items)
    chance = np.cumsum(popularity) / popularity.sum()
    chance[-1] = 1.0
    taste = _Taste(rng, users, items)
    # Every item gets one rating first, so that the tail is not empty.
    order = rng.permutation(items) if ratings >= items else np.zeros(0, np.int64)
    ends = np.cumsum(degrees)
    # A user's share of the reserved items follows their degree; it never exceeds it.
    reserved = (ends * len(order)) // max(ratings, 1)
    first_user, slice_index = 0, 0
    while first_user < users:
        before = ends[first_user - 1] if first_user else 0
        last_user = max(first_user + 1, int(np.searchsorted(ends, before + _SLICE, "right")))
        last_user = min(last_user, users)
        slice_rng = np.random.default_rng([seed, 1, slice_index])
        low = int(reserved[first_user - 1]) if first_user else 0
        counts = np.diff(reserved[first_user:last_user], prepend=low)
        own = np.repeat(np.arange(last_user - first_user), counts) * items
        own += order[low : low + len(own)]
        pairs = _pairs(slice_rng, degrees[first_user:last_user], own, chance, popularity)
        if len(pairs):
            yield taste.rate(slice_rng, first_user + pairs // items, pairs % items)
        first_user, slice_index = last_user, slice_index + 1


def _share_out(weights: np.ndarray, total: int, most: int) -> np.ndarray:
    """Integers that sum to `total`, in proportion to `weights`, each from 1 (if it can) to `most`.

    Rounding is by largest remainder. Others get what the upper limit cuts off.
    """
    least = 1 if total >= len(weights) else 0
    low, high = 0.0, (total + 1.0) * most / weights.min()
    if not math.isfinite(high):
        high = 1e300
    for _ in range(200):  # the scale at which the limited shares sum to the total
        scale = (low + high) / 2
        if np.clip(weights * scale, least, most).sum() < total:
            low = scale
        else:
            high = scale
    shares = np.clip(weights * high, least, most)
    counts = np.floor(shares).astype(np.int64)
    missing = total - int(counts.sum())
    remainder = np.where(counts < most, shares - counts, -1.0)
    while missing > 0:
        chosen = np.argsort(-remainder, kind="stable")[:missing]
        chosen = chosen[counts[chosen] < most]
        counts[chosen] += 1
        missing -= len(chosen)
        remainder[counts >= most] = -1.0
    while missing < 0:  # only where rounding in the sum overshot
        chosen = np.argsort(remainder, kind="stable")
        chosen = chosen[counts[chosen] > least][:-missing]
        counts[chosen] -= 1
        missing += len(chosen)
    return counts


def _pairs(
    rng: np.random.Generator,
    degrees: np.ndarray,
    own: np.ndarray,
    chance: np.ndarray,
    popularity: np.ndarray,
) -> np.ndarray:
    """Distinct pairs `user * n_items + item`, ascending: `degrees[u]` of each user u of a slice.

    They include the pairs `own`. The rest is drawn by popularity, and drawn again where it hits a
    pair that is there already. Users whose last few items are hard to hit draw those without
    replacement instead.
    """
    n_items = len(popularity)
    n_users = len(degrees)
    have = np.sort(own)
    crowded = degrees > n_items // 4
    for _ in range(60):
        missing = degrees - np.bincount(have // n_items, minlength=n_users)
        missing[crowded] = 0
        n_missing = int(missing.sum())
        if n_missing == 0:
            break
        drawn = np.searchsorted(chance, rng.random(n_missing), "right")
        drawn += np.repeat(np.arange(n_users), missing) * n_items
        # NumPy's set functions hash, which is many times slower than sorting here.
        drawn.sort()
        fresh = np.ones(len(drawn), bool)
        fresh[1:] = drawn[1:] != drawn[:-1]
        if len(have):
            place = np.minimum(np.searchsorted(have, drawn), len(have) - 1)
            fresh &= have[place] != drawn
        # A stable sort merges two sorted runs in one pass.
        have = np.sort(np.concatenate([have, drawn[fresh]]), kind="stable")
    missing = degrees - np.bincount(have // n_items, minlength=n_users)
    extra = []
    starts = np.searchsorted(have, np.arange(n_users + 1) * n_items)
    log_popularity = np.log(popularity)
    for user in np.flatnonzero(missing):
        # Gumbel top-k: a sample without replacement, in proportion to popularity.
        keys = log_popularity + rng.gumbel(size=n_items)
        keys[have[starts[user] : starts[user + 1]] - user * n_items] = -np.inf
        chosen = np.argpartition(-keys, missing[user] - 1)[: missing[user]]
        extra.append(user * n_items + chosen)
    return np.sort(np.concatenate([have, *extra]))


class _Taste:
    """Mean, biases, rank-ten preferences and noise, rounded to half stars."""

    def __init__(self, rng: np.random.Generator, users: int, items: int) -> None:
        # Spectrum falls as 1/sqrt(rank), as it does in real tastes.
        scale = 0.9 / np.sqrt(np.arange(1, TRUE_RANK + 1))
        scale *= 1 / np.linalg.norm(scale)
        self.user = (rng.standard_normal((users, TRUE_RANK)) * scale).astype(np.float32)
        self.item = rng.standard_normal((items, TRUE_RANK)).astype(np.float32)
        self.user_bias = (0.35 * rng.standard_normal(users)).astype(np.float32)
        self.item_bias = (0.4 * rng.standard_normal(items)).astype(np.float32)
        # Users join one by one and stay for a while.
        self.joined = rng.random(users) * 0.9
        self.stay = rng.exponential(0.2, users) + 0.002

    def rate(self, rng: np.random.Generator, users: np.ndarray, items: np.ndarray) -> pa.Table:
        n = len(users)
        value = np.full(n, 3.5, np.float32)
        value += self.user_bias[users] + self.item_bias[items]
        for k in range(TRUE_RANK):  # by column: no (n, rank) copies
            value += 0.7 * self.user[users, k] * self.item[items, k]
        value += 0.5 * rng.standard_normal(n, dtype=np.float32)
        rating = np.clip(np.rint(value * 2), 1, 10).astype(np.float32) / 2
        stay = np.minimum(self.stay[users], 1 - self.joined[users])
        when = self.joined[users] + stay * rng.random(n)
        seconds = _FIRST_SECOND + (when * _SECONDS).astype(np.int64)
        return pa.table(
            [
                pa.array(users + 1, pa.int64()),
                pa.array(items + 1, pa.int64()),
                pa.array(rating),
                pa.array(seconds * 1_000_000).cast(SCHEMA.field("rated_at").type),
            ],
            schema=SCHEMA,
        )


def _for_csv(table: pa.Table) -> pa.Table:
    seconds = pa.compute.divide(table.column("rated_at").cast(pa.int64()), 1_000_000)
    return table.set_column(3, "rated_at", seconds)


def _open_csv(path: Path) -> AbstractContextManager[Any]:
    schema = SCHEMA.set(3, pa.field("rated_at", pa.int64()))
    options = pa.csv.WriteOptions(quoting_style="none", quoting_header="none")
    return pa.csv.CSVWriter(path, schema, write_options=options)


def _open_parquet(path: Path) -> AbstractContextManager[Any]:
    return pa.parquet.ParquetWriter(path, SCHEMA)


_WRITERS: dict[str, Callable[[Path], AbstractContextManager[Any]]] = {
    ".csv": _open_csv,
    ".parquet": _open_parquet,
}
