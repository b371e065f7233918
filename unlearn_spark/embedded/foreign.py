"""Read factors that another library trained, and check them: ids and a matrix of each side.

=========  ======================================================================================
format     what is read
=========  ======================================================================================
mllib      what `ALSModel.write().save()` of Spark MLlib leaves: `userFactors`, `itemFactors`
parquet    `user_factors` and `item_factors`, with or without `.parquet`: columns id and factors
npz        arrays user_factors (n, k), item_factors (m, k), user_ids (n,), item_ids (m,) of NumPy
=========  ======================================================================================
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from unlearn_spark.embedded import formats, values
from unlearn_spark.embedded.files import exists, explained
from unlearn_spark.embedded.ids import as_text, typed_ids
from unlearn_spark.errors import SettingsError
from unlearn_spark.ingestion import foreign, rules
from unlearn_spark.tables.relational import query


@dataclass(frozen=True)
class ForeignSide:
    """Factors of one side.

    Attributes
    ----------
    ids
        string or int64 (n,): unique, none null.
    factors : float32 (n, rank)
        All finite.
    """

    ids: pa.Array
    factors: NDArray[np.float32]


@dataclass(frozen=True)
class ForeignFactors:
    """Factors of both sides, of one rank."""

    user: ForeignSide
    item: ForeignSide

    @property
    def rank(self) -> int:
        return int(self.user.factors.shape[1])


def read_factors(
    path: str, form: str, id_types: Mapping[str, pa.DataType] | None = None
) -> ForeignFactors:
    """Read and check factors in one of `rules.FACTOR_FORMATS`.

    Parameters
    ----------
    path
        The folder; for npz also the file itself, which must be local.
    id_types
        By side ("user", "item") the type that ids must have: string or int64. Integers become
        text. Text, without the white space around it, becomes the integer that is written exactly
        so: 7, but not 007. By default text stays text and integers become int64.

    Raises
    ------
    InputError
        A file, column or array is missing, unreadable or empty; ids are null, repeated or not of
        the wanted type; factors are missing, not finite in float32, or of different ranks.
    SettingsError
        `form` is unknown.
    """
    if form not in rules.FACTOR_FORMATS:
        raise SettingsError(f"--format {form}: expected one of {', '.join(rules.FACTOR_FORMATS)}")
    rules.check_exists(path)
    given = _from_npz(path) if form == "npz" else _from_folders(path, form)
    types = id_types or {}
    user, item = (_checked(given[side], types.get(side)) for side in foreign.SIDES)
    foreign.check_ranks(path, user.factors.shape[1], item.factors.shape[1])
    return ForeignFactors(user, item)


@dataclass(frozen=True)
class _Given:
    """A side as it was read: ids (string or int64, with nulls), factors (lists of floating point,
    with nulls), and the place that messages name."""

    ids: pa.ChunkedArray
    factors: pa.ChunkedArray
    place: str


def _from_folders(path: str, form: str) -> dict[str, _Given]:
    return {
        side: _from_folder(path.rstrip("/"), names, form)
        for side, names in foreign.NAMES[form].items()
    }


def _from_folder(path: str, names: Sequence[str], form: str) -> _Given:
    for name in names:
        place = f"{path}/{name}"
        with explained(place, "parquet"):
            if not exists(place):
                continue
            table = formats.open_table(place, "parquet")
            column = foreign.factor_column(table.schema.names, place)
            kinds = {each: table.schema.field(each).type for each in ("id", column)}
            if not (values.is_text(kinds["id"]) or pa.types.is_integer(kinds["id"])):
                raise foreign.no_ids(place, values.type_name(kinds["id"]))
            if not _is_list_of_floats(kinds[column]):
                raise foreign.no_factors(place, column, values.type_name(kinds[column]))
            indices = [table.schema.get_field_index(each) for each in kinds]
            ids, factors = [], []
            for batch in table.batches(indices):
                ids.append(values.as_id(values.plain(batch.column(0)))[0])
                factors.append(batch.column(1))
        kind = pa.string() if values.is_text(kinds["id"]) else pa.int64()
        return _Given(pa.chunked_array(ids, kind), pa.chunked_array(factors, kinds[column]), place)
    raise foreign.neither_of(path, names, form)


def _is_list_of_floats(kind: pa.DataType) -> bool:
    is_list = any(
        getattr(pa.types, f"is_{name}")(kind) for name in ("list", "large_list", "fixed_size_list")
    )
    return is_list and bool(pa.types.is_floating(kind.value_type))


def _from_npz(path: str) -> dict[str, _Given]:
    found = {}
    for side, arrays in foreign.read_npz(path).items():
        kind = pa.string() if arrays.ids.dtype.kind == "U" else pa.int64()
        rank = arrays.factors.shape[1]
        with np.errstate(over="ignore"):  # `_checked` refuses the infinities
            flat = pa.array(np.ascontiguousarray(arrays.factors, np.float32).reshape(-1))
        lists = (
            pa.FixedSizeListArray.from_arrays(flat, rank)
            if rank
            else pa.array([[]] * len(arrays.ids), pa.list_(flat.type))
        )
        ids = pa.array(arrays.ids.tolist(), kind)
        found[side] = _Given(pa.chunked_array([ids]), pa.chunked_array([lists]), arrays.place)
    return found


def _checked(given: _Given, wanted: pa.DataType | None) -> ForeignSide:
    """The side with ids of the wanted type. Raises InputError."""
    ids, garbled = given.ids, 0
    if pa.types.is_string(ids.type):
        trimmed = query(
            f"SELECT {values.trimmed('id', True)} AS id, "
            f"{values.text_problem(values.trimmed('id', True))} IS NOT NULL AS garbled FROM given",
            given=pa.table({"id": ids}),
        )
        ids, garbled = trimmed["id"], pc.sum(trimmed["garbled"]).as_py() or 0
    as_read = ids
    if wanted is not None and wanted != ids.type:
        ids = as_text(ids) if pa.types.is_string(wanted) else typed_ids(ids, wanted)
    factors = given.factors.combine_chunks()
    sizes = pc.min_max(pc.list_value_length(factors)).as_py()
    flat = pc.list_flatten(factors)
    usable = pc.fill_null(pc.less_equal(pc.abs(flat), rules.LARGEST_FLOAT), False)
    unusable = pc.list_parent_indices(factors).filter(pc.invert(usable))
    foreign.check(
        given.place,
        foreign.Counts(
            rows=len(as_read),
            ids=len(as_read.drop_null().unique()),
            null_ids=as_read.null_count,
            garbled=garbled,
            foreign_ids=ids.null_count - as_read.null_count,
            null_rows=factors.null_count,
            least=sizes["min"],
            most=sizes["max"],
            unusable=len(unusable.unique()),
        ),
    )
    matrix = flat.to_numpy(zero_copy_only=False).reshape(len(as_read), -1).astype(np.float32)
    plain = ids.combine_chunks() if isinstance(ids, pa.ChunkedArray) else ids
    return ForeignSide(plain, matrix)
