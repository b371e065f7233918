"""The kernel against a dense float64 textbook solution, for every engine.

Proved here: the objective itself (explicit, implicit, nonnegative), what happens at the edges (no
rating, one rating, fewer and more ratings than the rank, singular systems, extreme magnitudes,
duplicates), what is reported about warm rows, and that sliced rows equal unsliced ones.
"""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import nnls

from unlearn_spark.core import kernel
from unlearn_spark.core.kernel import row_residuals, solve_rows
from unlearn_spark.core.objective import Objective, relative_residual
from unlearn_spark.errors import SettingsError

ENGINES = ["numpy", "numba"]
DTYPES = [np.float32, np.float64]


class Case:
    """Ratings of some rows, a side to hold fixed and warm rows, from one seed."""

    def __init__(
        self, counts, rank, seed=0, m=60, rating_scale=1.0, factor_scale=1.0, signed=False
    ):
        rng = np.random.default_rng(seed)
        self.rank = rank
        self.indptr = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        nnz = int(self.indptr[-1])
        self.indices = rng.integers(0, m, nnz).astype(np.int32)
        levels = np.arange(-3, 6) if signed else np.arange(1, 6)
        self.values = (rng.choice(levels, nnz) * rating_scale).astype(np.float32)
        self.other = (rng.standard_normal((m, rank)) * factor_scale).astype(np.float32)
        self.warm = rng.standard_normal((len(counts), rank)).astype(np.float32)
        wide = self.other.astype(np.float64)
        self.gram = wide.T @ wide

    def solve(self, objective, **options):
        options = {"gram": self.gram if objective.implicit_prefs else None, **options}
        return solve_rows(self.indptr, self.indices, self.values, self.other, objective, **options)

    def residuals(self, objective, factors, **options):
        options = {"gram": self.gram if objective.implicit_prefs else None, **options}
        return row_residuals(
            self.indptr, self.indices, self.values, self.other, factors, objective, **options
        )

    def system(self, objective, row):
        """A and b, rating by rating, from the definition."""
        A = np.zeros((self.rank, self.rank))
        b = np.zeros(self.rank)
        counted = 0
        if objective.implicit_prefs:
            A += self.gram
        for e in range(self.indptr[row], self.indptr[row + 1]):
            y, r = self.other[self.indices[e]].astype(np.float64), float(self.values[e])
            if objective.implicit_prefs:
                c = objective.alpha * abs(r)
                A += c * np.outer(y, y)
                if r > 0:
                    b += (1 + c) * y
                    counted += 1
            else:
                A += np.outer(y, y)
                b += r * y
                counted += 1
        return A + objective.reg_param * counted * np.eye(self.rank), b

    def dense(self, objective):
        """Minimum-norm solutions of all rows."""
        solutions = []
        for row in range(len(self.indptr) - 1):
            A, b = self.system(objective, row)
            solutions.append(np.linalg.lstsq(A, b, rcond=1e-11)[0] if b.any() else 0 * b)
        return np.array(solutions)


def assert_rows_close(found, expected, tolerance):
    """Each row within `tolerance` of its own size."""
    assert np.isfinite(found).all()
    error = np.linalg.norm(found - expected, axis=1)
    size = np.linalg.norm(expected, axis=1)
    worst = int(np.argmax(error - tolerance * size))
    assert (error <= tolerance * size).all(), (worst, error[worst], size[worst])


COUNTS = st.lists(st.integers(0, 40), min_size=1, max_size=40)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=25, deadline=None)
@given(
    counts=COUNTS,
    rank=st.integers(1, 21),
    seed=st.integers(0, 2**31),
    reg_param=st.sampled_from([0.01, 0.1, 3.0]),
    implicit=st.booleans(),
)
def test_solutions_are_the_textbook_ones(engine, dtype, counts, rank, seed, reg_param, implicit):
    case = Case(counts, rank, seed, signed=implicit)
    objective = Objective(reg_param, implicit, alpha=2.0)
    found = case.solve(objective, engine=engine, dtype=dtype)
    assert found.factors.dtype == np.float32
    tolerance = 2e-3 if dtype == np.float32 else 5e-7
    assert_rows_close(found.factors, case.dense(objective), tolerance)
    assert found.quadratic == 0.0
    assert not found.gradient_norm.any()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("implicit", [False, True])
