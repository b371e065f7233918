"""How close an unlearned model is to models trained without what was deleted.

The certificate says that every factor row solves the equations of the retained ratings. Those have
many solutions, so it leaves two questions open, which only retraining answers: is the model as
good, and does it still know what was deleted? Here models are trained from scratch on the retained
ratings with other seeds, and everything is measured on them too. Predictions are compared, never
factors, which are only defined up to a change of basis; the distance between two retrained models
is the yardstick of every distance.

Contestants beside the version *before* the deletion, the *unlearned* and the *retrained* ones:

=============  ==================================================================================
`rows_deleted`  ratings deleted, factors of *before* left as they are
`direct_step`   from *before*, each user row that lost a rating is solved anew, then each item row
`warm_K`        K sweeps of every row from *before*: Unlearn-ALS as published (Xu et al. 2023,
                arXiv 2302.06676)
=============  ==================================================================================

Figures of predictions are over samples of pairs that are chosen by hash, so the same tables give
the same pairs. Only the samples' scores reach the driver.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyspark.sql import Window
from pyspark.sql import functions as F

from unlearn_spark.core.blocks import SIDES, other_side
from unlearn_spark.core.kernel import solve_rows
from unlearn_spark.core.objective import Objective
from unlearn_spark.errors import InputError
from unlearn_spark.evaluation import membership
from unlearn_spark.evaluation.metrics import held_out_metrics
from unlearn_spark.ingestion import formats
from unlearn_spark.spark.arrow import list_column, matrix_of, vectors_of
from unlearn_spark.spark.frames import gram_of, materialise
from unlearn_spark.spark.scoring import predict_pairs
from unlearn_spark.spark.training.training import FitResult, fit_factors
from unlearn_spark.tables import models, ratings, requests

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame

    from unlearn_spark.config import AlsSettings, ExecutionSettings
    from unlearn_spark.tables.models import ModelVersion
    from unlearn_spark.tables.store import Store

SAMPLE_PAIRS = 20_000
"""Most pairs of each class."""

SAMPLE_SEED = 0

PANEL_ROWS = 1000
"""Users and items that random pairs are drawn from, and means and percentiles are taken over."""

REACH = 16
"""A never-seen item stands in for a deleted one at most so many places away in popularity."""

WARM_SWEEPS = (1, 3, 10)

K = 10
"""Places of held-out rankings."""

DELETED, UNSEEN, NEIGHBOURING, RANDOM = "deleted", "unseen", "neighbouring", "random"
COMPARED = (DELETED, NEIGHBOURING, RANDOM)
"""Classes of pairs on which distances are measured."""

_SCORE_PARTS = 16
_SCORE_SCHEMA = "kind string, user_id string, item_id string, matched boolean, scorable boolean, "
_SCORE_SCHEMA += ", ".join(f"{name} double" for name in membership.FEATURES)


# --- what was deleted -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Deletion:
    """Two versions, and the ratings that lie between them.

    Attributes
    ----------
    before, after
        The newest earlier version that was trained or imported, and the one to judge.
    known, retained
        user_id, item_id, rating: what `before` was fitted to, and what `after` must fit.
    deleted
        user_id, item_id: known to `before`, not retained.
    n_retained, n_deleted
        Their numbers of rows.
    """

    before: ModelVersion
    after: ModelVersion
    known: DataFrame
    retained: DataFrame
    deleted: DataFrame
    n_retained: int
    n_deleted: int


def find_deletion(store: Store, model: ModelVersion, checkpoint: str) -> Deletion:
    """What a version forgot since the version that was trained or imported last before it.

    Parameters
    ----------
    checkpoint
        `execution.checkpoint`: how the frames are kept.

    Raises
    ------
    InputError
        There is no such earlier version, nothing was removed since, the two were fitted with
        other settings, or one of them names no ratings.
    """
    before = version_before(store, model)
    for name in ("rank", "reg_param", "implicit_prefs", "alpha", "nonnegative"):
        old, new = getattr(before.als, name), getattr(model.als, name)
        if old != new:
            raise InputError(
                f"version {before.model_version} was fitted with als.{name} = {old}, version "
                f"{model.model_version} with {new}; only versions of equal settings compare"
            )
    pair = ["user_id", "item_id"]
    values = (*pair, "rating")
    retained = materialise(ratings.fitted(store, model).select(*values), checkpoint)
    known = ratings.fitted(store, before).select(*values)
    deleted = known.select(pair).join(retained.select(pair), pair, "left_anti")
    deleted = materialise(deleted, checkpoint)
    n_retained, n_deleted = retained.count(), deleted.count()
    if n_deleted == 0:
        raise InputError(
            f"version {model.model_version} removed nothing since version "
            f"{before.model_version}; nothing to compare"
        )
    return Deletion(before, model, known, retained, deleted, n_retained, n_deleted)


def version_before(store: Store, model: ModelVersion) -> ModelVersion:
    """The nearest ancestor that was trained or imported.

    Raises
    ------
    InputError
        There is none.
    """
    published = {version.model_version: version for version in models.versions(store)}
    parent = model.parent
    while parent is not None:
        if published[parent].kind in ("train", "import"):
            return published[parent]
        parent = published[parent].parent
    raise InputError(
        f"version {model.model_version} follows no trained version; nothing to compare it with"
    )


def held_out_ratings(store: Store, model: ModelVersion, path: str, form: str) -> DataFrame:
    """Usable held-out ratings of a file, ids in the model's types: user_id, item_id, rating.

    An id that cannot be the model's is null.

    Raises
    ------
    InputError
        The file is missing, empty or not of that format.
    """
    try:
        read = formats.read_ratings(store.spark, path, form)
    except InputError as error:
        raise InputError(str(error).replace("--input", "--held-out", 1)) from error
    kinds = [rows.schema["id"].dataType for rows in models.read_factors(store, model)]
    ids = [
        requests.typed_id(F.col(name).cast("string"), kind)
        for name, kind in zip(("user_id", "item_id"), kinds, strict=True)
    ]
    return read.frame.where("problem IS NULL").select(
        ids[0].alias("user_id"), ids[1].alias("item_id"), F.col("rating").cast("float")
    )


# --- samples --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """The pairs that predictions are compared on.

    Attributes
    ----------
    pairs
        kind, user_id, item_id, matched. `deleted`; `unseen`: for each matched deleted pair the same
        user with an item of like popularity that was never rated; `neighbouring`: retained ratings
        of users or items that lost one; `random`: any user with any item.
    panel
        By side: `id` of up to `PANEL_ROWS` users or items.
    """

    pairs: DataFrame
    panel: Mapping[str, DataFrame]


def draw_sample(deletion: Deletion, checkpoint: str, size: int = SAMPLE_PAIRS) -> Sample:
    """Up to `size` pairs of each class, those with the smallest hashes."""
    retained, deleted = deletion.retained, deletion.deleted
    panel = {
        side: _by_hash(retained.select(F.col(f"{side}_id").alias("id")).distinct(), PANEL_ROWS)
        for side in SIDES
    }
    panel = {side: materialise(rows, checkpoint) for side, rows in panel.items()}
    members = materialise(_by_hash(deleted, size), checkpoint)
    matches = materialise(_matches(deletion, members), checkpoint)
    neighbours = retained.select("user_id", "item_id")
    for side in SIDES:
        lost = deleted.select(f"{side}_id").distinct().withColumn(f"{side}_lost", F.lit(True))
        neighbours = neighbours.join(lost, f"{side}_id", "left")
    neighbours = neighbours.where("user_lost OR item_lost").select("user_id", "item_id")
    anything = (
        panel["user"]
        .withColumnRenamed("id", "user_id")
        .crossJoin(panel["item"].withColumnRenamed("id", "item_id"))
    )
    found = members.join(matches, ["user_id", "item_id"], "left")
    classes = {
        DELETED: found.select("user_id", "item_id", F.col("match").isNotNull().alias("matched")),
        UNSEEN: matches.select("user_id", F.col("match").alias("item_id"), F.lit(True)),
        NEIGHBOURING: _by_hash(neighbours, size).select("user_id", "item_id", F.lit(False)),
        RANDOM: _by_hash(anything, size).select("user_id", "item_id", F.lit(False)),
    }
    pairs: DataFrame | None = None
    for kind, rows in classes.items():
        rows = rows.toDF("user_id", "item_id", "matched").withColumn("kind", F.lit(kind))
        pairs = rows if pairs is None else pairs.unionByName(rows)
    assert pairs is not None
    return Sample(materialise(pairs, checkpoint), panel)


def _by_hash(rows: DataFrame, n: int) -> DataFrame:
    return rows.orderBy(F.xxhash64(*rows.columns, F.lit(SAMPLE_SEED)), *rows.columns).limit(n)


def _matches(deletion: Deletion, members: DataFrame) -> DataFrame:
    """user_id, item_id of members and `match`: the never-rated item nearest in popularity.

    The same item may match several members, so that popularities agree also where somebody rated
    most of what is popular. A member without a free item within `REACH` places has no row.
    """
    counted = deletion.known.groupBy("item_id").agg(F.count(F.lit(1)).alias("n"))
    order = [F.desc("n"), F.xxhash64("item_id", F.lit(SAMPLE_SEED)), F.col("item_id")]
    # One partition of all items: ids and counts alone, and there are far fewer than ratings.
    place = F.row_number().over(Window.partitionBy(F.lit(0)).orderBy(*order))
    places = counted.select("item_id", place.alias("place"))
    steps = [step for distance in range(1, REACH + 1) for step in (-distance, distance)]
    around = (
        members.join(places, "item_id")
        .select("user_id", "item_id", "place", F.explode(F.array(*map(F.lit, steps))).alias("step"))
        .withColumn("place", F.col("place") + F.col("step"))
        .join(places.withColumnRenamed("item_id", "match"), "place")
    )
    pair = ["user_id", "item_id"]
    rated = deletion.known.select(pair).unionByName(deletion.retained.select(pair))
    rated = rated.join(members.select("user_id").distinct(), "user_id", "left_semi")
    rated = rated.select("user_id", F.col("item_id").alias("match"))
    free = around.join(rated, ["user_id", "match"], "left_anti")
    nearness = F.struct(F.abs("step"), F.xxhash64("user_id", "match"), F.col("match"))
    return free.groupBy(pair).agg(F.min_by("match", nearness).alias("match"))


@dataclass(frozen=True)
class Scores:
    """What one model says of the sample, rows in the same order for every model.

    Attributes
    ----------
    kind, matched, scorable : (n,)
        `scorable`: the model has a row for both the user and the item. Where it has not, its
        vectors count as zeros.
    features : float64 (n, 4)
        By `membership.FEATURES`; the first column is the score.
    """

    kind: NDArray[Any]
    matched: NDArray[np.bool_]
    scorable: NDArray[np.bool_]
    features: NDArray[np.float64]

    def of(self, kind: str) -> NDArray[np.float64]:
        """Scores of one class of pairs."""
        return self.features[self.kind == kind, 0]

    def attacks(self) -> dict[str, float | None]:
        """AUC of both attacks on deleted against never-seen entries; None where nothing matched."""
        members = self.features[(self.kind == DELETED) & self.matched]
        others = self.features[self.kind == UNSEEN]
        if not len(members):
            return {"score": None, "fitted": None}
        return {
            "score": membership.score_attack(members[:, 0], others[:, 0]),
            "fitted": membership.fitted_attack(members, others, seed=SAMPLE_SEED),
        }


def score_sample(sample: Sample, factors: Mapping[str, DataFrame], rank: int) -> Scores:
    """Score the sample with a model's factors (by side: id, factors array<float>)."""
    joined = sample.pairs
    for side in SIDES:
        rows = factors[side].select(
            F.col("id").alias(f"{side}_id"), F.col("factors").alias(f"{side}_vector")
        )
        joined = joined.join(rows, f"{side}_id", "left")
    joined = joined.select(
        F.pmod(F.xxhash64("user_id"), F.lit(_SCORE_PARTS)).cast("int").alias("key"),
        "kind",
        F.col("user_id").cast("string"),
        F.col("item_id").cast("string"),
        "matched",
        "user_vector",
        "item_vector",
    )
    keys = F.explode(F.sequence(F.lit(0), F.lit(_SCORE_PARTS - 1))).alias("key")
    panels = [
        sample.panel[side]
        .join(factors[side], "id")
        .select(keys, F.lit(side).alias("side"), "factors")
        for side in SIDES
    ]

    def score(pairs: pa.Table, panel: pa.Table) -> pa.Table:
        vectors, known = {}, {}
        for side in SIDES:
            column = pa.concat_arrays(pairs[f"{side}_vector"].chunks)
            vectors[side], known[side] = vectors_of(column, rank)
        sides = panel["side"].to_pylist()
        every = matrix_of(panel["factors"], rank) if sides else np.zeros((0, rank), np.float32)
        chosen = {side: every[[one == side for one in sides]] for side in SIDES}
        features = membership.attack_features(
            vectors["user"], vectors["item"], chosen["user"], chosen["item"]
        )
        return pa.table(
            {
                **{name: pairs[name] for name in ("kind", "user_id", "item_id", "matched")},
                "scorable": pa.array(known["user"] & known["item"]),
                **{name: features[:, i] for i, name in enumerate(membership.FEATURES)},
            }
        )

    def score_if_any(pairs: pa.Table, panel: pa.Table) -> pa.Table:
        if pairs.num_rows:
            return score(pairs, panel)
        kinds = {"matched": pa.bool_(), "scorable": pa.bool_()}
        kinds |= dict.fromkeys(membership.FEATURES, pa.float64())
        names = ("kind", "user_id", "item_id", "matched", "scorable", *membership.FEATURES)
        return pa.schema([(name, kinds.get(name, pa.string())) for name in names]).empty_table()

    scored = (
        joined.groupBy("key")
        .cogroup(panels[0].unionByName(panels[1]).groupBy("key"))
        .applyInArrow(score_if_any, _SCORE_SCHEMA)
    )
    table = scored.toArrow().sort_by(
        [(name, "ascending") for name in ("kind", "user_id", "item_id")]
    )
    return Scores(
        np.asarray(table["kind"].to_pylist()),
        table["matched"].to_numpy(),
        table["scorable"].to_numpy(),
        np.column_stack([table[name].to_numpy() for name in membership.FEATURES]),
    )


