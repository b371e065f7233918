"""The contestants of a comparison with retraining, in this process."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from unlearn_spark.audit.comparison import drawing_line
from unlearn_spark.audit.figures import K, Measured
from unlearn_spark.config import AlsSettings
from unlearn_spark.core.blocks import SIDES, RatingBlock, other_side, scatter
from unlearn_spark.core.bounds import gram
from unlearn_spark.core.solver import solver_of
from unlearn_spark.core.threads import shared_out
from unlearn_spark.core.training import TrainingSummary
from unlearn_spark.embedded import training
from unlearn_spark.embedded.comparison.deletion import Deletion
from unlearn_spark.embedded.comparison.sample import Sample, draw_sample, score_sample
from unlearn_spark.embedded.evaluation import held_out_metrics
from unlearn_spark.embedded.ratings import PAIR
from unlearn_spark.embedded.recommend import read_vectors
from unlearn_spark.embedded.score import Vectors, places_of
from unlearn_spark.embedded.training import Encoded
from unlearn_spark.tables.delta_rs import DeltaRsStore

Model = Mapping[str, Vectors]
"""By side the factor rows, by rising id."""

PIECE_RATINGS = 1 << 16
"""Ratings that a thread scores at a time."""


@dataclass(frozen=True)
class EmbeddedContestants:
    """`audit.comparison.Contestants`.

    Attributes
    ----------
    encoded
        The retained ratings.
    held_out
        user_id, item_id, rating that count; None if none were given.
    """

    deletion: Deletion
    before: Model
    unlearned: Model
    encoded: Encoded
    sample: Sample
    held_out: pa.Table | None
    threads: int

    @classmethod
    def of(
        cls,
        store: DeltaRsStore,
        deletion: Deletion,
        threads: int,
        held_out: pa.Table | None,
        progress: Callable[[str], None],
    ) -> EmbeddedContestants:
        """Read the two versions and draw the sample; `held_out` has user_id, item_id, rating."""
        before, unlearned = (
            {side: read_vectors(store, version, side).by_id() for side in SIDES}
            for version in (deletion.before, deletion.after)
        )
        encoded = training.encode(deletion.retained.to_batches(), deletion.after.als, threads)
        progress(drawing_line(deletion))
        sample = draw_sample(deletion)
        if held_out is not None:
            for side in SIDES:
                ids = held_out[f"{side}_id"]
                known = [
                    places_of(ids, rows) >= 0 for rows in (before[side].ids, encoded.ids[side])
                ]
                held_out = held_out.filter(pa.array(known[0] & known[1]))
        return cls(deletion, before, unlearned, encoded, sample, held_out, threads)

    def direct_step(self) -> Model:
        return direct_step(self.encoded, self.deletion, self.before, self.threads)

    @contextmanager
    def fitted(self, als: AlsSettings, warm: bool) -> Iterator[tuple[Model, TrainingSummary]]:
        started, encoded = time.perf_counter(), self.encoded
        given = None
        if warm:
            given = {side: (rows.ids, rows.factors) for side, rows in self.before.items()}
        start = training.starting_factors(encoded, als, encoded.anchor, given)
        factors, reports, converged = training.sweep(encoded, als, start, self.threads)
        fitted = training.finished(
            encoded, als, factors, reports, converged, started, 0.0, self.threads
        )
        yield (
            {side: Vectors(fitted.ids[side], fitted.factors[side]).by_id() for side in SIDES},
            fitted.summary,
        )

    def measure(self, model: Model) -> Measured:
        als = self.deletion.after.als
        figures = {"objective": objective_of(self.encoded, model, als, self.threads)}
        if self.held_out is not None:
            found = held_out_metrics(
                model["user"], model["item"], self.held_out, self._seen, K, None, self.threads
            )
            figures |= {name: found[name] for name in ("rmse", f"ndcg_at_{K}")}
        return Measured(figures, score_sample(self.sample, model))

    def _seen(self, users: Vectors) -> Iterator[pa.Table]:
        """The retained ratings of some users."""
        retained = self.deletion.retained
        yield retained.select(PAIR).filter(pc.is_in(retained["user_id"], users.ids))


def aligned(
    encoded: Encoded, model: Model, side: str
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """A model's factors of the rows that have retained ratings, float32 (n, rank), zeros where it
    has none; and which rows it has."""
    rows = model[side].rows_of(encoded.ids[side])
    known = rows >= 0
    return np.where(known[:, None], model[side].factors[rows], np.float32(0)), known


def objective_of(encoded: Encoded, model: Model, als: AlsSettings, threads: int) -> float:
    """The objective that training minimises, for any factors on the retained ratings.

    Explicit (Zhou et al. 2008, equation 4): `sum (r - x.y)^2 + lambda (sum n_u |x_u|^2 + sum n_i
    |y_i|^2)` over the retained ratings. Implicit (Hu, Koren and Volinsky 2008, equation 3, lambda
    scaled by counts as in MLlib): over all pairs of a retained user and a retained item, those
    unrated with confidence 1 and preference 0, those rated with confidence `1 + alpha |r|`.
    A missing row counts as zeros; rows without a retained rating do not count.
    """
    solver, block = solver_of(als, threads), encoded.blocks["user"]
    factors = {side: aligned(encoded, model, side)[0] for side in SIDES}
    items = scatter(encoded.blocks["item"].slots, factors["item"], encoded.n_slots["item"])
    place = np.zeros(encoded.n_slots["user"], np.int32)
    place[block.slots] = np.arange(block.n_rows, dtype=np.int32)

    def error(piece: RatingBlock) -> float:
        x = factors["user"][place[piece.entry_rows()]]
        s = np.einsum("ij,ij->i", x, items[piece.others]).astype(np.float64)
        c, d = solver.objective.confidences(piece.values.astype(np.float64))
        return float(((d - s) ** 2).sum() if c is None else (c * s * s - 2 * d * s + d).sum())

    total = math.fsum(shared_out(error, list(block.pieces(PIECE_RATINGS)), threads))
    total += sum(solver.penalty(encoded.blocks[side], factors[side]) for side in SIDES)
    if als.implicit_prefs:  # the sum of (x.y)^2 over all pairs is <X'X, Y'Y>
        total += float(np.sum(gram(factors["user"]) * gram(factors["item"])))
    return total


def direct_step(encoded: Encoded, deletion: Deletion, before: Model, threads: int) -> Model:
    """See `audit.comparison.Contestants.direct_step`."""
    als = deletion.after.als
    solver = solver_of(als, threads)
    factors, known = {}, {}
    for side in SIDES:
        factors[side], known[side] = aligned(encoded, before, side)
    for side in SIDES:
        other, block = other_side(side), encoded.blocks[side]
        gone = deletion.deleted[f"{side}_id"].combine_chunks().unique()
        lost = pc.is_in(encoded.ids[side], gone).to_numpy(zero_copy_only=False)
        rows = block.rows(lost & known[side])
        exists = np.zeros(encoded.n_slots[other], np.bool_)
        exists[encoded.blocks[other].slots] = known[other]
        usable = exists[rows.others]
        rated = RatingBlock.from_entries(
            rows.entry_rows()[usable], rows.others[usable], rows.values[usable]
        )
        if rated.n_rows:
            seen = training.seen_by(solver, encoded, other, factors[other])
            solved = solver.solve(rated, seen, None).factors
            factors[side][np.searchsorted(block.slots, rated.slots)] = solved
    return {
        side: Vectors(
            encoded.ids[side].filter(pa.array(known[side])), factors[side][known[side]]
        ).by_id()
        for side in SIDES
    }
