"""Read rating files of every format, and tables, into parts of one kind.

A part is a piece of an input that any thread can read: a chunk of whole lines, or some batches of a
table. Values are cut apart here; `values` and `ingest` judge them.
"""

from __future__ import annotations

import json
import math
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
from deltalake import DeltaTable, QueryBuilder

from unlearn_spark.embedded import files, values
from unlearn_spark.embedded.files import File, explained
from unlearn_spark.errors import InputError, SettingsError
from unlearn_spark.ingestion import rules
from unlearn_spark.preconditions import is_remote, require_path_for_delta_rs
from unlearn_spark.tables.store import is_delta

T = TypeVar("T")
R = TypeVar("R")

IDS = ("user_id", "item_id")

BATCH_ROWS = 1 << 19
"""Rows of a table that are judged at a time."""

MOST_PARTS = 8
"""Most parts that are judged at a time, which bounds their memory."""


class Rows(NamedTuple):
    """A part's rows.

    Attributes
    ----------
    columns
        The input's columns by the part they play: string, or as `values.as_id`, `as_rating` and
        `as_time` make them. `earlier` (string): the problem that reading found. `X is inexact`
        (boolean) where column X has integers that its type does not hold exactly.
    raw
        The text of the rows at these places, for the quarantine.
    """

    columns: pa.Table
    raw: Callable[[pa.Array], pa.Array]


Part = Callable[[], Rows]


@dataclass(frozen=True)
class Input:
    """An input whose columns are known, still to be read.

    Attributes
    ----------
    source
        What is read, as the user named it.
    parts
        In the order of the input; taking the next one may raise InputError.
    text_ids
        The ids come from text, so whether they are integers is still to be decided.
    """

    source: str
    parts: Iterator[Part]
    text_ids: bool


def read_ratings(source: Any, format: str, columns: Mapping[str, str]) -> Input:
    """Ratings from a path in one of `rules.FORMATS`, or from a table in memory.

    Parameters
    ----------
    source
        File, folder or glob, local or in an object store; or anything that gives an Arrow stream.
    format
        `movielens`: `ratings.csv`, `u.data` (tabs) or `ratings.dat` (`::`), known by the first
        line. `csv`: with a header, in UTF-8; a quoted value may hold commas, not line ends.
        `netflix`: `movie:` lines, each followed by `user,rating,date` lines.
    columns
        By part (`rules.COLUMNS`) the column that holds it, for csv, parquet, delta and tables. Only
        `rated_at` may be absent, unless it is named here: its times are then unknown.

    Raises
    ------
    InputError
        The path is missing or empty, is not of that format, or lacks a column.
    SettingsError
        `columns` is given for a format whose columns are fixed.
    """
    if columns and format in ("movielens", "netflix"):
        raise SettingsError(f"--columns: the columns of {format} are fixed; leave it out")
    if not isinstance(source, str):
        return _from_table(given_table(source), rules.GIVEN_TABLE, columns)
    with explained(source, format):
        if format in ("parquet", "delta"):
            read = _from_table(open_table(source, format), source, columns)
            return replace(read, parts=explaining(read.parts, source, format))
        found = files.find(source)
        first = first_line(found, source)
        if format == "csv":
            parts = _csv_parts(found, source, first, columns)
        elif format == "movielens":
            parts = _movielens_parts(found, source, first)
        elif format == "netflix":
            parts = _netflix_parts(found, source, first)
        else:
            raise SettingsError(f"--format {format}: expected one of {', '.join(rules.FORMATS)}")
    return Input(source, explaining(parts, source, format), text_ids=True)


def explaining(parts: Iterator[T], path: str, format: str) -> Iterator[T]:
    """The parts; what goes wrong while they are taken is said in one line."""
    while True:
        with explained(path, format):
            part = next(parts, None)
        if part is None:
            return
        yield part


def locate(names: list[str], columns: Mapping[str, str], path: str) -> dict[str, int]:
    """By part of a rating the index of its column."""
    wanted = {part: columns.get(part, part) for part in rules.COLUMNS}
    optional = () if "rated_at" in columns else ("rated_at",)
    return rules.locate(names, wanted, optional, path, "name it with --columns {part}=...")


def in_order(work: Callable[[T], R], items: Iterator[T], threads: int) -> Iterator[R]:
    """`work` of each item, in their order; a few items at a time, in threads."""
    threads = min(threads, MOST_PARTS)
    with ThreadPoolExecutor(threads) as pool:
        running: deque[Future[R]] = deque()
        for item in items:
            running.append(pool.submit(work, item))
            if len(running) > threads:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()


