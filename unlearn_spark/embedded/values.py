"""The rules of `ingestion.rules` for single values, over Arrow columns and in DuckDB's SQL.

Arrow first brings every column of a table into one of few types (`as_id`, `as_rating`, `as_time`);
SQL then judges text and numbers. An SQL expression here has a twin, the problem of the value: null
where there is none.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from unlearn_spark.errors import InputError
from unlearn_spark.ingestion import rules

SECONDS, MICROSECONDS = pa.float64(), pa.int64()
"""Types of times that are still to be judged, besides text."""

_LARGEST_INTEGER = 2**63 - 1
EXACT_DOUBLE = 2.0**53
_EXACT = {pa.float16(): 2.0**11, pa.float32(): 2.0**24, pa.float64(): EXACT_DOUBLE}
"""Up to these values the type tells all integers apart."""

_UNIT = {"s": 1, "ms": 1_000}


def is_text(kind: pa.DataType) -> bool:
    """Whether values of the type are text."""
    return bool(
        pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    )


def plain_type(kind: pa.DataType) -> pa.DataType:
    """The type of the values of a dictionary or an extension, else the type itself."""
    if isinstance(kind, pa.BaseExtensionType):
        return plain_type(kind.storage_type)
    if pa.types.is_dictionary(kind) or pa.types.is_run_end_encoded(kind):
        return plain_type(kind.value_type)
    return kind


def plain(column: pa.Array) -> pa.Array:
    """A column without dictionary; text as `string`, in valid UTF-8: other bytes become U+FFFD."""
    if isinstance(column, pa.ExtensionArray):
        column = column.storage
    kind = plain_type(column.type)
    if pa.types.is_run_end_encoded(column.type):
        column = pc.run_end_decode(column)
    if not is_text(kind):
        return column.cast(kind) if column.type != kind else column
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    as_bytes = column.cast(pa.large_binary() if pa.types.is_large_string(kind) else pa.binary())
    try:
        return as_bytes.cast(pa.string())
    except pa.ArrowInvalid:
        values = as_bytes.to_pylist()
        return pa.array([None if v is None else v.decode(errors="replace") for v in values])


def type_name(kind: pa.DataType) -> str:
    """What messages call a type: the same on both engines."""
    kind = plain_type(kind)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return f"array<{type_name(kind.value_type)}>"
    if pa.types.is_struct(kind):
        return f"struct<{','.join(f'{f.name}:{type_name(f.type)}' for f in kind)}>"
    if pa.types.is_map(kind):
        return f"map<{type_name(kind.key_type)},{type_name(kind.item_type)}>"
    if pa.types.is_timestamp(kind):
        return "timestamp" if kind.tz else "timestamp_ntz"
    if pa.types.is_decimal(kind):
        return f"decimal({kind.precision},{kind.scale})"
    if is_text(kind):
        return "string"
    names = {
        "bool": "boolean",
        "int8": "tinyint",
        "int16": "smallint",
        "int32": "int",
        "int64": "bigint",
        "float": "float",
        "double": "double",
        "date32[day]": "date",
        "null": "void",
        "large_binary": "binary",
    }
    return names.get(str(kind), str(kind))


def is_unusual(column: pa.Array) -> bool:
    """Does text in the column have characters outside printable ASCII?

    Only then can it have white space other than blanks, line breaks, or U+FFFD.
    """
    _, _, data = column.buffers()
    if data is None:
        return False
    offsets = np.frombuffer(column.buffers()[1], np.int32)
    first, last = offsets[column.offset], offsets[column.offset + len(column)]
    text = np.frombuffer(data, np.uint8)[first:last]
    return bool(len(text)) and bool((text < 0x20).any() or (text > 0x7E).any())


# --- columns of tables, in Arrow --------------------------------------------------------------


def require_id(kind: pa.DataType, column: str, path: str) -> None:
    """Raise InputError where no id can have this type."""
    if not (is_text(kind) or _is_number(kind)):
        raise InputError(
            f"--input {path}: column {column} has type {type_name(kind)}; "
            "it must be text or integers, cast it first"
        )


def require_rating(kind: pa.DataType, column: str, path: str) -> None:
    """Raise InputError where no rating can have this type."""
    if not (is_text(kind) or _is_number(kind)):
        raise InputError(
            f"--input {path}: column {column} has type {type_name(kind)}; ratings must be numbers"
        )


def require_time(kind: pa.DataType, column: str, path: str) -> None:
    """Raise InputError where a column of this type cannot hold times."""
    if not (
        is_text(kind) or _is_number(kind) or pa.types.is_timestamp(kind) or pa.types.is_date(kind)
    ):
        raise InputError(
            f"--input {path}: column {column} has type {type_name(kind)}; "
            "times must be timestamps, text or seconds"
        )


def _is_number(kind: pa.DataType) -> bool:
    return bool(
        pa.types.is_integer(kind)
        or pa.types.is_floating(kind)
        or pa.types.is_decimal(kind)
        or pa.types.is_null(kind)
    )


def as_id(column: pa.Array) -> tuple[pa.Array, pa.Array | None]:
    """Ids of a plain column as string or int64, null where they are missing or inexact; and which
    are inexact (boolean; None: none)."""
    kind = column.type
    if is_text(kind) or kind == pa.int64():
        return column, None
    if (pa.types.is_integer(kind) and kind != pa.uint64()) or pa.types.is_null(kind):
        return column.cast(pa.int64()), None
    if kind == pa.uint64():
        exact = pc.less_equal(column, pa.scalar(_LARGEST_INTEGER, kind))
        missing = column.is_null()
    elif pa.types.is_decimal(kind):
        wide = column.cast(pa.decimal256(76, kind.scale))
        whole = pc.if_else(pc.equal(pc.floor(wide), wide), wide, pa.scalar(None, wide.type))
        column = whole.cast(pa.decimal256(76, 0))
        least, most = (pa.scalar(n, pa.int64()).cast(column.type) for n in (-(2**63), 2**63 - 1))
        exact = pc.and_(pc.greater_equal(column, least), pc.less_equal(column, most))
        missing = wide.is_null()
    else:
        exact = pc.and_(
            pc.equal(pc.floor(column), column),
            pc.less_equal(pc.abs(column), pa.scalar(_EXACT[kind]).cast(kind)),
        )
        missing = column.is_null(nan_is_null=True)  # pandas' way to leave an integer out
    exact = pc.and_(pc.fill_null(exact, False), pc.invert(missing))
    numbers = pc.if_else(exact, column, pa.scalar(None, column.type)).cast(pa.int64())
    return numbers, pc.and_not(pc.invert(missing), exact)


def as_rating(column: pa.Array) -> pa.Array:
    """Ratings of a plain column as string or double."""
    return column if is_text(column.type) else column.cast(pa.float64(), safe=False)


def as_time(column: pa.Array) -> pa.Array:
    """Times of a plain column as string, as `SECONDS` or as `MICROSECONDS` since 1970."""
    kind = column.type
    if is_text(kind):
        return column
    if pa.types.is_date(kind):
        column = column.cast(pa.date32()).cast(pa.timestamp("s"))
        kind = column.type
    if not pa.types.is_timestamp(kind):
        return column.cast(SECONDS, safe=False)
    if kind.unit in _UNIT:
        # Times that microseconds cannot count must stay out of range.
        per_second, counts = _UNIT[kind.unit], column.cast(pa.int64())
        first, last = rules.FIRST_SECOND - 1, rules.LAST_SECOND + 1
        counts = pc.max_element_wise(counts, first * per_second, skip_nulls=False)
        counts = pc.min_element_wise(counts, last * per_second, skip_nulls=False)
        return pc.multiply(counts, 1_000_000 // per_second)
    return column.cast(pa.timestamp("us", kind.tz), safe=False).cast(MICROSECONDS)


# --- SQL ------------------------------------------------------------------------------------

_SPACES = "'" + rules.WHITE_SPACE.replace("'", "''") + "'"


def trimmed(text: str, unusual: bool) -> str:
    """Text without the white space around it, null where nothing is left."""
    return f"nullif({f'trim({text}, {_SPACES})' if unusual else f'trim({text})'}, '')"


def text_problem(text: str) -> str:
    """The problem of trimmed text, of whatever a table's column held."""
    return (
        f"CASE WHEN contains({text}, '{rules.REPLACEMENT}') THEN '{rules.NOT_UTF8}' "
        f"WHEN regexp_matches({text}, '[\\r\\n]') THEN '{rules.LINE_BREAK}' END"
    )


