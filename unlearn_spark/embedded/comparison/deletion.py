"""What a version forgot since the last one before it that was trained or imported."""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa

from unlearn_spark.audit.versions import comparable_version
from unlearn_spark.embedded.ratings import PAIR, among, fitted
from unlearn_spark.errors import InputError
from unlearn_spark.tables.delta_rs import DeltaRsStore
from unlearn_spark.tables.models import ModelVersion


@dataclass(frozen=True)
class Deletion:
    """Two versions, and the ratings that lie between them (`audit.figures.Deleted`).

    Attributes
    ----------
    before, after
        The newest earlier version that was trained or imported, and the one to judge.
    known
        user_id, item_id: what `before` was fitted to.
    retained
        user_id, item_id, rating: what `after` must fit.
    deleted
        user_id, item_id: known to `before`, not retained.
    """

    before: ModelVersion
    after: ModelVersion
    known: pa.Table
    retained: pa.Table
    deleted: pa.Table

    @property
    def n_retained(self) -> int:
        return self.retained.num_rows

    @property
    def n_deleted(self) -> int:
        return self.deleted.num_rows


def find_deletion(store: DeltaRsStore, model: ModelVersion) -> Deletion:
    """Find what a version forgot since the last version before it that was trained or imported.

    Raises
    ------
    InputError
        There is no such earlier version, nothing was removed since, the two were fitted with
        other settings, or one of them names no ratings.
    """
    before = comparable_version(store, model)
    retained = fitted(store, model)
    known = fitted(store, before, PAIR)
    deleted = known.filter(pa.array(~among(known, retained)))
    if not deleted.num_rows:
        raise InputError(
            f"version {model.model_version} removed nothing since version "
            f"{before.model_version}; nothing to compare"
        )
    return Deletion(before, model, known, retained, deleted)