# --- text -----------------------------------------------------------------------------------


class Fields(NamedTuple):
    """How a line is cut into `width` values; `quotes`: values may be quoted."""

    separator: str
    width: int
    quotes: bool


def first_line(found: Sequence[File], path: str) -> str:
    """The first line that is not blank. Raises InputError if there is none, or it is not text."""
    for file in found:
        for chunk in files.chunks(file):
            line = _first_of(chunk)[0].decode()
            if rules.CONTROL.search(line):
                raise InputError(
                    f"--input {path}: is no text in UTF-8; check --format and the encoding"
                )
            if line.strip(" "):
                return line
    raise InputError(f"--input {path}: is empty; give a file with some rows")


def _first_of(chunk: bytes) -> tuple[bytes, bytes]:
    """The first line that is not blank, and what follows it."""
    line = b""
    while chunk and not line.strip(b" "):
        line, _, chunk = chunk.partition(b"\n")
    return line, chunk


def text_chunks(found: Iterable[File], path: str, header: str | None) -> Iterator[bytes]:
    """Chunks of text files, without the header that each file must begin with (None: no header)."""
    for file in found:
        is_first = header is not None
        for chunk in files.chunks(file):
            if is_first:
                line, chunk = _first_of(chunk)
                is_first = not line.strip(b" ")
                if not is_first and line.decode().lower() != str(header).lower():
                    raise InputError(
                        f"--input {path}: its files have different headers; "
                        "make them alike or read them one by one"
                    )
            if chunk:
                yield chunk


def _csv_parts(
    found: Sequence[File], path: str, header: str, columns: Mapping[str, str]
) -> Iterator[Part]:
    names = rules.header_names(path, header)
    where = locate(names, columns, path)
    fields = Fields(",", len(names), quotes=True)
    return (TextPart(chunk, fields, where) for chunk in text_chunks(found, path, header))


def _movielens_parts(found: Sequence[File], path: str, first: str) -> Iterator[Part]:
    where = {part: index for index, part in enumerate(rules.COLUMNS)}
    if [name.strip().lower() for name in first.split(",")] == rules.MOVIELENS_HEADER:
        header, fields = first, Fields(",", 4, quotes=True)
    else:
        header = None
        separator = next((mark for mark in ("::", "\t") if first.count(mark) == 3), None)
        if separator is None:
            raise InputError(
                f"--input {path}: is no MovieLens ratings file (ratings.csv, u.data or "
                "ratings.dat); use --format csv with --columns for other headers"
            )
        fields = Fields(separator, 4, quotes=False)
    return (TextPart(chunk, fields, where) for chunk in text_chunks(found, path, header))


@dataclass(frozen=True)
class TextPart:
    """Lines of a text file, and which of their values play which part."""

    chunk: bytes
    fields: Fields
    where: Mapping[str, int]

    def __call__(self) -> Rows:
        columns = _split_alike(self.chunk, self.fields, sorted(set(self.where.values())))
        if columns is None:
            columns, problem = split(lines_of(self.chunk), self.fields)
        else:
            problem = pa.nulls(len(next(iter(columns.values()))), pa.string())
        problem = _or_not_utf8(problem, self.chunk, lambda: lines_of(self.chunk))
        named = {part: columns[index] for part, index in self.where.items()}
        return Rows(
            pa.table({**named, "earlier": problem}),
            lambda places: lines_of(self.chunk).take(places),
        )


def lines_of(chunk: bytes) -> pa.Array:
    """The lines that are not blank."""
    lines = pc.split_pattern(pa.array([chunk[:-1]], pa.large_string()), "\n").flatten()
    lines = lines.cast(pa.string())
    return lines.filter(pc.not_equal(pc.ascii_trim(lines, " "), ""))


def _or_not_utf8(problem: pa.Array, chunk: bytes, lines: Callable[[], pa.Array]) -> pa.Array:
    """The problems, where U+FFFD in a line goes first."""
    if not files.has_replacement(chunk):
        return problem
    return pc.if_else(
        pc.match_substring(lines(), rules.REPLACEMENT), pa.scalar(rules.NOT_UTF8), problem
    )


