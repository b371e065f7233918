"""One sweep without Spark: the product's kernel, plain NumPy and the library implicit.

    python benchmarks/kernels.py --rank 64 --rank 128

Every contestant solves all rows of both sides once, in as many processes (implicit: threads) as
there are cores, each with one BLAS thread; the rows are dealt out before the clock starts. What a
sweep on Spark takes more than the kernel here is Spark's share.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray
from scipy.linalg.blas import ssyrk
from scipy.linalg.lapack import sposv
from threadpoolctl import threadpool_limits

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import common
from benchmarks.common import ALPHA, REG_PARAM
from unlearn_spark.core.blocks import RatingBlock
from unlearn_spark.core.kernel import solve_rows
from unlearn_spark.core.objective import Objective
from unlearn_spark.evaluation import synthetic


def entries(users: int, items: int, ratings: int) -> tuple[Any, Any, Any]:
    """Generated ratings: user and item numbers from 0 (int32), and values (float32)."""
    path = Path(tempfile.mkdtemp(prefix="unlearn-bench-")) / "ratings.parquet"
    synthetic.write(users, items, ratings, 1, str(path))
    u, i, values = common.numbered(pq.read_table(path))
    return u.astype(np.int32), i.astype(np.int32), values


def sides_of(u: Any, i: Any, values: Any) -> list[RatingBlock]:
    """The ratings by user and by item."""
    return [RatingBlock.from_entries(u, i, values), RatingBlock.from_entries(i, u, values)]


def some_factors(
    sides: list[RatingBlock], rank: int, random: np.random.Generator
) -> list[NDArray[np.float32]]:
    """Factors of both sides to sweep from."""
    return [random.normal(0, 0.3, (side.n_rows, rank)).astype(np.float32) for side in sides]


def numpy_rows(block: RatingBlock, fixed: NDArray[np.float32]) -> NDArray[np.float32]:
    """Gather, rank-k update and Cholesky solve, a row at a time: the textbook (explicit)."""
    rank = fixed.shape[1]
    solved = np.empty((block.n_rows, rank), np.float32)
    ridge = np.eye(rank, dtype=np.float32)
    for row in range(block.n_rows):
        mine = slice(block.indptr[row], block.indptr[row + 1])
        near, values = fixed[block.others[mine]], block.values[mine]
        matrix = ssyrk(np.float32(1), near.T, lower=1) + REG_PARAM * len(values) * ridge
        solved[row] = sposv(matrix, near.T @ values, lower=1)[1]
    return solved


def work(
    how: str, blocks: list[RatingBlock], fixed: list[NDArray[np.float32]], pipe: Any, implicit: bool
) -> None:
    """A process: at each word from the pipe one half-sweep over its rows."""
    objective = Objective(REG_PARAM, implicit, ALPHA)
    while (side := pipe.recv()) is not None:
        other = fixed[1 - side]
        if how == "plain NumPy":
            numpy_rows(blocks[side], other)
        else:
            gram = other.T.astype(np.float64) @ other if implicit else None
            part = blocks[side]
            solve_rows(part.indptr, part.others, part.values, other, objective, gram=gram)
        pipe.send(side)


def sweeps(
    how: str,
    sides: list[RatingBlock],
    fixed: list[NDArray[np.float32]],
    implicit: bool,
    repeat: int,
) -> list[float]:
    """Seconds of sweeps after one to warm up."""
    cores, context = len(os.sched_getaffinity(0)), get_context("fork")
    pipes, processes = [], []
    for number in range(cores):
        parts = [side.rows(side.slots % cores == number) for side in sides]
        ours, theirs = context.Pipe()
        process = context.Process(target=work, args=(how, parts, fixed, theirs, implicit))
        process.start()
        pipes.append(ours)
        processes.append(process)
    seconds = []
    for _ in range(1 + repeat):
        started = time.perf_counter()
        for side in (0, 1):
            for pipe in pipes:
                pipe.send(side)
            for pipe in pipes:
                pipe.recv()
        seconds.append(time.perf_counter() - started)
    for pipe in pipes:
        pipe.send(None)
    for process in processes:
        process.join()
    return seconds[1:]


def peer(users: Any, items: Any, values: Any, rank: int, cg: bool, repeat: int) -> list[float]:
    """Seconds of sweeps of the library implicit: a longer fit less a one-sweep fit."""
    fit = common.library_fit((users, items, values), rank, REG_PARAM, ALPHA, cg)
    return [(fit(3) - fit(1)) / 2 for _ in range(repeat)]


@click.command()
@click.option("--users", default=70_000)
@click.option("--items", default=10_700)
@click.option("--ratings", default=10_000_000)
@click.option("--rank", "ranks", multiple=True, type=int, default=(64, 128))
@click.option("--repeat", default=3)
@click.option("--peers/--no-peers", default=True, help="The library implicit, where installed.")
def main(
    users: int, items: int, ratings: int, ranks: tuple[int, ...], repeat: int, peers: bool
) -> None:
    """Print the table and save the raw figures."""
    u, i, values = entries(users, items, ratings)
    sides = sides_of(u, i, values)
    random = np.random.default_rng(1)
    raw: dict[str, Any] = {}
    for rank in ranks:
        fixed = some_factors(sides, rank, random)
        runs = {
            f"{mode}, {how}": partial(sweeps, how, sides, fixed, mode == "implicit", repeat)
            for mode, how in (
                ("explicit", "ours"),
                ("explicit", "plain NumPy"),
                ("implicit", "ours"),
            )
        }
        if peers:
            of_library = partial(peer, u, i, values, rank)
            runs["implicit, library, Cholesky"] = partial(of_library, cg=False, repeat=1)
            runs["implicit, library, 3 CG steps"] = partial(of_library, cg=True, repeat=repeat)
        for name, run in runs.items():
            with threadpool_limits(1, "blas"):
                raw[f"{name}, rank {rank}"] = run()
    medians = {name: statistics.median(seconds) for name, seconds in raw.items()}
    common.table(["one sweep", "s"], [[name, value] for name, value in medians.items()])
    data = {"users": users, "items": items, "ratings": ratings, "ranks": list(ranks)}
    common.save(f"kernels-{ratings}", {"data": data, "raw": raw, "medians": medians})


if __name__ == "__main__":
    main()
