"""Factors that another library trained: where they are, and what is refused, on either engine."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unlearn_spark.errors import InputError

SIDES = ("user", "item")

MAX_RANK = 2048
"""Upper limit of `als.rank`."""

NAMES: dict[str, dict[str, tuple[str, ...]]] = {
    "mllib": {"user": ("userFactors",), "item": ("itemFactors",)},
    "parquet": {
        "user": ("user_factors", "user_factors.parquet"),
        "item": ("item_factors", "item_factors.parquet"),
    },
}
"""By format and side the names of a Parquet file or folder, of which one is there."""

_FACTOR_COLUMNS = ("factors", "features")


def neither_of(path: str, names: Sequence[str], form: str) -> InputError:
    """The error for a folder that has none of these names."""
    mend = (
        "give the folder that ALSModel.save() wrote (of a saved pipeline: its stages/..._ALS_...)"
        if form == "mllib"
        else "write one Parquet file or folder for each side, with columns id and factors"
    )
    return InputError(f"--input {path}: has no {' or '.join(names)}; {mend}")


def factor_column(columns: Sequence[str], place: str) -> str:
    """The column that holds the factors. Raises InputError if it or the column id is missing."""
    names = [name for name in _FACTOR_COLUMNS if name in columns]
    shown = ", ".join(columns[:8])[:120]
    if "id" not in columns:
        raise InputError(f"--input {place}: has no column id (found: {shown}); rename yours")
    if not names:
        raise InputError(f"--input {place}: has no column factors (found: {shown}); rename yours")
    if len(names) > 1:
        raise InputError(f"--input {place}: has both columns factors and features; drop one")
    return names[0]


def no_ids(place: str, kind: str) -> InputError:
    """The error for a column id of a type that ids cannot have."""
    return InputError(
        f"--input {place}: column id has type {kind}; ids must be string or integer, cast it first"
    )


def no_factors(place: str, column: str, kind: str) -> InputError:
    """The error for a column of factors of a type that factors cannot have."""
    return InputError(
        f"--input {place}: column {column} has type {kind}; "
        "factors must be array<float>, cast it first"
    )


@dataclass(frozen=True)
class Counts:
    """Rows of one side, in all and by what is wrong with them.

    Attributes
    ----------
    ids
        Distinct ids.
    garbled
        Ids that are not valid UTF-8.
    foreign_ids
        Ids that are not of the type of the ratings table's.
    least, most
        Factors of a row; None: there are no rows.
    unusable
        Rows with factors that are null, not finite or beyond float32.
    """

    rows: int
    ids: int
    null_ids: int
    garbled: int
    foreign_ids: int
    null_rows: int
    least: int | None
    most: int | None
    unusable: int


def check(place: str, found: Counts) -> None:
    """Raise InputError, with the first fault, unless a side's rows are all usable."""
    for wrong, problem in (
        (found.rows == 0, "has no rows; give a model that was fitted"),
        (found.null_ids, f"rows without an id: {found.null_ids}; remove them"),
        (found.garbled, f"ids that are not valid UTF-8: {found.garbled}; export the model again"),
        (found.null_rows, f"rows without factors: {found.null_rows}; remove them"),
        (
            found.foreign_ids,
            f"ids that are no integers, as those of the ratings table are: {found.foreign_ids}; "
            "map them to its ids",
        ),
        (
            found.ids < found.rows,
            f"rows that repeat an id: {found.rows - found.ids}; keep one row of each id",
        ),
        (
            found.least != found.most,
            f"rows have from {found.least} to {found.most} factors; give one model's rows",
        ),
        (
            not 1 <= (found.most or 0) <= MAX_RANK,
            f"rows have {found.most} factors; a rank is from 1 to {MAX_RANK}",
        ),
        (
            found.unusable,
            f"rows with factors that are null, not finite or beyond float32: {found.unusable}; "
            "export the model again",
        ),
    ):
        if wrong:
            raise InputError(f"--input {place}: {problem}")


