"""Which earlier version an unlearned one is compared with."""

from __future__ import annotations

from typing import TYPE_CHECKING

from unlearn_spark.errors import InputError
from unlearn_spark.tables import models

if TYPE_CHECKING:
    from unlearn_spark.tables.models import ModelVersion
    from unlearn_spark.tables.store import Store


def comparable_version(store: Store, model: ModelVersion) -> ModelVersion:
    """The nearest ancestor that was trained or imported, with the same settings.

    Raises
    ------
    InputError
        There is none, or it was fitted with other settings.
    """
    before = version_before(store, model)
    for name in ("rank", "reg_param", "implicit_prefs", "alpha", "nonnegative"):
        old, new = getattr(before.als, name), getattr(model.als, name)
        if old != new:
            raise InputError(
                f"version {before.model_version} was fitted with als.{name} = {old}, version "
                f"{model.model_version} with {new}; only versions of equal settings compare"
            )
    return before


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
