"""Ingest ratings: quarantine unusable rows, and write the newest rating of each pair."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from unlearn_spark.embedded import formats, values
from unlearn_spark.embedded.formats import IDS, Input, Part
from unlearn_spark.embedded.ids import as_text, typed_ids
from unlearn_spark.embedded.ratings import covered, delete, id_types, without
from unlearn_spark.embedded.upsert import upsert
from unlearn_spark.errors import InputError
from unlearn_spark.ingestion import rules
from unlearn_spark.ingestion.rules import IngestReport
from unlearn_spark.tables import quarantine, ratings, requests, tombstones
from unlearn_spark.tables.delta_rs import DeltaRsStore
from unlearn_spark.tables.relational import query
from unlearn_spark.tables.store import TIMESTAMP, persistently

Types = Mapping[str, pa.DataType]


def ingest_ratings(
    store: DeltaRsStore, source: Any, format: str, columns: Mapping[str, str], threads: int
) -> IngestReport:
    """Validate, quarantine and upsert the ratings of one input (`formats.read_ratings`).

    The newest rating of a pair wins, by `rated_at` (an unknown time is the oldest), then by its
    place: a later line, a later ingest. The same input twice changes nothing. Of rows that an
    accepted tombstone covers, the quarantine keeps the reason and no content.

    The quarantine is committed first, then the ratings. A job that dies in between has written no
    rating, and running it again repeats neither.

    Raises
    ------
    InputError
        The input cannot be read, has no rows, or not one is usable. Nothing is written.
    SettingsError
        `format` or `columns` is unusable.
    ConflictError
        Another job wrote ratings meanwhile; no rating is written.
    """
    found = formats.read_ratings(source, format, columns)
    types = id_types(store)
    rows = read(found, types, threads)
    if rows.read == 0:
        raise InputError(f"--input {found.source}: has no ratings; give a file with some")
    if rows.usable.num_rows == 0:
        raise InputError(
            f"--input {found.source}: none of its {rows.read} rows is usable; "
            f"the most frequent reason: {rules.worst_of(rows.problems)}"
        )
    asked = tombstones.version(store)
    good, refused = _guarded(store, rows.usable)
    if rows.problems:
        quarantine.add(store, found.source, rows.refused)
    if refused.num_rows:
        quarantine.add(store, found.source, refused)
    written, version = upsert(store, good)
    if version is not None and written and tombstones.version(store) != asked:
        version = _delete_covered(store, version, threads)
    return IngestReport(
        read=rows.read,
        written=written,
        superseded=good.num_rows - written,
        quarantined=rows.read - good.num_rows,
        version=version,
    )


def _guarded(store: DeltaRsStore, good: pa.Table) -> tuple[pa.Table, pa.Table]:
    """The rows that no tombstone covers; and of the others the reason, for the quarantine."""
    nothing = pa.nulls(0, pa.string())
    if not tombstones.exists(store):
        return good, _refused(nothing, nothing, nothing, nothing)
    asked = requests.effective(tombstones.read(store))
    hits = covered(good, requests.rules(asked, guard=True))
    places, first = np.unique(hits["place"].to_numpy(), return_index=True)
    by = hits["request_id"].combine_chunks().take(pa.array(first))
    unknown = pa.nulls(len(places), pa.string())
    reasons = pc.binary_join_element_wise(rules.REFUSED, by, "")
    return without(good, pa.chunked_array([places])), _refused(unknown, reasons, unknown, unknown)


def _delete_covered(store: DeltaRsStore, version: int, threads: int) -> int:
    """Delete what `version` brought in and a request covers that was accepted meanwhile: its night
    may have ended before these rows came. Returns the version afterwards.

    Raises
    ------
    ConflictError
        Other jobs wrote ratings whenever this one tried.
    """
    mine = f"ingest_id = {ratings.ingest_of(version)}"

    def attempt() -> int:
        newest = store.version(ratings.TABLE)
        rows = store.read(ratings.TABLE, newest, [*IDS, "rated_at"], mine)
        asked = requests.effective(tombstones.read(store))
        hits = covered(rows, requests.rules(asked, guard=True))
        places = pa.array(np.unique(hits["place"].to_numpy()))
        return delete(store, rows.take(places).select(IDS), newest, threads)

    return persistently(attempt)


def _refused(raw: pa.Array, reason: pa.Array, user_id: pa.Array, item_id: pa.Array) -> pa.Table:
    return pa.table({"raw": raw, "reason": reason, "user_id": user_id, "item_id": item_id})


# --- judging --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Judged:
    """A part's usable rows (user_id, item_id, rating, rated_at; ids int64 where all are integers),
    and its refused rows, as `quarantine.add` takes them."""

    usable: pa.Table
    refused: pa.Table


@dataclass(frozen=True)
class Read:
    """All rows of an input; `problems` counts the refused, of which `refused` has not more than
    the quarantine keeps."""

    usable: pa.Table
    refused: pa.Table
    problems: Counter[str] = field(default_factory=Counter)

    @property
    def read(self) -> int:
        return int(self.usable.num_rows + self.problems.total())


def read(found: Input, types: Types | None, threads: int) -> Read:
    """Read and judge an input. `types`: those of the table's ids; None: there is no table yet."""
    usable: list[pa.Table] = []
    refused: list[pa.Table] = []
    problems: Counter[str] = Counter()
    judge = partial(_judged, types=types, text_ids=found.text_ids)
    with_ids: dict[str, set[pa.DataType]] = {name: set() for name in IDS}
    for part in formats.in_order(judge, found.parts, threads):
        if part.usable.num_rows:
            usable.append(part.usable)
            for name in IDS:
                with_ids[name].add(part.usable.schema.field(name).type)
        kept = quarantine.MOST_KEPT - problems.total()
        for reason in pc.value_counts(part.refused["reason"].combine_chunks()).to_pylist():
            problems[reason["values"]] += reason["counts"]
        if kept > 0 and part.refused.num_rows:
            refused.append(part.refused.slice(0, kept))
    if not usable:
        return Read(pa.table({}), pa.table({}), problems)
    # Text ids are integers only if every part has integers.
    kinds = {
        name: pa.int64() if found == {pa.int64()} else pa.string()
        for name, found in with_ids.items()
    }
    schema = usable[0].schema
    for name, kind in kinds.items():
        schema = schema.set(schema.get_field_index(name), pa.field(name, kind))
    held = pa.concat_tables(refused) if refused else pa.table({})
    for name, kind in kinds.items() if refused else ():
        typed = as_text(typed_ids(held[name], kind))
        held = held.set_column(held.schema.get_field_index(name), name, typed)
    return Read(pa.concat_tables([part.cast(schema) for part in usable]), held, problems)