# --- objective ------------------------------------------------------------------------------------


def penalty_weights(retained: DataFrame, implicit: bool) -> dict[str, DataFrame]:
    """By side: id and `n`, how many of its ratings (implicit: positive ones) lambda counts."""
    counts = F.sum((F.col("rating") > 0).cast("int")) if implicit else F.count(F.lit(1))
    return {
        side: retained.groupBy(F.col(f"{side}_id").alias("id")).agg(counts.alias("n"))
        for side in SIDES
    }


def objective_of(
    retained: DataFrame,
    weights: Mapping[str, DataFrame],
    factors: Mapping[str, DataFrame],
    als: AlsSettings,
) -> float:
    """What training minimises, of any factors on the retained ratings.

    Explicit (Zhou et al. 2008, equation 4): `sum (r - x.y)^2 + lambda (sum n_u |x_u|^2 + sum n_i
    |y_i|^2)` over the retained ratings. Implicit (Hu, Koren and Volinsky 2008, equation 3, lambda
    scaled by counts as in MLlib): over all pairs of a retained user and a retained item, those
    unrated with confidence 1 and preference 0, those rated with confidence `1 + alpha |r|`.
    A missing row counts as zeros; rows without a retained rating do not count.

    Parameters
    ----------
    weights
        As from `penalty_weights`.
    factors
        By side: id, factors array<float>.
    """
    scored = predict_pairs(retained, factors["user"], factors["item"])
    s = F.nanvl(F.col("prediction").cast("double"), F.lit(0.0))
    r = F.col("rating").cast("double")
    if als.implicit_prefs:
        c = F.lit(als.alpha) * F.abs(r)
        d = F.when(r > 0, 1 + c).otherwise(F.lit(0.0))
        error = c * s * s - 2 * d * s + d
    else:
        error = (r - s) * (r - s)
    found = scored.agg(F.sum(error)).first()
    assert found is not None
    total = float(found[0])
    grams = []
    for side in SIDES:
        rows = factors[side].select("id", "factors").join(weights[side], "id")
        mine = rows.agg(F.sum(F.col("n") * _squared_norm("factors"))).first()
        assert mine is not None
        total += als.reg_param * float(mine[0] or 0.0)
        if als.implicit_prefs:
            grams.append(gram_of(rows, als.rank))
    if grams:  # the sum of (x.y)^2 over all pairs is <X'X, Y'Y>
        total += float(np.sum(grams[0] * grams[1]))
    return total