_WELL_QUOTED = r'^(?:"(?:[^"]|"")*"|[^",]*)(?:,(?:"(?:[^"]|"")*"|[^",]*))*$'
"""A line whose quotes all enclose whole values or are doubled inside them."""


def _split_alike(chunk: bytes, fields: Fields, wanted: Sequence[int]) -> dict[int, pa.Array] | None:
    """The wanted values of lines of equal width and with no odd quotes; None if there are others.

    Cutting such lines is several times faster than `split`.
    """
    has_quotes = fields.quotes and b'"' in chunk
    if len(fields.separator) > 1:
        return None
    if has_quotes and not pc.all(pc.match_substring_regex(lines_of(chunk), _WELL_QUOTED)).as_py():
        return None
    names = [str(index) for index in range(fields.width)]
    try:
        table = pacsv.read_csv(
            pa.BufferReader(chunk),
            pacsv.ReadOptions(use_threads=False, block_size=len(chunk) + 1, column_names=names),
            pacsv.ParseOptions(delimiter=fields.separator, quote_char='"' if has_quotes else False),
            pacsv.ConvertOptions(
                check_utf8=False,
                column_types=dict.fromkeys(names, pa.string()),
                include_columns=[names[index] for index in wanted],
            ),
        )
    except pa.ArrowInvalid:
        return None
    return {index: table[names[index]].combine_chunks() for index in wanted}


def split(lines: pa.Array, fields: Fields) -> tuple[dict[int, pa.Array], pa.Array]:
    """The values of each line by their place, null where the line has not `width` of them or a
    quote is left open, as where a value goes on in the next line; and the problem of these."""
    cut = pc.split_pattern(lines, fields.separator)
    usable = pc.equal(pc.list_value_length(cut), fields.width).to_numpy(zero_copy_only=False)
    starts = cut.offsets.to_numpy()[:-1]
    columns = {
        index: cut.values.take(pa.array(starts + index, mask=~usable))
        for index in range(fields.width)
    }
    if fields.quotes:
        quoted = pc.match_substring(lines, '"')
        if pc.any(quoted).as_py():
            rows = [_unquoted(line, fields.width) for line in lines.filter(quoted).to_pylist()]
            places = quoted.to_numpy(zero_copy_only=False)
            usable[places] = [row is not None for row in rows]
            for index in columns:
                found = pa.array([row and row[index] for row in rows], pa.string())
                columns[index] = pc.replace_with_mask(columns[index], quoted, found)
    problem = pc.if_else(pa.array(usable), pa.scalar(None, pa.string()), rules.WRONG_WIDTH)
    return columns, problem


_FIELD = re.compile(r'(?:"((?:[^"]|"")*)"[ \t]*|([^,]*)),')


def _unquoted(line: str, width: int) -> list[str] | None:
    """The values of a line with quotes; None if they are not `width` or a quote is left open."""
    if line.count('"') % 2:
        return None
    found = _FIELD.findall(line + ",")
    if len(found) != width:
        return None
    return [quoted.replace('""', '"') or plain for quoted, plain in found]


# --- Netflix Prize --------------------------------------------------------------------------

_MOVIE = re.compile(r"\s*([^,:\s]+):\s*", re.ASCII)


def _netflix_parts(found: Sequence[File], path: str, first: str) -> Iterator[Part]:
    if not _MOVIE.fullmatch(first):
        raise InputError(
            f"--input {path}: is no Netflix Prize file; its first line should be a movie, as 123:"
        )

    def parts() -> Iterator[Part]:
        for file in found:
            movie = ""
            for chunk in files.chunks(file):
                yield _NetflixPart(chunk, movie)
                movie = _last_movie(chunk) or movie

    return parts()


def _last_movie(chunk: bytes) -> str | None:
    """The movie of the last movie line, if there is one."""
    end = len(chunk)
    while (colon := chunk.rfind(b":", 0, end)) >= 0:
        start = chunk.rfind(b"\n", 0, colon) + 1
        found = _MOVIE.fullmatch(chunk[start : chunk.index(b"\n", colon)].decode())
        if found:
            return found[1]
        end = start
    return None


