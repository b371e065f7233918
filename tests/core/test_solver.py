"""Messages of factor rows: cut for the way, and joined again."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from unlearn_spark.core import solver
from unlearn_spark.core.objective import Objective
from unlearn_spark.core.solver import OtherSide, Solver, cut_stack, joined_stack

IMPLICIT = Solver(Objective(0.1, implicit_prefs=True, alpha=1.0), rank=3, dtype="float32")


def messages_of(part, slots, factors, scalar):
    return list(IMPLICIT.factor_rows(part, slots, factors, scalar))


@given(st.integers(0, 40), st.integers(1, 3), st.integers(1, 500), st.randoms())
def test_a_cut_stack_is_joined_in_any_order(n, height, most_bytes, random):
    before, solver.MESSAGE_BYTES = solver.MESSAGE_BYTES, most_bytes
    try:
        slots = np.arange(n, dtype=np.int32) * 3 + 1
        stack = np.random.default_rng(n).normal(size=(height, n, 3)).astype(np.float32)
        rows = [
            {"slots": own.tobytes(), "factors": piece.tobytes()}
            for own, piece in cut_stack(slots, stack)
        ]
    finally:
        solver.MESSAGE_BYTES = before
    if n:
        assert max(len(row["factors"]) for row in rows) <= max(most_bytes, 4 * 3 * height)
        random.shuffle(rows)
        np.testing.assert_array_equal(joined_stack(rows, 3), stack)


def test_cutting_does_not_change_what_the_other_side_sees(monkeypatch):
    random = np.random.default_rng(5)
    slots = {part: np.arange(part, 40, 2, dtype=np.int32) for part in (0, 1)}
    factors = {part: random.normal(size=(20, 3)).astype(np.float32) for part in slots}

    def seen():
        sent = [row for part in slots for row in messages_of(part, slots[part], factors[part], 2.5)]
        return len(sent), OtherSide.from_messages(sent[::-1], 3, 40)

    whole, expected = seen()
    monkeypatch.setattr(solver, "MESSAGE_BYTES", 100)
    cut, found = seen()
    assert whole == 2
    assert cut > 4
    np.testing.assert_array_equal(found.dense, expected.dense)
    np.testing.assert_allclose(found.gram, expected.gram, rtol=1e-12)
    assert found.penalty == expected.penalty == 5.0