@pytest.mark.parametrize("rank", [1, 3, 8, 16, 17, 33, 64, 70])
def test_every_count_around_the_rank(engine, dtype, implicit, rank):
    near = [0, 1, 2, 3, 4, 5, 15, 16, 17, rank - 1, rank, rank + 1, 2 * rank, 9 * rank]
    case = Case(near * 2, rank, m=400, signed=implicit, factor_scale=0.3)
    objective = Objective(0.05, implicit, alpha=3.0)
    found = case.solve(objective, engine=engine, dtype=dtype, warm=case.warm)
    expected = case.dense(objective)
    assert_rows_close(found.factors, expected, 1e-3 if dtype == np.float32 else 5e-7)
    assert not found.factors[np.diff(case.indptr) == 0].any()
    gradient, b = case.residuals(objective, case.warm)
    np.testing.assert_allclose(found.gradient_norm, gradient, rtol=2e-5, atol=1e-5)
    np.testing.assert_allclose(found.b_norm, b, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "objective",
    [
        Objective(0.05),
        Objective(0.05, True, 4.0),
        Objective(0.0),
        Objective(0.05, nonnegative=True),
    ],
)
def test_report_on_warm_rows_is_the_dense_one(engine, dtype, objective):
    case = Case([0, 1, 5, 12, 13, 40, 200], 12, 3, signed=objective.implicit_prefs)
    if objective.nonnegative:
        case.warm = np.maximum(case.warm, 0)
    found = case.solve(objective, engine=engine, dtype=dtype, warm=case.warm)
    quadratic, gradients, b_norms = 0.0, [], []
    for row, w in enumerate(case.warm.astype(np.float64)):
        A, b = case.system(objective, row)
        quadratic += w @ A @ w - 2 * w @ b
        g = A @ w - b
        if objective.nonnegative:
            g = np.where(w > 0, g, np.minimum(g, 0))
        gradients.append(np.linalg.norm(g))
        b_norms.append(np.linalg.norm(b))
    np.testing.assert_allclose(found.gradient_norm, gradients, rtol=1e-5)
    np.testing.assert_allclose(found.b_norm, b_norms, rtol=1e-6)
    assert found.quadratic == pytest.approx(quadratic, rel=1e-6)
    gradient, b = case.residuals(objective, case.warm)
    np.testing.assert_allclose(gradient, gradients, rtol=1e-12)
    np.testing.assert_allclose(b, b_norms, rtol=1e-12)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("implicit", [False, True])
