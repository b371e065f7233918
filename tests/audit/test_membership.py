"""Membership attacks: they find a leak that is there, and nothing where there is nothing."""

from __future__ import annotations

import numpy as np
import pytest

from unlearn_spark.audit.membership import attack_features, fitted_attack, score_attack
from unlearn_spark.errors import InputError

N = 2000


def classes(seed, leak):
    """Features of members and others from one distribution; `leak` is added to members' scores."""
    rng = np.random.default_rng(seed)
    members, others = rng.normal(size=(N, 4)), rng.normal(size=(N, 4))
    members[:, 0] += leak
    return members, others


def chance_error(n):
    """Four standard errors of an AUC of two like classes of n (Mann-Whitney)."""
    return 4 * np.sqrt((2 * n + 1) / (12 * n * n))


def test_the_score_attack_succeeds_on_a_leak_and_is_at_chance_without_one():
    members, others = classes(0, leak=2.0)
    # Of two normal scores that lie 2 apart the higher is the member's with probability
    # Phi(2 / sqrt 2) = 0.9214.
    assert score_attack(members[:, 0], others[:, 0]) == pytest.approx(0.9214, abs=0.02)
    assert score_attack(others[:, 0], members[:, 0]) == pytest.approx(1 - 0.9214, abs=0.02)
    members, others = classes(1, leak=0.0)
    assert abs(score_attack(members[:, 0], others[:, 0]) - 0.5) < chance_error(N)
    assert score_attack(np.zeros(3), np.zeros(5)) == 0.5


def test_the_fitted_attack_succeeds_on_a_leak_and_is_at_chance_without_one():
    assert fitted_attack(*classes(0, leak=2.0)) == pytest.approx(0.9214, abs=0.02)
    for seed in range(3):
        found = fitted_attack(*classes(seed, leak=0.0), seed=seed)
        # A fit that was judged on its own entries would always be above one half.
        assert abs(found - 0.5) < chance_error(N)


def test_the_fitted_attack_finds_a_leak_that_the_score_alone_hides():
    """Members lie above the mean of their users, whose means differ by far more than that."""
    rng = np.random.default_rng(2)
    means = rng.normal(scale=20, size=(2, N))
    members = np.zeros((N, 4))
    others = np.zeros((N, 4))
    for features, mean, lift in ((members, means[0], 2.0), (others, means[1], 0.0)):
        features[:, 0] = mean + lift + rng.normal(size=N)
        features[:, 1] = mean
    assert score_attack(members[:, 0], others[:, 0]) < 0.6
    assert fitted_attack(members, others) > 0.85


def test_the_fitted_attack_repeats_and_says_when_there_is_too_little():
    members, others = classes(3, leak=0.5)
    assert fitted_attack(members, others, seed=7) == fitted_attack(members, others, seed=7)
    assert fitted_attack(members[:1], others) is None
    assert fitted_attack(members, others[:1]) is None
    assert 0 <= fitted_attack(members[:2], others[:3]) <= 1


def test_unusable_features_are_refused():
    members, others = classes(4, leak=0.0)
    with pytest.raises(InputError, match=r"\(2000, 3\)"):
        fitted_attack(members[:, :3], others)
    members[5, 2] = np.nan
    with pytest.raises(InputError, match="not finite"):
        fitted_attack(members, others)
    with pytest.raises(InputError, match="empty"):
        score_attack([], [1.0])


def test_features_are_scores_means_and_percentiles():
    users = np.array([[1.0, 0.0], [3.0, 2.0]])
    items = np.array([[1.0, 1.0], [2.0, 0.0], [0.0, 4.0], [2.0, 0.0]])
    x = np.array([[1.0, 2.0], [0.0, 0.0]])
    y = np.array([[2.0, 0.0], [5.0, 5.0]])
    # The first user scores the items 3, 2, 8, 2 and its own 2: half of two equal ones are below.
    # The second has no row: everything ties.
    expected = [[2.0, 3.75, 4.0, 0.25], [0.0, 0.0, 15.0, 0.5]]
    np.testing.assert_array_equal(attack_features(x, y, users, items), expected)
    nobody = np.zeros((0, 2))
    expected = [[2.0, 0.0, 0.0, 0.5], [0.0, 0.0, 0.0, 0.5]]
    np.testing.assert_array_equal(attack_features(x, y, nobody, nobody), expected)
    assert attack_features(nobody, nobody, users, items).shape == (0, 4)


def test_percentiles_do_not_depend_on_how_many_rows_fit_at_a_time():
    rng = np.random.default_rng(5)
    items = rng.normal(size=(3000, 2))
    x, y = rng.normal(size=(2, 1500, 2))  # 1398 rows fit
    found = attack_features(x, y, items[:10], items)
    below = ((x[-5:] @ items.T) < found[-5:, :1]).mean(axis=1)
    np.testing.assert_allclose(found[-5:, 3], below, atol=1e-12)