def check_ranks(path: str, user: int, item: int) -> None:
    """Raise InputError unless both sides have one rank."""
    if user != item:
        raise InputError(
            f"--input {path}: users have {user} factors and items {item}; "
            "give both sides of one model"
        )


# --- NumPy ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arrays:
    """One side of an .npz: ids (integers or text) (n,), factors floating point (n, k), n > 0;
    and the `place` that messages name."""

    ids: NDArray[Any]
    factors: NDArray[Any]
    place: str


def read_npz(path: str) -> Mapping[str, Arrays]:
    """Both sides of an .npz file; `path` is the file or a folder with one.

    Raises
    ------
    InputError
        The file is not there, is no such file, or its arrays do not fit together.
    """
    file = _npz_file(path)
    arrays = _load(file)
    return {
        side: _fitting(file, side, arrays[f"{side}_ids"], arrays[f"{side}_factors"])
        for side in SIDES
    }


def _npz_file(path: str) -> Path:
    if "://" in path:
        raise InputError(
            f"--input {path}: an .npz is read on the driver; copy it to a local folder first"
        )
    given = Path(path)
    if not given.is_dir():
        return given
    found = sorted(given.glob("*.npz"))
    if given / "factors.npz" in found:
        return given / "factors.npz"
    if not found:
        raise InputError(f"--input {path}: has no .npz file; give the file or its folder")
    if len(found) > 1:
        raise InputError(
            f"--input {path}: has {len(found)} .npz files and none is factors.npz; name the file"
        )
    return found[0]


def _load(file: Path) -> dict[str, NDArray[Any]]:
    """The four arrays; others that the file may have are not read."""
    names = ("user_factors", "item_factors", "user_ids", "item_ids")
    arrays = {}
    try:
        opened = np.load(file, allow_pickle=False)
    except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
        raise InputError(
            f"--input {file}: is no .npz file of NumPy; write it with numpy.savez"
        ) from error
    if not isinstance(opened, np.lib.npyio.NpzFile):
        raise InputError(
            f"--input {file}: is one array, not an .npz file; write it with numpy.savez"
        )
    with opened:
        missing = [name for name in names if name not in opened.files]
        if missing:
            shown = ", ".join(opened.files[:8])[:120] or "none"
            raise InputError(
                f"--input {file}: has no array {missing[0]} (found: {shown}); "
                f"add it: numpy.savez(..., {missing[0]}=...)"
            )
        for name in names:
            try:
                arrays[name] = opened[name]
            except ValueError as error:
                raise InputError(
                    f"--input {file}: array {name} holds Python objects; "
                    f"store plain numbers or text, as numpy.array({name}.tolist())"
                ) from error
            except (OSError, EOFError, zipfile.BadZipFile) as error:
                raise InputError(
                    f"--input {file}: array {name} is damaged; write the file again"
                ) from error
    return arrays


def _fitting(file: Path, side: str, ids: NDArray[Any], matrix: NDArray[Any]) -> Arrays:
    if matrix.ndim != 2 or matrix.dtype.kind != "f":
        raise InputError(
            f"--input {file}: array {side}_factors is {matrix.dtype} of shape {matrix.shape}; "
            "it must be floating point of shape (rows, rank)"
        )
    if ids.ndim != 1 or ids.dtype.kind not in "iuU":
        raise InputError(
            f"--input {file}: array {side}_ids is {ids.dtype} of shape {ids.shape}; "
            "it must be one-dimensional, of integers or text"
        )
    if len(ids) != len(matrix):
        raise InputError(
            f"--input {file}: {len(ids)} {side}_ids name {len(matrix)} rows of {side}_factors; "
            "give one id for each row"
        )
    if ids.dtype.kind == "u" and len(ids) and int(ids.max()) > np.iinfo(np.int64).max:
        raise InputError(
            f"--input {file}: array {side}_ids has integers beyond int64; store them as text"
        )
    if not len(ids):
        raise InputError(
            f"--input {file}: {side}_factors has no rows; give a model that was fitted"
        )
    return Arrays(ids, matrix, f"{file}: {side}_factors")