def _squared_norm(column: str) -> Column:
    return F.aggregate(
        column, F.lit(0.0), lambda total, value: total + value.cast("double") * value.cast("double")
    )


# --- contestants ----------------------------------------------------------------------------------


def direct_step(
    deletion: Deletion,
    before: Mapping[str, DataFrame],
    weights: Mapping[str, DataFrame],
    checkpoint: str,
) -> dict[str, DataFrame]:
    """Factors of `before` after one closed-form step on the rows that lost a rating.

    First each such user row is solved for the retained ratings and the items of `before`, then each
    such item row for the new user rows. Rows without a retained rating leave; ratings whose other
    row `before` does not have are not seen.

    Parameters
    ----------
    before
        Factors of that version, by side: id, factors array<float>.
    weights
        As from `penalty_weights`.

    Returns
    -------
    dict
        By side: id, factors array<float>.
    """
    als = deletion.after.als
    factors = {
        side: before[side].select("id", "factors").join(weights[side], "id", "left_semi")
        for side in SIDES
    }
    for side in SIDES:
        lost = deletion.deleted.select(F.col(f"{side}_id").alias("id")).distinct()
        lost = lost.join(factors[side].select("id"), "id", "left_semi")
        solved = _solved(deletion.retained, lost, side, factors[other_side(side)], als)
        kept = factors[side].join(solved.select("id", F.col("factors").alias("new")), "id", "left")
        kept = kept.select("id", F.coalesce("new", "factors").alias("factors"))
        factors[side] = materialise(kept, checkpoint)
    return factors