def test_small_gradients_survive_cancellation(engine, implicit):
    """Near the solution A w and b cancel; a residual of 1e-4 must still be right to 2 %."""
    case = Case([5, 30, 150, 151, 152, 900, 2500] * 3, 32, 4, m=500, factor_scale=0.3)
    objective = Objective(0.05, implicit, alpha=2.0)
    exact = case.solve(objective, engine="numpy", dtype=np.float64).factors
    rng = np.random.default_rng(0)
    noise = rng.standard_normal(exact.shape).astype(np.float32)
    warm = exact + noise * np.linalg.norm(exact, axis=1)[:, None] * np.float32(1e-5)
    gradient, b = case.residuals(objective, warm)
    scale = 1e-4 / relative_residual(gradient, b)
    warm = exact + (warm - exact) * scale[:, None].astype(np.float32)
    gradient, b = case.residuals(objective, warm)
    assert np.all(np.abs(relative_residual(gradient, b) / 1e-4 - 1) < 0.1)
    found = case.solve(objective, engine=engine, warm=warm)
    np.testing.assert_allclose(found.gradient_norm, gradient, rtol=0.02)
    solved, b = case.residuals(objective, found.factors)
    assert relative_residual(solved, b).max() < 1e-5


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("implicit", [False, True])
@pytest.mark.parametrize(
    ("rating_scale", "factor_scale"),
    [(1e-30, 1.0), (1e30, 1.0), (1.0, 1e-20), (1.0, 1e20), (1e-20, 1e-20), (1e15, 1e15)],
)
def test_extreme_magnitudes(engine, implicit, rating_scale, factor_scale):
    """Products beyond the range of float32 are taken in float64."""
    case = Case([0, 1, 3, 8, 9, 50], 8, 5, rating_scale=rating_scale, factor_scale=factor_scale)
    objective = Objective(0.1 * factor_scale**2, implicit, alpha=1.0)
    found = case.solve(objective, engine=engine, warm=case.warm)
    expected = np.clip(case.dense(objective), -3.4e38, 3.4e38)
    keep = np.abs(expected).max(axis=1) < 1e37  # beyond lies what float32 cannot hold
    if not implicit:  # confidences of 1e15 leave no digits to compare
        assert_rows_close(found.factors[keep], expected[keep], 1e-4)
    for row in np.flatnonzero(keep):  # but the error must stay a rounding error
        A, b = case.system(objective, row)
        x = found.factors[row].astype(np.float64)
        rounding = np.linalg.norm(A) * np.linalg.norm(x) + np.linalg.norm(b)
        assert np.linalg.norm(A @ x - b) <= 1e-6 * rounding
    assert np.isfinite(found.factors).all()
    gradient, _ = case.residuals(objective, case.warm)
    np.testing.assert_allclose(found.gradient_norm, gradient, rtol=1e-4)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_regularisation_gives_the_minimum_norm(engine, dtype):
    case = Case([1, 2, 5, 9, 10, 11, 60], 10, 6)
    case.indices[case.indptr[3] : case.indptr[4]] = 7  # nine ratings of one item
    found = case.solve(Objective(0.0), engine=engine, dtype=dtype)
    expected = case.dense(Objective(0.0))
    assert_rows_close(found.factors, expected, 2e-3)
    zeros = Case([3, 20], 10, 6, factor_scale=0.0)
    assert not zeros.solve(Objective(0.0), engine=engine, dtype=dtype).factors.any()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("reg_param", [1e-9, 1e-7, 1e-5])
def test_feeble_regularisation(engine, reg_param):
    """Close to singular in float32; the answer must still solve its equations."""
    case = Case([1, 4, 15, 16, 17, 40, 200], 16, 9)
    case.indices[case.indptr[6] :] %= 4  # 200 ratings of four items
    found = case.solve(Objective(reg_param), engine=engine)
    residual = relative_residual(*case.residuals(Objective(reg_param), found.factors))
    assert residual.max() < 1e-5


@pytest.mark.parametrize("engine", ENGINES)
def test_rows_without_a_positive_rating(engine):
    case = Case([4, 4, 4, 30], 8, 7)
    case.values[:4] = 0
    case.values[4:8] = -2
    for implicit_alpha in (0.0, 1.0):
        objective = Objective(0.1, True, implicit_alpha)
        found = case.solve(objective, engine=engine, warm=case.warm)
        assert not found.factors[:2].any()
        assert found.b_norm[:2].tolist() == [0, 0]
        assert (found.gradient_norm[:2] > 0).all()
        assert_rows_close(found.factors, case.dense(objective), 1e-4)


@pytest.mark.parametrize("engine", ENGINES)
def test_equal_ratings_and_duplicates(engine):
    case = Case([6, 6, 30], 8, 8)
    case.values[:] = 3
    case.indices[:6] = 11
    case.indices[6:12] = [1, 1, 2, 2, 2, 9]
    for objective in (Objective(0.1), Objective(0.1, True, 2.0)):
        found = case.solve(objective, engine=engine)
        assert_rows_close(found.factors, case.dense(objective), 1e-4)
    # Six ratings of one item in a row: x = 3 y / (|y|^2 + lambda).
    y = case.other[11].astype(np.float64)
    closed_form = 3 * y / (y @ y + 0.1)
    np.testing.assert_allclose(
        case.solve(Objective(0.1), engine=engine).factors[0], closed_form, rtol=1e-4
    )


