"""Ingest deletion requests: quarantine unusable ones, and add new ones to the tombstones."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from deltalake import DeltaTable

from unlearn_spark.embedded import files, formats, values
from unlearn_spark.embedded.files import explained
from unlearn_spark.embedded.formats import Fields, Input, Part, Rows, TableSource, TextPart
from unlearn_spark.errors import InputError, SettingsError
from unlearn_spark.ingestion import rules
from unlearn_spark.ingestion.rules import TombstoneReport
from unlearn_spark.preconditions import is_remote
from unlearn_spark.tables import quarantine, tombstones
from unlearn_spark.tables.delta_rs import DeltaRsStore
from unlearn_spark.tables.relational import query
from unlearn_spark.tables.requests import SCOPES
from unlearn_spark.tables.store import is_delta
from unlearn_spark.tables.tombstones import TEXTS, TIMES

_COLUMNS = TEXTS + TIMES


def ingest_requests(
    store: DeltaRsStore,
    source: Any,
    format: str | None,
    id_types: Mapping[str, pa.DataType] | None,
    threads: int,
) -> TombstoneReport:
    """Validate requests, drop repeated ones, and append the new ones.

    A request is known by its `request_id`: the same content again is a duplicate, other content is
    quarantined (the first one stands). A request without `requested_at` is made now.

    Parameters
    ----------
    source
        A path, or anything that gives an Arrow stream.
    id_types
        Types of user_id and item_id in the ratings table (`ratings.id_types`). A request whose id
        cannot occur in that table would delete nothing, and is quarantined. None: there is no
        table yet, so every id is accepted.

    Raises
    ------
    InputError
        The input cannot be read, is empty, or holds no usable request. Nothing is written.
    SettingsError
        `format` is None, and the input does not show its format.
    ConflictError
        Another job wrote to one of the tables meanwhile.
    """
    found = _read(source, format)
    rows = list(formats.in_order(_rows, found.parts, threads))
    judged = _judged([part.columns for part in rows], id_types or {}) if rows else None
    if judged is None or not judged.num_rows:
        raise InputError(f"--input {found.source}: has no requests; give a file with some")
    problems = Counter(judged["problem"].drop_null().to_pylist())
    if problems.total() == judged.num_rows:
        raise InputError(
            f"--input {found.source}: none of its {judged.num_rows} requests is usable; "
            f"the most frequent reason: {rules.worst_of(problems)}"
        )
    store.create(tombstones.TABLE, tombstones.SPEC)
    sorted_out = _sorted_out(judged, tombstones.read(store))
    refused = sorted_out.filter(pc.is_valid(sorted_out["problem"]))
    if refused.num_rows:
        kept = refused.slice(0, quarantine.MOST_KEPT)
        held = {
            "raw": _raw(rows, kept["position"].to_numpy()),
            "reason": kept["problem"],
            "user_id": kept["user_id"],
            "item_id": kept["item_id"],
        }
        quarantine.add(store, found.source, pa.table(held))
    accepted = sorted_out.filter(pc.equal(sorted_out["fate"], "accepted"))
    if accepted.num_rows:
        version = tombstones.append(store, accepted.select(_COLUMNS))
    else:
        version = store.version(tombstones.TABLE)
    return TombstoneReport(
        read=judged.num_rows,
        accepted=accepted.num_rows,
        duplicates=judged.num_rows - refused.num_rows - accepted.num_rows,
        quarantined=refused.num_rows,
        version=version,
    )


def _rows(part: Part) -> Rows:
    return part()


def _raw(rows: Sequence[Rows], places: np.ndarray) -> pa.ChunkedArray:
    """The text of the rows at ascending places of the whole input."""
    starts = np.cumsum([0, *[part.columns.num_rows for part in rows]])
    cuts = np.searchsorted(places, starts)
    return pa.chunked_array(
        [
            part.raw(pa.array(places[first:last] - start))
            for part, start, first, last in zip(rows, starts, cuts, cuts[1:], strict=False)
        ],
        pa.string(),
    )


# --- reading --------------------------------------------------------------------------------


def _read(source: Any, format: str | None) -> Input:
    if not isinstance(source, str):
        given = formats.given_table(source)
        return Input(rules.GIVEN_TABLE, _table_parts(given, rules.GIVEN_TABLE), text_ids=False)
    rules.check_exists(source)
    if format is None:
        is_table = DeltaTable.is_deltatable(source) if is_remote(source) else _is_delta(source)
        format = rules.format_of_requests(source, is_table)
    with explained(source, format):
        if format in ("parquet", "delta"):
            parts = _table_parts(formats.open_table(source, format), source)
        elif format in ("csv", "jsonl"):
            parts = _text_parts(source, format)
        else:
            raise SettingsError(
                f"--format {format}: expected one of {', '.join(rules.REQUEST_FORMATS)}"
            )
    return Input(source, formats.explaining(parts, source, format), text_ids=False)


def _is_delta(path: str) -> bool:
    return is_delta(Path(path))


def _text_parts(path: str, format: str) -> Iterator[Part]:
    found = files.find(path)
    first = formats.first_line(found, path)
    if format == "jsonl":
        return (_JsonPart(chunk) for chunk in formats.text_chunks(found, path, header=None))
    names = rules.header_names(path, first)
    fields, where = Fields(",", len(names), quotes=True), _locate(names, path)
    return (TextPart(chunk, fields, where) for chunk in formats.text_chunks(found, path, first))


def _locate(names: list[str], path: str) -> dict[str, int]:
    wanted = {name: name for name in _COLUMNS}
    optional = [name for name in _COLUMNS if name not in ("request_id", "scope")]
    return rules.locate(names, wanted, optional, path, f"requests have {', '.join(_COLUMNS)}")


@dataclass(frozen=True)
class _JsonPart:
    """Lines, each a JSON object."""

    chunk: bytes

    def __call__(self) -> Rows:
        lines = formats.lines_of(self.chunk)
        found = [_from_json(line) for line in lines.to_pylist()]
        columns = {
            name: pa.array([texts.get(name) for texts, _ in found], pa.string())
            for name in _COLUMNS
        }
        columns["earlier"] = pa.array([problem for _, problem in found], pa.string())
        return Rows(pa.table(columns), lines.take)


class _Inexact(str):
    """A JSON number with a fraction or an exponent, as it is written."""


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON")


def _from_json(line: str) -> tuple[dict[str, str], str | None]:
    """The texts of a request's fields, and the line's problem. The number 42.0 is an integer; the
    text "42.0" is none."""
    if rules.REPLACEMENT in line:
        return {}, rules.NOT_UTF8
    try:
        found = json.loads(line, parse_float=_Inexact, parse_constant=_no_number)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        return {}, "is not a JSON object"
    texts: dict[str, str] = {}
    problem = None
    for name in _COLUMNS:
        value = found.get(name)
        wrong = None
        if isinstance(value, (list, dict, bool)):
            wrong = f"{name} is a list, an object, true or false"
        elif (isinstance(value, int) and abs(value) >= 2**63) or isinstance(value, _Inexact):
            texts[name] = str(value)
            if name not in TIMES:
                whole = float(value)
                if whole.is_integer() and abs(whole) <= values.EXACT_DOUBLE:
                    texts[name] = str(int(whole))
                else:
                    wrong = rules.INEXACT_ID.format(column=name)
        elif value is not None:
            texts[name] = str(value).encode(errors="surrogatepass").decode(errors="replace")
            if rules.REPLACEMENT in texts[name]:
                wrong = rules.NOT_UTF8
        if wrong:
            texts.pop(name, None)
            problem = problem or wrong
    return texts, problem


def _table_parts(table: TableSource, path: str) -> Iterator[Part]:
    names = table.schema.names
    where = _locate(names, path)
    for name, index in where.items():
        kind = table.schema.field(index).type
        if name in TIMES:
            values.require_time(kind, name, path)
        else:
            values.require_id(kind, name, path)
    pieces = table.pieces(list(where.values()))
    return (_RequestsPart(piece, tuple(where)) for piece in pieces)


@dataclass(frozen=True)
class _RequestsPart:
    """Batches whose columns are these of a request, in their order."""

    batches: Sequence[pa.RecordBatch]
    names: Sequence[str]

    def __call__(self) -> Rows:
        given = formats.joined(self.batches, self.names)
        columns: dict[str, pa.Array] = {}
        for name in self.names:
            if name in TIMES:
                columns[name] = values.as_time(given[name])
            else:
                ids, inexact = values.as_id(given[name])
                columns[name] = ids.cast(pa.string())
                if inexact is not None:
                    columns[f"{name} is inexact"] = inexact
        return Rows(
            pa.table(columns), lambda places: formats.as_json(given, places, keep_nulls=False)
        )


# --- judging --------------------------------------------------------------------------------


def _judged(parts: Sequence[pa.Table], id_types: Mapping[str, pa.DataType]) -> pa.Table:
    """The columns of a request (times as timestamps), position (int64), problem (string)."""
    given = pa.concat_tables(parts)
    kinds = {name: given.schema.field(name).type for name in given.column_names}
    texts = [name for name in _COLUMNS if name in kinds and values.is_text(kinds[name])]
    unusual = {
        name for name in texts if any(values.is_unusual(chunk) for chunk in given[name].chunks)
    }
    first = []
    for name in _COLUMNS:
        if name not in kinds:
            first.append(f"CAST(NULL AS {'BIGINT' if name in TIMES else 'VARCHAR'}) AS {name}")
        else:
            text = values.trimmed(name, name in unusual) if name in texts else name
            first.append(f"{f'lower({text})' if name == 'scope' else text} AS {name}")
    times, problems = [], ["earlier"] if "earlier" in kinds else []
    for name in _COLUMNS if "earlier" not in kinds else ():
        if f"{name} is inexact" in kinds:
            reason = rules.INEXACT_ID.format(column=name)
            problems.append(f"CASE WHEN \"{name} is inexact\" THEN '{reason}' END")
        elif name in unusual:
            problems.append(values.text_problem(name))
    problems += _content_problems()
    for name in TIMES:
        time, problem = values.time_of(name, kinds.get(name, values.MICROSECONDS))
        # `time_of` words its problems for rated_at.
        problem = problem.replace("rated_at", name)
        times.append(f"{time} AS {name}_us, {problem} AS {name}_problem")
        problems.append(f"{name}_problem")
    problems += [_needed_in("from_ts", "window"), _needed_in("to_ts", "window")]
    problems.append("CASE WHEN from_ts_us >= to_ts_us THEN 'from_ts is not before to_ts' END")
    for name, kind in id_types.items():
        if kind == pa.int64():
            reason = rules.FOREIGN_ID.format(column=name)
            problems.append(
                f"CASE WHEN {name} IS NOT NULL AND ({values.integer(name)}) IS NULL "
                f"THEN '{reason}' END"
            )
    others = [f'"{name}"' for name in kinds if name not in _COLUMNS]
    moments = [f"make_timestamptz({name}_us) AS {name}" for name in TIMES]
    return query(
        f"""
        SELECT {", ".join([*TEXTS, *moments])}, position, coalesce({", ".join(problems)}) AS problem
        FROM (
            SELECT *, {", ".join(times)}
            FROM (SELECT {", ".join([*first, *others])}, position FROM given)
        )
        ORDER BY position
        """,
        given=given.append_column("position", pa.array(np.arange(given.num_rows))),
    )


def _content_problems() -> list[str]:
    """What is wrong with a request whose columns could be read."""

    def unless_in(column: str, *scopes: str) -> str:
        # Without these checks a request would delete more than its other columns say.
        return (
            f"CASE WHEN {column} IS NOT NULL AND scope NOT IN {_listed(scopes)} "
            f"THEN '{column} does not belong to this scope' END"
        )

    return [
        "CASE WHEN request_id IS NULL THEN 'request_id is missing' END",
        "CASE WHEN scope IS NULL THEN 'scope is missing' END",
        f"CASE WHEN scope NOT IN {_listed(SCOPES)} THEN 'scope is none of {', '.join(SCOPES)}' END",
        _needed_in("user_id", "user", "rating", "window"),
        _needed_in("item_id", "item", "rating"),
        "CASE WHEN scope = 'reinstate' AND user_id IS NULL AND item_id IS NULL "
        "THEN 'reinstate needs user_id or item_id' END",
        unless_in("user_id", "user", "rating", "window", "reinstate"),
        unless_in("item_id", "item", "rating", "reinstate"),
        unless_in("from_ts", "window"),
        unless_in("to_ts", "window"),
    ]


def _needed_in(column: str, *scopes: str) -> str:
    return (
        f"CASE WHEN {column} IS NULL AND scope IN {_listed(scopes)} "
        f"THEN '{column} is missing for this scope' END"
    )


def _listed(words: Sequence[str]) -> str:
    quoted = [f"'{word}'" for word in words]
    return f"({', '.join(quoted)})"


def _sorted_out(judged: pa.Table, known: pa.Table) -> pa.Table:
    """The rows with `fate` (accepted, duplicate; null: refused); a conflict becomes a problem."""
    content = ("scope", "user_id", "item_id", "from_ts", "to_ts")

    def same(other: str) -> str:
        """Do two requests have the same content? A missing requested_at equals any."""
        tests = [f"mine.{name} IS NOT DISTINCT FROM {other}.{name}" for name in content]
        tests.append(f"coalesce(mine.requested_at = {other}.requested_at, true)")
        return " AND ".join(tests)

    return query(
        f"""
        WITH ranked AS (
            SELECT *, problem IS NULL AS is_good, row_number() OVER one_request AS rank,
                first(position) OVER one_request AS first_position
            FROM judged
            WINDOW one_request AS (
                PARTITION BY request_id, problem IS NULL ORDER BY position
            )
        ), fated AS (
            SELECT mine.*, CASE
                WHEN NOT mine.is_good THEN NULL
                WHEN theirs.request_id IS NOT NULL AND {same("theirs")} THEN 'duplicate'
                WHEN theirs.request_id IS NOT NULL THEN 'conflict'
                WHEN mine.rank = 1 THEN 'accepted'
                WHEN {same("earliest")} THEN 'duplicate'
                ELSE 'conflict' END AS fate
            FROM ranked AS mine
            LEFT JOIN known AS theirs ON mine.is_good AND mine.request_id = theirs.request_id
            LEFT JOIN judged AS earliest ON mine.first_position = earliest.position
        )
        SELECT {", ".join(_COLUMNS)}, position, nullif(fate, 'conflict') AS fate,
            CASE WHEN fate = 'conflict' THEN '{rules.CONFLICT}' ELSE problem END AS problem
        FROM fated ORDER BY position
        """,
        judged=judged,
        known=known,
    )
