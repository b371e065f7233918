"""Initial factors that depend only on seed, side and id.

A counter-based generator, keyed by the id's hash, draws them. So a seed gives the same start for
any number of blocks, any order of rows and any number of tasks.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _splitmix64(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The output function of SplitMix64 (Steele, Lea, Flood 2014), elementwise."""
    z = state.copy()
    z ^= z >> np.uint64(30)
    z *= np.uint64(0xBF58476D1CE4E5B9)
    z ^= z >> np.uint64(27)
    z *= np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return z


def initial_factors(
    hashes: NDArray[np.int64], rank: int, seed: int, side: str, nonnegative: bool = False
) -> NDArray[np.float32]:
    """Random unit vectors, the start of Spark MLlib's ALS.

    Parameters
    ----------
    hashes : int64 (n_rows,)
        `xxhash64` of each id.
    seed, side
        Any integer, and "user" or "item".
    nonnegative
        Take absolute values.

    Returns
    -------
    float32 (n_rows, rank)
    """
    with np.errstate(over="ignore"):  # arithmetic modulo 2**64 is the point
        salt = np.uint64(seed % (1 << 64)) * np.uint64(2) + np.uint64(side == "user")
        key = _splitmix64(hashes.view(np.uint64) ^ _splitmix64(np.array([salt + _GOLDEN]))[0])
        steps = (np.arange(2 * rank, dtype=np.uint64) + np.uint64(1)) * _GOLDEN
        bits = _splitmix64(key[:, None] + steps[None, :])
    uniform = ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    # Box-Muller
    radius = np.sqrt(-2.0 * np.log(uniform[:, :rank]))
    normal = radius * np.cos(2.0 * np.pi * uniform[:, rank:])
    if nonnegative:
        np.abs(normal, out=normal)
    normal /= np.maximum(np.linalg.norm(normal, axis=1, keepdims=True), 1e-300)
    return normal.astype(np.float32)
