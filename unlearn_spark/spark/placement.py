"""Grouping keys that Spark spreads evenly: one part per partition."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache


def _murmur3_int(value: int, seed: int = 42) -> int:
    """Spark's `hash(int)`: Murmur3 x86 32-bit over one little-endian word, seed 42."""
    mask = 0xFFFFFFFF

    def rotate(x: int, r: int) -> int:
        return ((x << r) | (x >> (32 - r))) & mask

    k = (value & mask) * 0xCC9E2D51 & mask
    k = rotate(k, 15) * 0x1B873593 & mask
    h = (rotate(seed ^ k, 13) * 5 + 0xE6546B64) & mask
    h ^= 4
    h = (h ^ (h >> 16)) * 0x85EBCA6B & mask
    h = (h ^ (h >> 13)) * 0xC2B2AE35 & mask
    h ^= h >> 16
    return h - (1 << 32) if h >> 31 else h


@lru_cache(maxsize=64)
def balanced_keys(n: int) -> tuple[int, ...]:
    """`n` integers that Spark's hash partitioning puts into `n` partitions, one into each.

    The keys 0..n-1 would leave some partitions empty and put several parts into others, and a stage
    waits for its fullest partition. Results do not depend on the keys.
    """
    keys: dict[int, int] = {}
    candidate = 0
    while len(keys) < n:
        keys.setdefault(_murmur3_int(candidate) % n, candidate)
        candidate += 1
    return tuple(keys[index] for index in range(n))


def part_key(slot: str, keys: Sequence[int]) -> str:
    """SQL of the grouping key of a part, from a slot in it or from the part's own number."""
    return f"element_at({int_array(keys)}, {slot} % {len(keys)} + 1)"


def int_array(numbers: Iterable[int]) -> str:
    """SQL of an array of these numbers."""
    return f"array({', '.join(map(str, numbers))})"