def integer(text: str) -> str:
    """The integer that is written exactly so (not 007), else null."""
    return (
        f"CASE WHEN CAST(TRY_CAST({text} AS BIGINT) AS VARCHAR) = {text} "
        f"THEN TRY_CAST({text} AS BIGINT) END"
    )


def number(text: str) -> str:
    """The number that trimmed text says, else null."""
    return f"CASE WHEN regexp_matches({text}, '{rules.NUMBER}') THEN TRY_CAST({text} AS DOUBLE) END"


def rating_problem(given: str, rating: str, is_text: bool) -> str:
    """The problem of a rating: `given` as the input has it, `rating` as a double."""
    says = ""
    if is_text:
        says = (
            f"WHEN {rating} IS NULL AND lower(ltrim({given}, '+-')) IN ('nan', 'inf', 'infinity') "
            f"THEN 'rating is not finite' WHEN {rating} IS NULL THEN 'rating is not a number' "
        )
    return (
        f"CASE WHEN {given} IS NULL THEN 'rating is missing' {says}"
        f"WHEN NOT abs({rating}) <= {rules.LARGEST_FLOAT!r} THEN 'rating is not finite' END"
    )


def time_of(given: str, kind: pa.DataType) -> tuple[str, str]:
    """Microseconds since 1970 (bigint) from trimmed text, `SECONDS` or `MICROSECONDS`; and the
    problem. Null is an unknown time, which is no problem."""
    if kind == MICROSECONDS:
        first, after = rules.FIRST_SECOND * 1_000_000, (rules.LAST_SECOND + 1) * 1_000_000
        return given, (
            f"CASE WHEN {given} < {first} OR {given} >= {after} THEN '{rules.TIME_RANGE}' END"
        )
    if kind == SECONDS:
        return _from_seconds(given)
    count, count_problem = _from_seconds(number(given))
    is_number = f"regexp_matches({given}, '{rules.NUMBER}')"
    moment = (
        f"CASE WHEN regexp_matches({given}, '{rules.ISO_8601}') "
        f"THEN epoch_us(TRY_CAST({given} AS TIMESTAMPTZ)) END"
    )
    return (
        f"CASE WHEN {is_number} THEN {count} ELSE {moment} END",
        f"CASE WHEN {is_number} THEN {count_problem} "
        f"WHEN {given} IS NOT NULL AND ({moment}) IS NULL THEN '{rules.BAD_TIME}' END",
    )


def _from_seconds(seconds: str) -> tuple[str, str]:
    usable = f"({seconds}) BETWEEN {rules.FIRST_SECOND} AND {rules.LAST_SECOND}"
    return (
        f"CASE WHEN {usable} THEN CAST(trunc(({seconds}) * 1e6) AS BIGINT) END",
        f"CASE WHEN isnan({seconds}) THEN '{rules.BAD_TIME}' "
        f"WHEN NOT ({usable}) THEN '{rules.TIME_RANGE}' END",
    )
