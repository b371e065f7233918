"""What nights take from a published version, also from one of before there were floors."""

import pytest

from unlearn_spark.config import UnlearnSettings
from unlearn_spark.tables.models import ModelVersion

SCANNED = {"tau": 2.5e-4, "max_residual": 3e-3, "evidence": "scan"}
FLOORS = {"user": 0.5, "item": 0.25}


@pytest.mark.parametrize(
    ("kind", "certificate", "floors", "reached"),
    [
        ("train", {**SCANNED, "floor": FLOORS, "reached": 2e-4}, FLOORS, 2e-4),
        ("rollback", {**SCANNED, "floor": FLOORS, "reached": 2e-4}, FLOORS, 2e-4),
        ("train", {**SCANNED, "floor": FLOORS, "reached": float("inf")}, FLOORS, 0.0),
        # Before there were floors:
        ("train", SCANNED, {"user": 0.0, "item": 0.0}, 3e-3),
        ("unlearn", SCANNED, {"user": 0.0, "item": 0.0}, 3e-3),
        ("unlearn", {**SCANNED, "evidence": "ledger"}, {"user": 0.0, "item": 0.0}, 0.0),
        ("import", SCANNED, {"user": 0.0, "item": 0.0}, 0.0),
        ("train", {**SCANNED, "max_residual": float("nan")}, {"user": 0.0, "item": 0.0}, 0.0),
    ],
)
def test_floors_and_what_was_reached(kind, certificate, floors, reached):
    model = ModelVersion(1, kind, 0, 0, 0, 0, 0, certificate=certificate)
    assert model.floors == floors
    assert model.reached == reached


@pytest.mark.parametrize(
    ("tau", "reached", "definite"),
    [(None, 0.0, 1e-3), (None, 2.4e-4, 1e-3), (None, 3e-3, 1.2e-2), (5e-4, 3e-3, 5e-4)],
)
def test_tau_follows_what_was_reached_unless_it_is_set(tau, reached, definite):
    settings = UnlearnSettings(tau=tau, max_rounds=7).resolved(reached)
    assert settings.tau == pytest.approx(definite)
    assert settings.mark == settings.lower_mark * settings.tau
    assert settings.max_rounds == 7