@dataclass(frozen=True)
class _NetflixPart:
    """Lines of a file of the Netflix Prize, and the movie that the lines above them ended with."""

    chunk: bytes
    movie: str

    def __call__(self) -> Rows:
        lines = pc.utf8_trim_whitespace(lines_of(self.chunk))
        is_movie = pc.match_substring_regex(lines, r"^[^,:\s]+:$")
        movies = pc.if_else(is_movie, pc.utf8_rtrim(lines, ":"), pa.scalar(None, pa.string()))
        movies = pc.fill_null(pc.fill_null_forward(movies), self.movie)
        kept = pc.and_not(pc.not_equal(lines, ""), is_movie)
        lines, movies = lines.filter(kept), movies.filter(kept)
        columns, problem = split(lines, Fields(",", 3, quotes=False))
        no_movie = pc.and_(pc.equal(movies, ""), problem.is_null())
        problem = pc.if_else(no_movie, pa.scalar(rules.NO_MOVIE), problem)
        raw = pc.binary_join_element_wise(movies, lines, ":")
        problem = _or_not_utf8(problem, self.chunk, lambda: raw)
        named = {
            "user_id": columns[0],
            "item_id": movies,
            "rating": columns[1],
            "rated_at": columns[2],
        }
        return Rows(pa.table({**named, "earlier": problem}), raw.take)


# --- tables ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class TableSource:
    """A table still to be read.

    Attributes
    ----------
    schema
        Its columns, with the types of their values (`values.plain_type`).
    batches
        Reads the columns of these indices.
    """

    schema: pa.Schema
    batches: Callable[[Sequence[int]], Iterator[pa.RecordBatch]]

    def pieces(self, columns: Sequence[int]) -> Iterator[list[pa.RecordBatch]]:
        """Batches of these columns and of one schema, about `BATCH_ROWS` rows at a time."""
        piece: list[pa.RecordBatch] = []
        for batch in self.batches(columns):
            if piece and batch.schema != piece[0].schema:
                yield piece
                piece = []
            for start in range(0, batch.num_rows, BATCH_ROWS):
                piece.append(batch.slice(start, BATCH_ROWS))
                if sum(each.num_rows for each in piece) >= BATCH_ROWS // 2:
                    yield piece
                    piece = []
        if piece:
            yield piece


def given_table(source: Any) -> TableSource:
    """A table in memory. Raises InputError unless Arrow can take it."""
    try:
        if hasattr(source, "__arrow_c_stream__"):
            reader = pa.RecordBatchReader.from_stream(source)
        else:
            reader = pa.table(source).to_reader()
    except (pa.ArrowException, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"--input {rules.GIVEN_TABLE}: cannot be read ({reason}); "
            "give an Arrow or pandas table of text, numbers and times"
        ) from error
    return TableSource(
        _plain_schema(reader.schema),
        lambda columns: (batch.select(list(columns)) for batch in reader),
    )


def open_table(path: str, format: str) -> TableSource:
    """Parquet files or a Delta table."""
    return _delta(path) if format == "delta" else _parquet(path)


def _delta(path: str) -> TableSource:
    rules.check_exists(path)
    if not is_remote(path) and not is_delta(Path(path)):
        raise files.unreadable(path, "delta")
    require_path_for_delta_rs("--input", path)
    handle = DeltaTable(path if is_remote(path) else str(Path(path).absolute()))
    schema = pa.schema(handle.schema().to_arrow())

    def batches(columns: Sequence[int]) -> Iterator[pa.RecordBatch]:
        names = [schema.field(index).name.replace('"', '""') for index in columns]
        listed = ", ".join(f'"{name}"' for name in names)
        found = QueryBuilder().register("given", handle).execute(f"SELECT {listed} FROM given")
        yield from pa.RecordBatchReader.from_stream(found)

    return TableSource(_plain_schema(schema), batches)


def _parquet(path: str) -> TableSource:
    found = files.find(path)
    if not found:
        raise files.unreadable(path, "parquet")
    if not is_remote(path) and is_delta(Path(path)):
        raise InputError(f"--input {path}: is a Delta table; read it with --format delta")
    folders = {name.lower(): name for file in found for name in file.partition}
    in_files = pq.read_schema(found[0].system.open_input_file(found[0].path))
    fields = [field for field in in_files if field.name.lower() not in folders]
    if len({field.name.lower() for field in in_files}) < len(in_files):
        raise InputError(
            f"--input {path}: has columns whose names differ only in case; rename all but one"
        )
    schema = _plain_schema(
        pa.schema([*fields, *[pa.field(name, pa.string()) for name in folders.values()]])
    )

    def batches(columns: Sequence[int]) -> Iterator[pa.RecordBatch]:
        wanted = [schema.field(index) for index in columns]
        for file in found:
            yield from _parquet_batches(file, wanted, path)

    return TableSource(schema, batches)