def _solved(
    retained: DataFrame, rows: DataFrame, side: str, others: DataFrame, als: AlsSettings
) -> DataFrame:
    """id, factors of the named rows, each solved for all its ratings; a task holds one row's."""
    rank, dtype = als.rank, als.dtype
    objective = Objective(als.reg_param, als.implicit_prefs, als.alpha, als.nonnegative)
    gram = gram_of(others, rank) if als.implicit_prefs else None
    other = others.withColumnRenamed("id", f"{other_side(side)}_id")
    rated = (
        retained.join(rows.withColumnRenamed("id", f"{side}_id"), f"{side}_id", "left_semi")
        .join(other, f"{other_side(side)}_id")
        .select(F.col(f"{side}_id").alias("id"), F.col("rating").cast("float"), "factors")
    )

    def solve(table: pa.Table) -> pa.Table:
        n = table.num_rows
        solution = solve_rows(
            np.array([0, n], np.int64),
            np.arange(n, dtype=np.int32),
            table["rating"].to_numpy(),
            np.ascontiguousarray(matrix_of(table["factors"], rank)),
            objective,
            gram=gram,
            dtype=dtype,
            engine="numpy",  # one row at a time: nothing to batch
        )
        return pa.table({"id": table["id"].slice(0, 1), "factors": list_column(solution.factors)})

    schema = f"id {rated.schema['id'].dataType.simpleString()}, factors array<float>"
    return rated.groupBy("id").applyInArrow(solve, schema)