@pytest.mark.parametrize("engine", ENGINES)
@settings(max_examples=30, deadline=None)
@given(
    counts=st.lists(st.integers(0, 40), min_size=1, max_size=6),
    rank=st.integers(1, 20),
    seed=st.integers(0, 2**31),
    reg_param=st.sampled_from([0.0, 0.05, 1.0]),
)
def test_nonnegative_rows_match_lawson_hanson(engine, counts, rank, seed, reg_param):
    case = Case(counts, rank, seed)
    objective = Objective(reg_param, nonnegative=True)
    found = case.solve(objective, engine=engine, warm=np.abs(case.warm))
    assert (found.factors >= 0).all()
    for row, n in enumerate(counts):
        # Ridge regression as plain least squares: sqrt(lambda n) I under the factors.
        at = slice(case.indptr[row], case.indptr[row + 1])
        M = np.vstack([case.other[case.indices[at]], np.sqrt(reg_param * n) * np.eye(rank)])
        r = np.concatenate([case.values[at], np.zeros(rank)])
        expected, _ = nnls(M.astype(np.float64), r)
        A, b = case.system(objective, row)
        x = found.factors[row].astype(np.float64)
        gap = (x @ A @ x - 2 * x @ b) - (expected @ A @ expected - 2 * expected @ b)
        assert abs(gap) <= 1e-5 * max(float(r @ r), 1e-30)
        if reg_param:
            np.testing.assert_allclose(x, expected, atol=1e-5 * np.abs(expected).max(initial=1))
    gradient, b = case.residuals(objective, found.factors)
    assert relative_residual(gradient, b).max() < 2e-5


@pytest.mark.parametrize("engine", ENGINES)
def test_nonnegative_implicit_rows_satisfy_the_optimality_conditions(engine):
    case = Case([0, 2, 30, 100] * 5, 16, 10, signed=True)
    objective = Objective(0.1, True, 2.0, nonnegative=True)
    found = case.solve(objective, engine=engine)
    some_at_bound = (found.factors == 0).any(axis=1) & (found.factors > 0).any(axis=1)
    assert some_at_bound.sum() >= 10
    for row, x in enumerate(found.factors.astype(np.float64)):
        A, b = case.system(objective, row)
        g = A @ x - b
        noise = 1e-5 * np.linalg.norm(b)
        assert (np.abs(g[x > 0]) <= noise).all()
        assert (g[x == 0] >= -noise).all()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("implicit", [False, True])
def test_inactive_rows_are_left_alone(engine, implicit):
    case = Case([3, 50, 0, 7, 20, 90], 16, 11)
    objective = Objective(0.1, implicit)
    active = np.array([True, False, True, False, True, True])
    whole = case.solve(objective, engine=engine, warm=case.warm)
    some = case.solve(objective, engine=engine, warm=case.warm, active=active)
    np.testing.assert_array_equal(some.factors[~active], case.warm[~active])
    np.testing.assert_allclose(some.factors[active], whole.factors[active], rtol=1e-4, atol=1e-6)
    assert not some.gradient_norm[~active].any()
    assert not some.b_norm[~active].any()
    np.testing.assert_allclose(some.gradient_norm[active], whole.gradient_norm[active], rtol=1e-6)
    cold = case.solve(objective, engine=engine, active=active)
    assert not cold.factors[~active].any()
    nobody = case.solve(objective, engine=engine, active=np.zeros(6, bool), warm=case.warm)
    np.testing.assert_array_equal(nobody.factors, case.warm)
    assert nobody.quadratic == 0


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("implicit", [False, True])
def test_a_row_longer_than_a_slice_equals_its_unsliced_self(engine, implicit, monkeypatch):
    case = Case([3, 5000, 0, 40], 24, 12, m=900, signed=implicit)
    objective = Objective(0.1, implicit, 2.0)
    plain = case.solve(objective, engine=engine, warm=case.warm, dtype=np.float64)
    gradient, b = case.residuals(objective, case.warm, engine=engine)
    monkeypatch.setattr(kernel, "SCRATCH_BYTES", 40_000)
    sliced = case.solve(objective, engine=engine, warm=case.warm, dtype=np.float64)
    np.testing.assert_allclose(sliced.factors, plain.factors, rtol=1e-6)
    np.testing.assert_allclose(sliced.gradient_norm, plain.gradient_norm, rtol=1e-9)
    assert sliced.quadratic == pytest.approx(plain.quadratic, rel=1e-9)
    again = case.residuals(objective, case.warm, engine=engine)
    np.testing.assert_allclose(again[0], gradient, rtol=1e-12)
    np.testing.assert_allclose(again[1], b, rtol=1e-12)
    np.testing.assert_allclose(gradient, plain.gradient_norm, rtol=1e-9)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("nonnegative", [False, True])