def _parquet_batches(file: File, wanted: Sequence[pa.Field], path: str) -> Iterator[pa.RecordBatch]:
    """The wanted columns of a file, null where it has none."""
    opened = pq.ParquetFile(file.system.open_input_file(file.path))
    own = {field.name.lower(): field for field in opened.schema_arrow}
    given = {name.lower(): value for name, value in file.partition.items()}
    read = {}
    for field in wanted:
        name = field.name.lower()
        if name in own and name not in given:
            if _family(own[name].type) != _family(field.type):
                raise InputError(
                    f"--input {path}: its files hold a column in different types; "
                    "write them alike or read them one by one"
                )
            read[name] = own[name].name
    for batch in opened.iter_batches(BATCH_ROWS, columns=list(read.values())):
        columns = [
            batch.column(read[field.name.lower()])
            if field.name.lower() in read
            else pa.repeat(pa.scalar(given.get(field.name.lower()), field.type), batch.num_rows)
            for field in wanted
        ]
        yield pa.RecordBatch.from_arrays(columns, [field.name for field in wanted])


def _family(kind: pa.DataType) -> str:
    """Files may hold a column in different types of one family."""
    kind = values.plain_type(kind)
    if values.is_text(kind):
        return "text"
    for name in ("integer", "floating", "decimal", "timestamp", "date"):
        if getattr(pa.types, f"is_{name}")(kind):
            return name
    return str(kind)


def _plain_schema(schema: pa.Schema) -> pa.Schema:
    return pa.schema([pa.field(field.name, values.plain_type(field.type)) for field in schema])


def _from_table(table: TableSource, source: str, columns: Mapping[str, str]) -> Input:
    names = table.schema.names
    where = locate(names, columns, source)
    kinds = {part: table.schema.field(index).type for part, index in where.items()}
    values.require_rating(kinds["rating"], names[where["rating"]], source)
    if "rated_at" in kinds:
        values.require_time(kinds["rated_at"], names[where["rated_at"]], source)
    for part in IDS:
        values.require_id(kinds[part], names[where[part]], source)
    pieces = table.pieces(list(where.values()))
    parts = (_RatingsPart(piece, tuple(where)) for piece in pieces)
    return Input(source, parts, text_ids=False)


@dataclass(frozen=True)
class _RatingsPart:
    """Batches whose columns play these parts, in their order."""

    batches: Sequence[pa.RecordBatch]
    names: Sequence[str]

    def __call__(self) -> Rows:
        given = joined(self.batches, self.names)
        columns: dict[str, pa.Array] = {}
        for part in IDS:
            columns[part], inexact = values.as_id(given[part])
            if inexact is not None:
                columns[f"{part} is inexact"] = inexact
        columns["rating"] = values.as_rating(given["rating"])
        if "rated_at" in given:
            columns["rated_at"] = values.as_time(given["rated_at"])
        shown = {part: given.get(part) for part in rules.COLUMNS}
        return Rows(pa.table(columns), lambda places: as_json(shown, places))


def joined(batches: Sequence[pa.RecordBatch], names: Sequence[str]) -> dict[str, pa.Array]:
    """The columns of batches by name, in plain types."""
    return {
        name: pa.concat_arrays([values.plain(batch.column(index)) for batch in batches])
        for index, name in enumerate(names)
    }


def as_json(
    columns: Mapping[str, pa.Array | None], places: pa.Array, keep_nulls: bool = True
) -> pa.Array:
    """The rows at these places as JSON; None: a column that is null throughout."""
    taken = {
        name: [None] * len(places) if column is None else column.take(places).to_pylist()
        for name, column in columns.items()
    }
    rows = (zip(taken, row, strict=True) for row in zip(*taken.values(), strict=True))
    kept = ({name: value for name, value in row if keep_nulls or value is not None} for row in rows)
    return pa.array([_json(row) for row in kept], pa.string())


def _json(row: Mapping[str, Any]) -> str:
    finite = {
        name: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in row.items()
    }
    return json.dumps(finite, ensure_ascii=False, separators=(",", ":"), default=_jsonable)


def _jsonable(value: Any) -> Any:
    if isinstance(value, datetime):
        text = value.replace(tzinfo=None).isoformat(timespec="milliseconds")
        return f"{text}Z" if value.tzinfo else text
    if isinstance(value, date):
        return value.isoformat()
    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    return str(value)
