"""Runs the rounds of the frontier loop in this process: a page of the ledger for each side."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from unlearn_spark.core.blocks import (
    SIDES,
    RatingBlock,
    concatenate,
    distinct,
    other_side,
    places_among,
)
from unlearn_spark.core.bounds import drift, gram
from unlearn_spark.core.ledger_page import Page, Summary, Thresholds, changed_norms
from unlearn_spark.core.patch import PatchResult, PatchSide, solve_patch
from unlearn_spark.core.rounds import Work, looks_again
from unlearn_spark.core.solver import Solver
from unlearn_spark.embedded.changed_model import ChangedModel
from unlearn_spark.embedded.model import ChunkReader
from unlearn_spark.tables import factors
from unlearn_spark.tables.delta_rs import DeltaRsStore
from unlearn_spark.tables.models import ModelVersion


def open_ledger(
    store: DeltaRsStore,
    model: ModelVersion,
    changed: ChangedModel,
    solver: Solver,
    *,
    force: bool,
) -> dict[str, Page]:
    """By side: the published ledger as a page, with tonight's changes pushed into it.

    `force`: solve every row that gains or loses a rating, whatever its residual.
    """
    stored = _stored_entries(store, model)
    known = {side: (each.rows.slots, each.rows.factors) for side, each in changed.sides.items()}
    drifts = dict.fromkeys(SIDES, 0.0)
    if solver.objective.implicit_prefs:
        for side, each in changed.sides.items():
            factor_rows = each.rows.factors
            drifts[side] = drift(gram(factor_rows[each.is_new]) - gram(factor_rows[each.gone]))
    pages = {}
    for side, each in changed.sides.items():
        n_now = each.rows.n_ratings[places_among(each.touched, each.rows.slots)]
        touched = {"slots": each.touched, "n_ratings": n_now}
        page = Page.opened(stored[side], touched, each.changes)
        other = other_side(side)
        pushes = changed_norms(page, changed.version, known[side], known[other], solver.objective)
        pages[side] = page.pushed(*pushes, drifts[other], force)
    return pages


def _stored_entries(store: DeltaRsStore, model: ModelVersion) -> dict[str, dict[str, NDArray]]:
    """By side: the entries of the published ledger, as `Page.opened` takes them."""
    names = ("slot", "chunk", "n_ratings", "gradient_norm", "b_norm", "factor_norm")
    found = {}
    for side in SIDES:
        table = store.read(factors.LEDGER, model.ledger_version, names, f"side = '{side}'")
        arrays = {name: table[name].to_numpy() for name in names}
        arrays["slots"], arrays["chunks"] = arrays.pop("slot"), arrays.pop("chunk")
        found[side] = arrays
    return found


@dataclass
class Frontier:
    """The state of a night's rounds (`core.rounds.Frontier`).

    Attributes
    ----------
    pages
        By side: the ledger, whose bounds hold after every round.
    slots, factors
        By side: int32 (n,) and float32 (n, rank), present factors of all rows, also those that
        leave. `factors` are changed in place.
    grams
        By side: X'X over the rows that have ratings; empty in explicit mode.
    """

    solver: Solver
    thresholds: Thresholds
    chunks: ChunkReader
    pages: dict[str, Page]
    slots: Mapping[str, NDArray[np.int32]]
    factors: Mapping[str, NDArray[np.float32]]
    grams: dict[str, NDArray[np.float64]]
    work: Work
    rounds: int = 0

    def summary(self) -> dict[str, Summary]:
        """The state of each side."""
        return {side: self.thresholds.summary(page, side) for side, page in self.pages.items()}

    def resolve(
        self, patch: Mapping[str, str], state: Mapping[str, Summary], eager: Container[str]
    ) -> None:
        """Scan the rows of a patch, re-solve those over the mark, and push their moves into the
        rows outside."""
        self.rounds += 1
        ratings = sum(state[side].ratings[name] for side, name in patch.items())
        blocks = {
            side: self._ratings(side, patch[side]) if side in patch else concatenate([])
            for side in SIDES
        }
        sides = {side: self._patch_side(side, blocks, side in eager) for side in SIDES}
        results = solve_patch(
            self.solver,
            sides,
            self.thresholds.tau,
            self.thresholds.mark,
            self.grams,
            self.work.spare,
        )
        drifts = dict.fromkeys(SIDES, 0.0)
        if self.grams:
            for side, result in results.items():
                self.grams[side] = self.grams[side] + result.gram_change
                drifts[side] = drift(result.gram_change)
        for side, result in results.items():
            self._take(side, result, drifts[other_side(side)], looks_again(ratings))

    def _ratings(self, side: str, choice: str) -> RatingBlock:
        """All ratings of the rows of a side that a choice selects.

        Raises
        ------
        ValueError
            The packed ratings lack a row of the ledger, or the reverse.
        """
        page = self.pages[side]
        page = page.of(self.thresholds.chosen(page, side, choice))
        chunks = np.unique(page.chunks[page.chunks >= 0]).tolist()
        packed = self.chunks.read(side, chunks, self.thresholds.n_blocks[side], page.slots)
        block = page.changes.applied(packed)
        if not np.array_equal(page.slots, block.slots):
            raise ValueError("ledger rows and packed ratings differ; the rating blocks are damaged")
        return block

    def _patch_side(self, side: str, blocks: Mapping[str, RatingBlock], eager: bool) -> PatchSide:
        """A side of a patch, with the factors of its rows and of the other side's neighbours."""
        mine = blocks[side]
        neighbours = distinct(blocks[other_side(side)].others)
        known = np.union1d(mine.slots, neighbours).astype(np.int32)
        page = self.pages[side]
        entries = places_among(mine.slots, page.slots)
        return PatchSide(
            known,
            self.factors[side][places_among(known, self.slots[side])],
            mine,
            np.isinf(page.gradient_norm[entries]),
            self.thresholds.floors[side],
            eager,
        )

    def _take(self, side: str, result: PatchResult, drifted: float, again: bool) -> None:
        """Put one side's result into its page and its factors."""
        self.work.add(result.solved_ratings, result.solved_rows, result.scanned_ratings)
        norms = {
            "gradient_norm": result.gradient_norm,
            "b_norm": result.b_norm,
            "factor_norm": np.linalg.norm(result.factors.astype(np.float64), axis=1),
        }
        page = self.pages[side].pushed(
            result.push_slots, result.push_gradient, result.push_b, drifted
        )
        self.pages[side] = page.looked_at(result.slots, norms, result.solved, again)
        places = places_among(result.slots, self.slots[side])
        self.factors[side][places] = result.factors