# --- the comparison -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """One model's figures on the retained and held-out ratings, and its scores of the sample."""

    figures: dict[str, Any]
    scores: Scores


@dataclass(frozen=True)
class Comparison:
    """Everything that was measured.

    Attributes
    ----------
    figures
        As JSON has it: see `compare`.
    deleted_scores
        By contestant (`before`, `unlearned`, `retrained`): float64 scores of the sampled deleted
        entries, 0 where the model has no row; those of all retrained models in one array.
    """

    figures: dict[str, Any]
    deleted_scores: dict[str, NDArray[np.float64]]


def compare(
    store: Store,
    deletion: Deletion,
    execution: ExecutionSettings,
    *,
    seeds: int,
    held_out: DataFrame | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> Comparison:
    """Train, measure one model after the other, and put them side by side.

    Parameters
    ----------
    seeds
        Models to train from scratch, with `als.seed` + 1 and so on.
    held_out
        user_id, item_id, rating. Only those count whose user and item both `before` and the
        retained ratings have, so that all models are judged on the same.
    progress
        Called with a line before every contestant.

    Returns
    -------
    Comparison
        Its figures: `before` and `unlearned` (versions), `ratings`, `pairs` (sizes of the sample),
        `models` and `seed_to_seed`. Each of `models` has

        * `objective` on the retained ratings; `rmse`, `ndcg_at_10` of held-out ratings, if given;
        * `distance` by class of pairs: `rms` and `max` difference from the mean prediction of the
          retrained models, over the `pairs` that all of them and this model can score. That of a
          retrained model is from the mean of the others;
        * `deleted_score`: the `mean` of deleted entries, 0 where the model has no row, and
          `mean_scorable` over those that before, unlearned and retrained can all score;
        * `deleted_scorable`: how many deleted pairs of the sample it can score;
        * `auc` of the `score` and the `fitted` attack (see `evaluation.membership`), and by how
          much they exceed the retrained models' mean.

        `retrained` has these as `mean` and `spread` (standard deviation) over its `runs`.
        `seed_to_seed` is the mean rms difference of two retrained models by class of pairs. What
        cannot be told is None.

    Raises
    ------
    InputError
        No held-out rating has a user and item that the models know.
    UserError
        scikit-learn is not installed.
    """
    membership.require_sklearn()
    als, checkpoint = deletion.after.als, execution.checkpoint
    retained = deletion.retained
    before = dict(zip(SIDES, models.read_factors(store, deletion.before), strict=True))
    unlearned = dict(zip(SIDES, models.read_factors(store, deletion.after), strict=True))
    weights = {
        side: materialise(rows, checkpoint)
        for side, rows in penalty_weights(retained, als.implicit_prefs).items()
    }
    progress(f"drawing pairs from {deletion.n_deleted} deleted and {deletion.n_retained} ratings")
    sample = draw_sample(deletion, checkpoint)
    if held_out is not None:
        for side in SIDES:
            known = before[side].select("id").join(weights[side].select("id"), "id", "left_semi")
            known = known.withColumnRenamed("id", f"{side}_id")
            held_out = held_out.join(known, f"{side}_id", "left_semi")
        held_out = materialise(held_out, checkpoint)

    def measure(factors: Mapping[str, DataFrame]) -> Measured:
        figures = {"objective": objective_of(retained, weights, factors, als)}
        if held_out is not None:
            found = held_out_metrics(factors["user"], factors["item"], held_out, retained, k=K)
            figures |= {name: found[name] for name in ("rmse", f"ndcg_at_{K}")}
        return Measured(figures, score_sample(sample, factors, als.rank))

    def measure_fit(settings: AlsSettings, warm: bool) -> tuple[Measured, FitResult]:
        start = (before["user"], before["item"]) if warm else None
        fitted = fit_factors(retained, settings, execution, warm_start=start)
        try:
            return measure({"user": fitted.user_factors, "item": fitted.item_factors}), fitted
        finally:
            fitted.release()

    measured = {}
    progress(f"measuring version {deletion.before.model_version}, before the deletion")
    measured["before"] = measured["rows_deleted"] = measure(before)
    progress("one closed-form step on the rows that lost a rating")
    measured["direct_step"] = measure(direct_step(deletion, before, weights, checkpoint))
    for sweeps in WARM_SWEEPS:
        progress(f"{sweeps} warm sweeps of every row")
        plain = als.model_copy(update={"max_sweeps": sweeps, "tol": 1e-12, "memory": 0})
        measured[f"warm_{sweeps}"], _ = measure_fit(plain, warm=True)
    progress(f"measuring version {deletion.after.model_version}, unlearned")
    measured["unlearned"] = measure(unlearned)
    runs, trainings = [], []
    for seed in range(als.seed + 1, als.seed + seeds + 1):
        one, fitted = measure_fit(als.model_copy(update={"seed": seed}), warm=False)
        summary = fitted.summary
        reached = "" if summary.converged else "; als.tol was not reached"
        progress(f"retrained with seed {seed}: {summary.sweeps} sweeps{reached}")
        runs.append(one)
        trainings.append({"seed": seed, "sweeps": summary.sweeps, "converged": summary.converged})
    return side_by_side(deletion, measured, runs, trainings)


def side_by_side(
    deletion: Deletion,
    measured: Mapping[str, Measured],
    runs: Sequence[Measured],
    trainings: Sequence[Mapping[str, Any]],
) -> Comparison:
    """Every figure relative to the retrained models (`runs`); see `compare` for what comes out.

    `trainings` says how each of them went.
    """
    kinds = runs[0].scores.kind
    common = np.logical_and.reduce(
        [one.scores.scorable for one in (measured["before"], measured["unlearned"], *runs)]
    )
    retrained = [
        _figures(one, [*runs[:i], *runs[i + 1 :]], common) | dict(trainings[i])
        for i, one in enumerate(runs)
    ]
    shown = [
        {name: value for name, value in run.items() if name not in trainings[i]}
        for i, run in enumerate(retrained)
    ]
    mean, spread = _over(shown, np.mean), _over(shown, _spread)
    if len(runs) == 2:  # each is measured against the other: equal, which says nothing
        spread["distance"] = _over([spread["distance"]], lambda values: None)
    contestants = {name: _figures(one, runs, common) for name, one in measured.items()}
    for figures in contestants.values():
        for attack in ("score", "fitted"):
            mine, theirs = figures["auc"][attack], mean["auc"][attack]
            known = mine is not None and theirs is not None
            figures["auc"][f"{attack}_excess"] = mine - theirs if known else None
    return Comparison(
        {
            "before": deletion.before.model_version,
            "unlearned": deletion.after.model_version,
            "ratings": {"retained": deletion.n_retained, "deleted": deletion.n_deleted},
            "pairs": {
                **{kind: int((kinds == kind).sum()) for kind in (*COMPARED, UNSEEN)},
                "scorable_by_all": int(common[kinds == DELETED].sum()),
            },
            "models": {
                **contestants,
                "retrained": {"mean": mean, "spread": spread, "runs": retrained},
            },
            "seed_to_seed": {kind: seed_to_seed(runs, kind) for kind in COMPARED},
        },
        {
            "before": measured["before"].scores.of(DELETED),
            "unlearned": measured["unlearned"].scores.of(DELETED),
            "retrained": np.concatenate([one.scores.of(DELETED) for one in runs]),
        },
    )


def _figures(
    one: Measured, references: Sequence[Measured], common: NDArray[np.bool_]
) -> dict[str, Any]:
    scores = one.scores
    deleted = scores.kind == DELETED
    compared = scores.features[deleted & common, 0]
    return {
        **one.figures,
        "distance": {kind: distance(one, references, kind) for kind in COMPARED},
        "deleted_score": {
            "mean": float(scores.of(DELETED).mean()),
            "mean_scorable": float(compared.mean()) if len(compared) else None,
        },
        "deleted_scorable": int(scores.scorable[deleted].sum()),
        "auc": scores.attacks(),
    }


def distance(one: Measured, references: Sequence[Measured], kind: str) -> dict[str, Any]:
    """rms and largest difference of a model's scores from the mean of the references' scores.

    Over the pairs of one class that all of them can score; None where there is no such pair or no
    reference.
    """
    usable = (one.scores.kind == kind) & one.scores.scorable
    for other in references:
        usable &= other.scores.scorable
    n = int(usable.sum()) if references else 0
    if n == 0:
        return {"rms": None, "max": None, "pairs": 0}
    mean = np.mean([other.scores.features[usable, 0] for other in references], axis=0)
    difference = one.scores.features[usable, 0] - mean
    return {
        "rms": float(np.sqrt(np.mean(difference**2))),
        "max": float(np.abs(difference).max()),
        "pairs": n,
    }


def seed_to_seed(runs: Sequence[Measured], kind: str) -> float | None:
    """Mean rms difference between two of the runs; None where there are no two."""
    found = [distance(one, [other], kind)["rms"] for one, other in combinations(runs, 2)]
    found = [value for value in found if value is not None]
    return float(np.mean(found)) if found else None


def _over(runs: Sequence[Mapping[str, Any]], fold: Callable[[list[float]], Any]) -> dict[str, Any]:
    """The runs' figures folded one by one, in the same nested shape; None where one is None."""
    folded: dict[str, Any] = {}
    for name, first in runs[0].items():
        values = [run[name] for run in runs]
        if isinstance(first, Mapping):
            folded[name] = _over(values, fold)
        elif any(value is None for value in values):
            folded[name] = None
        else:
            found = fold(values)
            folded[name] = None if found is None else float(found)
    return folded


def _spread(values: list[float]) -> float | None:
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


# --- for a terminal -------------------------------------------------------------------------------


def tables_of(figures: Mapping[str, Any]) -> list[Any]:
    """The figures of `compare` as two `rich.table.Table`s, one contestant a line.

    The first has quality and distances, the second what is left of the deleted entries; there the
    AUCs have their excess over the retrained models' mean in brackets.
    """
    contestants = dict(figures["models"])
    retrained = contestants.pop("retrained")
    held_out = [name for name in ("rmse", f"ndcg_at_{K}") if name in retrained["mean"]]
    yardstick = ", ".join(f"{kind} {_short(figures['seed_to_seed'][kind])}" for kind in COMPARED)
    quality = _table(
        f"Version {figures['unlearned']} against {len(retrained['runs'])} retrained: "
        f"{figures['ratings']['deleted']} ratings deleted since version {figures['before']}",
        ["objective", *held_out, *(f"distance\n{kind}" for kind in COMPARED)],
        f"distance: rms difference of predictions from the retrained mean\n"
        f"between two retrained models: {yardstick}",
    )
    traces = _table(
        "What the models still say of deleted entries",
        ["mean score", "scorable", "AUC\nscore attack", "AUC\nfitted attack"],
        f"in brackets: excess over the retrained mean\n{figures['pairs'][DELETED]} deleted pairs, "
        f"{figures['pairs'][UNSEEN]} of them matched with never-rated ones",
    )

    def add(name: str, one: Mapping[str, Any], digits: int) -> None:
        distances = [one["distance"][kind]["rms"] for kind in COMPARED]
        quality.add_row(
            name,
            _short(one["objective"], max(digits, 2 * digits - 1)),
            *[_short(value, digits) for value in (*(one[key] for key in held_out), *distances)],
        )
        cells = [one["deleted_score"]["mean"], one["deleted_scorable"]]
        row = [_short(value, digits) for value in cells]
        for attack in ("score", "fitted"):
            excess = one["auc"].get(f"{attack}_excess")
            text = _short(one["auc"][attack], digits)
            row.append(text if excess is None else f"{text} ({excess:+.4f})")
        traces.add_row(name, *row)

    for name, one in contestants.items():
        if name == "unlearned":
            quality.add_section()
            traces.add_section()
        add(name, one, 4)
    add("retrained", retrained["mean"], 4)
    if len(retrained["runs"]) > 1:
        add("  spread", retrained["spread"], 2)
    return [quality, traces]


def _table(title: str, headers: Sequence[str], caption: str) -> Any:
    from rich.table import Table

    table = Table(title=title, caption=caption)
    table.add_column("model", no_wrap=True)
    for header in headers:
        table.add_column(header, justify="right", no_wrap=True)
    return table


def _short(value: float | None, digits: int = 4) -> str:
    if value is None or not math.isfinite(value):
        return "-"
    if float(value).is_integer() and abs(value) < 1e6:
        return f"{int(value)}"
    return f"{value:.{digits}g}"
