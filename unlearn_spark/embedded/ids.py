"""Ids as both engines see them: their hash, their block, and their form as text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from unlearn_spark.tables.ratings import USER_KEYS

_SEED = 42
"""Spark's seed of `xxhash64`."""


def xxhash64(ids: pa.Array | pa.ChunkedArray) -> NDArray[np.int64]:
    """Spark's `xxhash64` of ids (string or int64, without nulls), int64 (n,)."""
    return _hashed(ids, np.arange(len(ids)), np.full(len(ids), _SEED, np.uint64)).view(np.int64)


def xxhash64_of(
    columns: Sequence[pa.Array | pa.ChunkedArray], seed: int | None = None
) -> NDArray[np.int64]:
    """Spark's `xxhash64` of several columns of ids without nulls, int64 (n,), and, if given, of an
    int behind them (bigint if it does not fit)."""
    hashes = np.full(len(columns[0]), _SEED, np.uint64)
    # Each column is hashed with the hash of those before it as its seed.
    for column in columns:
        encoded = pa.chunked_array(column).combine_chunks().dictionary_encode()
        hashes = _hashed(encoded.dictionary, encoded.indices.to_numpy(), hashes)
    if seed is not None:
        last = pa.array([seed], pa.int32() if -(2**31) <= seed < 2**31 else pa.int64())
        hashes = _hashed(last, np.zeros(len(hashes), np.intp), hashes)
    return hashes.view(np.int64)


def _hashed(
    values: pa.Array | pa.ChunkedArray, places: NDArray[np.integer], seeds: NDArray[np.uint64]
) -> NDArray[np.uint64]:
    """XXH64 of values (strings or integers) at some places, each with a seed, uint64 (n,)."""
    if isinstance(values, pa.ChunkedArray):
        values = values.combine_chunks()
    if pa.types.is_integer(values.type):
        numbers = np.ascontiguousarray(values.to_numpy())
        return _xxh64(numbers.view(np.uint8).reshape(-1, numbers.itemsize), places, seeds)
    _, ends, text = values.buffers()
    bounds = np.frombuffer(ends, np.int32)[values.offset :][: len(values) + 1]
    lengths = np.diff(bounds)
    data = np.frombuffer(text or b"", np.uint8)
    hashes = np.empty(len(places), np.uint64)
    row_of = np.empty(len(values), np.intp)
    for length in np.unique(lengths):
        rows = np.flatnonzero(lengths == length)
        row_of[rows] = np.arange(len(rows))
        mine = np.flatnonzero(lengths[places] == length)
        hashes[mine] = _xxh64(
            data[bounds[rows][:, None] + np.arange(length)], row_of[places[mine]], seeds[mine]
        )
    return hashes


_PRIMES = np.array(
    [
        0x9E3779B185EBCA87,
        0xC2B2AE3D27D4EB4F,
        0x165667B19E3779F9,
        0x85EBCA77C2B2AE63,
        0x27D4EB2F165667C5,
    ],
    np.uint64,
)


def _xxh64(
    data: NDArray[np.uint8], places: NDArray[np.integer], seeds: NDArray[np.uint64]
) -> NDArray[np.uint64]:
    """XXH64 (the xxHash specification, 0.1.1) of rows of bytes, uint8 (m, length), at some
    places, each with a seed, uint64 (n,)."""
    one, two, three, four, five = _PRIMES[:, None]
    length = data.shape[1]

    def lanes(first: int, width: int) -> NDArray[np.uint64]:
        part = np.ascontiguousarray(data[:, first : first + width]).view(f"<u{width}")[:, 0]
        return part.astype(np.uint64)[places]

    def rotated(values: NDArray[np.uint64], by: int) -> NDArray[np.uint64]:
        return (values << np.uint64(by)) | (values >> np.uint64(64 - by))

    def one_round(state: NDArray[np.uint64], lane: NDArray[np.uint64]) -> NDArray[np.uint64]:
        return rotated(state + lane * two, 31) * one

    at = 0
    if length < 32:
        hashes = seeds + five
    else:
        states = [seeds + one + two, seeds + two, seeds.copy(), seeds - one]
        while at + 32 <= length:
            states = [one_round(state, lanes(at + 8 * n, 8)) for n, state in enumerate(states)]
            at += 32
        hashes = sum(map(rotated, states[1:], (7, 12, 18)), rotated(states[0], 1))
        for state in states:
            hashes = (hashes ^ one_round(np.zeros_like(state), state)) * one + four
    hashes = hashes + np.uint64(length)
    while at + 8 <= length:
        hashes = hashes ^ one_round(np.zeros_like(hashes), lanes(at, 8))
        hashes = rotated(hashes, 27) * one + four
        at += 8
    if at + 4 <= length:
        hashes = rotated(hashes ^ (lanes(at, 4) * one), 23) * two + three
        at += 4
    while at < length:
        hashes = rotated(hashes ^ (lanes(at, 1) * five), 11) * one
        at += 1
    hashes = (hashes ^ (hashes >> np.uint64(33))) * two
    hashes = (hashes ^ (hashes >> np.uint64(29))) * three
    return hashes ^ (hashes >> np.uint64(32))


def blocks_of(hashes: NDArray[np.int64], n_blocks: int) -> NDArray[np.int32]:
    """The storage block of each hash: its non-negative remainder."""
    return (hashes % n_blocks).astype(np.int32)


def user_keys(
    hashes: NDArray[np.int64], n_blocks: int
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """user_block and user_key of users, from independent parts of their hash."""
    blocks = blocks_of(hashes, n_blocks)
    return blocks, (blocks * USER_KEYS + (hashes >> 32) % USER_KEYS).astype(np.int32)


def typed_ids(texts: pa.Array | pa.ChunkedArray, kind: pa.DataType) -> pa.Array:
    """Text ids in the type of a ratings column; null unless that type writes it so (not 007)."""
    if not pa.types.is_integer(kind):
        return pa.array(texts.to_pylist(), pa.string())
    return pa.array([_integer(text) for text in texts.to_pylist()], pa.int64())


def _integer(text: str | None) -> int | None:
    if text is None or len(text) > 20 or not text.isascii():
        return None
    try:
        number = int(text)
    except ValueError:
        return None
    return number if str(number) == text and -(2**63) <= number < 2**63 else None


def as_text(ids: pa.Array | pa.ChunkedArray) -> pa.Array:
    """Ids as the tables of requests and the ledger write them."""
    array = ids.combine_chunks() if isinstance(ids, pa.ChunkedArray) else ids
    return array.cast(pa.string())