def _judged(part: Part, types: Types | None, text_ids: bool) -> _Judged:
    rows = part()
    columns = rows.columns
    wanted = {
        name: types[name]
        if types is not None
        else None
        if text_ids
        else columns.schema.field(name).type
        for name in IDS
    }
    found = query(_sql(columns, wanted), given=columns)
    problem = found["problem"].combine_chunks()
    good = found
    refused = found.slice(0, 0)
    places = pa.array([], pa.int64())
    if problem.null_count < len(problem):
        good, refused = found.filter(problem.is_null()), found.filter(problem.is_valid())
        places = pa.array(np.flatnonzero(problem.is_valid().to_numpy(zero_copy_only=False)))
    usable = pa.table(
        {
            **{name: _ids(good, name) for name in IDS},
            "rating": good["rating"],
            "rated_at": good["rated_at"].cast(TIMESTAMP),
        }
    )
    raw = rows.raw(places) if len(places) else pa.nulls(0, pa.string())
    texts = [as_text(_ids(refused, name)) for name in IDS]
    return _Judged(usable, _refused(raw, refused["problem"], *texts))


def _ids(found: pa.Table, name: str) -> pa.ChunkedArray:
    """Ids as integers if all are, else as text."""
    text, number = found[f"{name} text"], found[f"{name} number"]
    if number.null_count == 0:
        return number
    return pc.coalesce(text, number.cast(pa.string())) if number.null_count < len(number) else text


def _sql(columns: pa.Table, wanted: Mapping[str, pa.DataType | None]) -> str:
    """Judge the rows of `given`: `X text` and `X number` of each id, rating float, rated_at (bigint
    microseconds), problem.

    `wanted`: types of ids; None: whatever they are.
    """
    kinds = {name: columns.schema.field(name).type for name in columns.column_names}
    texts = {part for part in rules.COLUMNS if part in kinds and values.is_text(kinds[part])}
    unusual = {
        part for part in texts if any(values.is_unusual(chunk) for chunk in columns[part].chunks)
    }
    first, second, problems = [], [], []
    for part in rules.COLUMNS:
        if part not in kinds:
            first.append(f"CAST(NULL AS BIGINT) AS {part}")
        elif part in texts:
            first.append(f"{values.trimmed(part, part in unusual)} AS {part}")
        else:
            first.append(part)
    others = [f'"{name}"' for name in kinds if name not in rules.COLUMNS]
    if "earlier" in kinds:
        problems.append("earlier")
    for name in IDS:
        if f"{name} is inexact" in kinds:
            reason = rules.INEXACT_ID.format(column=name)
            problems.append(f"CASE WHEN \"{name} is inexact\" THEN '{reason}' END")
        elif name in unusual and "earlier" not in kinds:
            problems.append(values.text_problem(name))
    for name in IDS:
        problems.append(f"CASE WHEN {name} IS NULL THEN '{name} is missing' END")
    rating = values.number("rating") if "rating" in texts else "rating"
    time, time_problem = values.time_of("rated_at", kinds.get("rated_at", values.MICROSECONDS))
    problems += [values.rating_problem("rating", "number", "rating" in texts), "time_problem"]
    for name in IDS:
        kind = wanted[name]
        if name not in texts:
            as_number = name if kind != pa.string() else "CAST(NULL AS BIGINT)"
            rest = f"CAST({name} AS VARCHAR)" if kind == pa.string() else "CAST(NULL AS VARCHAR)"
        elif kind == pa.string():
            as_number, rest = "CAST(NULL AS BIGINT)", name
        else:
            as_number, rest = values.integer(name), name
            if kind is not None:
                reason = rules.FOREIGN_ID.format(column=name)
                problems.append(f"CASE WHEN \"{name} number\" IS NULL THEN '{reason}' END")
        second.append(f'{as_number} AS "{name} number", {rest} AS "{name} rest"')
    shown = ", ".join(
        f'CASE WHEN "{name} number" IS NULL THEN "{name} rest" END AS "{name} text", '
        f'"{name} number"'
        for name in IDS
    )
    return f"""
        SELECT {shown}, TRY_CAST(number AS FLOAT) AS rating, time AS rated_at,
            coalesce({", ".join(problems)}) AS problem
        FROM (
            SELECT *, {", ".join(second)}, {rating} AS number, {time} AS time,
                {time_problem} AS time_problem
            FROM (SELECT {", ".join(first + others)} FROM given)
        )
        """
