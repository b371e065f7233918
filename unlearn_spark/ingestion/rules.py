"""What counts as a usable row of an input, whichever engine reads it.

Ratings and deletion requests follow the same rules:

- White space around a value is cut. An id that was nothing else is missing.
- Text is UTF-8. A row with other bytes is refused.
- An id is text or an integer. A whole number of a numeric type counts as an integer; a fraction,
  or a number too large to be exact, is refused. The text 42.0 or 042 is not an integer.
- A column is found whatever the case of its name.
- A local path that exists is meant literally; any other may be a glob.

A row that cannot be used keeps its text and gets a problem, which never quotes the row. An input
that cannot be used at all raises `InputError`.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from unlearn_spark.errors import InputError, SettingsError
from unlearn_spark.preconditions import is_remote

FORMATS = ("movielens", "csv", "parquet", "delta", "netflix")
COLUMNS = ("user_id", "item_id", "rating", "rated_at")

WRONG_WIDTH = "wrong number of columns"
NO_MOVIE = "rating stands before any movie line"
BAD_TIME = "rated_at is neither ISO 8601 nor seconds since 1970"
TIME_RANGE = "rated_at is outside the years 1 to 9999 (are these milliseconds?)"
NOT_UTF8 = "is not valid UTF-8, or has the character U+FFFD that stands for such bytes"
LINE_BREAK = "has a line break inside a value, which no line of csv can hold"
INEXACT_ID = "{column} is a fraction, or too large a number to be exact"
FOREIGN_ID = "{column} is not an integer as in the table"
"""The problem of an id that is no integer, where the ratings table has integer ids."""

MOVIELENS_HEADER = ["userid", "movieid", "rating", "timestamp"]
NUMBER = r"^[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?$"
ISO_8601 = (
    r"^[0-9]{4}-[0-9]{2}-[0-9]{2}"
    r"([T ]([01][0-9]|2[0-3]):[0-9]{2}(:[0-9]{2}(\.[0-9]+)?)?"
    r"(Z|[+-](0[0-9]|1[0-7])(:?[0-5][0-9])?|[+-]18(:?00)?)?)?$"
)
FIRST_SECOND, LAST_SECOND = -62135596800, 253402300799  # years 1 and 9999
CONTROL = re.compile(r"[\x00-\x08\x0e-\x1f]")
# Unicode's white space, and two characters without width: U+200B, and U+FEFF (byte order mark).
WHITE_SPACE = (
    "\t\n\x0b\x0c\r\x1c\x1d\x1e\x1f \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007"
    "\u2008\u2009\u200a\u200b\u2028\u2029\u202f\u205f\u3000\ufeff"
)
REPLACEMENT = "\ufffd"

LARGEST_FLOAT = 3.4028234663852886e38
"""Ratings are stored as float32, in which larger numbers are infinite."""

GIVEN_TABLE = "the given table"
"""The source of rows that come from a table in memory instead of a path."""

REFUSED = "covered by tombstone "
"""Begins the reason for a rating that an accepted request covers; its id follows."""

REQUEST_FORMATS = ("csv", "jsonl", "parquet", "delta")

FACTOR_FORMATS = ("mllib", "parquet", "npz")

CONFLICT = "request_id was used before with other content"

SUFFIXES = {
    ".csv": "csv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
}
"""The format of a file of requests, by its suffix."""


@dataclass(frozen=True)
class IngestReport:
    """What became of the rows: `read == written + superseded + quarantined`.

    Attributes
    ----------
    written
        Rows that are new in the table or replaced the rating of their pair.
    superseded
        Rows that lose to a newer or equal rating of their pair, in the input or in the table.
    version
        Delta version of the ratings table that holds the result; None when there is no table.
    """

    read: int
    written: int
    superseded: int
    quarantined: int
    version: int | None


@dataclass(frozen=True)
class TombstoneReport:
    """What became of the requests: `read == accepted + duplicates + quarantined`."""

    read: int
    accepted: int
    duplicates: int
    quarantined: int
    version: int | None


def parse_columns(text: str | None) -> dict[str, str]:
    """Read `user_id=uid,item_id=iid`: which column of the input plays which part.

    Raises
    ------
    SettingsError
        A part is unknown or named twice, or a name is missing.
    """
    renamed: dict[str, str] = {}
    for entry in (text or "").split(","):
        if not entry.strip():
            continue
        part, equals, name = (piece.strip() for piece in entry.partition("="))
        if not equals or not name:
            raise SettingsError(f"--columns {entry.strip()}: expected part=column, as user_id=uid")
        if part not in COLUMNS:
            raise SettingsError(
                f"--columns {entry.strip()}: {part} is none of {', '.join(COLUMNS)}"
            )
        if part in renamed:
            raise SettingsError(f"--columns {text}: {part} is named twice")
        renamed[part] = name
    return renamed


def check_exists(path: str) -> None:
    """Raise InputError if a local path is out of reach, or is missing and is no glob."""
    if is_remote(path):
        return
    try:
        Path(path).stat()
    except PermissionError as error:
        raise InputError(f"--input {path}: not readable; check its permissions") from error
    except OSError as error:
        if not any(mark in path for mark in "*?[{"):
            raise InputError(f"--input {path}: no such file or folder; check the path") from error


def header_names(path: str, header: str) -> list[str]:
    """The names in a csv header line. Raises InputError if the line is no header."""
    try:
        return [name.strip() for name in next(csv.reader([header]))]
    except csv.Error as error:
        raise InputError(
            f"--input {path}: its first line is no csv header ({error}); check --format"
        ) from error


def locate(
    names: list[str],
    wanted: Mapping[str, str],
    optional: Collection[str],
    path: str,
    mend: str,
) -> dict[str, int]:
    """By part the index of its column, whatever the case of its name.

    Parameters
    ----------
    names
        The columns that there are.
    wanted
        By part the name of its column.
    optional
        Parts that may be absent.
    mend
        What to do about a missing column; `{part}` is filled in.

    Raises
    ------
    InputError
        A part is absent that is not optional, or has two columns.
    """
    where = {}
    for part, name in wanted.items():
        found = [n for n, other in enumerate(names) if other.lower() == name.lower()]
        if len(found) > 1:
            these = sorted({names[n] for n in found})
            raise InputError(f"--input {path}: has two columns {' and '.join(these)}; rename one")
        if found:
            where[part] = found[0]
        elif part not in optional:
            shown = ", ".join(names[:8])[:120]
            raise InputError(
                f"--input {path}: has no column {name} (found: {shown}); {mend.format(part=part)}"
            )
    return where


def format_of_requests(path: str, is_delta: bool) -> str:
    """The format of requests by the path's suffix; `is_delta`: the path is a Delta table.

    Raises
    ------
    SettingsError
        Neither says it.
    """
    name = PurePosixPath(path.rstrip("/"))
    suffixes = [suffix.lower() for suffix in name.suffixes if suffix.lower() != ".gz"]
    if suffixes and suffixes[-1] in SUFFIXES:
        return SUFFIXES[suffixes[-1]]
    if is_delta:
        return "delta"
    raise SettingsError(
        f"--input {path}: say with --format which of {', '.join(REQUEST_FORMATS)} it is"
    )


def worst_of(problems: Mapping[str, int]) -> str:
    """The most frequent problem."""
    return max(problems, key=lambda problem: (problems[problem], problem))