def test_memory_is_bounded_for_a_very_long_row(engine, nonnegative):
    case = Case([1_000_000, 2], 32, 13)
    objective = Objective(0.1, nonnegative=nonnegative)
    warm = np.abs(case.warm)
    case.solve(objective, engine=engine, warm=warm, active=np.array([False, True]))  # compiles
    case.residuals(objective, np.zeros_like(warm), engine=engine)
    tracemalloc.start()
    found = case.solve(objective, engine=engine, warm=warm)
    case.residuals(objective, found.factors, engine=engine)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 << 20  # gathered at once it would be 128 MB, 256 MB in float64
    assert relative_residual(*case.residuals(objective, found.factors)).max() < 2e-6


@pytest.mark.parametrize("engine", ENGINES)
@settings(max_examples=30, deadline=None)
@given(counts=COUNTS, rank=st.integers(1, 9), seed=st.integers(0, 2**31), implicit=st.booleans())
def test_residuals_are_the_dense_ones_however_they_are_chunked(
    engine, counts, rank, seed, implicit
):
    case = Case(counts, rank, seed, signed=implicit)
    objective = Objective(0.1, implicit, 2.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "SCRATCH_BYTES", 16 * rank * (1 + seed % 50))
        gradient, b_norm = case.residuals(objective, case.warm, engine=engine)
    for row, w in enumerate(case.warm.astype(np.float64)):
        A, b = case.system(objective, row)
        assert gradient[row] == pytest.approx(np.linalg.norm(A @ w - b), rel=1e-10, abs=1e-12)
        assert b_norm[row] == pytest.approx(np.linalg.norm(b), rel=1e-12)


def test_engines_agree():
    case = Case([0, 1, 2, 30, 31, 32, 33, 200] * 10, 32, 14, m=800)
    for objective in (Objective(0.05), Objective(0.05, True, 5.0)):
        a, b = (case.solve(objective, engine=engine, warm=case.warm) for engine in ENGINES)
        assert_rows_close(a.factors, b.factors, 2e-4)
        np.testing.assert_allclose(a.gradient_norm, b.gradient_norm, rtol=1e-5)
        assert a.quadratic == pytest.approx(b.quadratic, rel=1e-6)


def test_no_rows_at_all():
    case = Case([], 4)
    for engine in ENGINES:
        assert case.solve(Objective(0.1), engine=engine, warm=case.warm).factors.shape == (0, 4)
    assert case.residuals(Objective(0.1), case.warm)[0].shape == (0,)


def test_relative_residual_edges():
    ratio = relative_residual(np.array([0.0, 1.0, 1.0]), np.array([0.0, 0.0, 4.0]))
    assert ratio.tolist() == [0.0, np.inf, 0.25]
    floored = relative_residual(
        np.array([0.0, 1.0, 1.0, np.inf]), np.array([0.0, 0.0, 4.0, 0.0]), floor=2.0
    )
    assert floored.tolist() == [0.0, 0.5, 0.25, np.inf]


def test_settings_that_cannot_work_are_refused():
    case = Case([2], 4)
    with pytest.raises(SettingsError, match="float16"):
        case.solve(Objective(0.1), dtype=np.float16)
    with pytest.raises(SettingsError, match="Gram"):
        case.solve(Objective(0.1, True), gram=None)
