"""Which ratings a deletion request covers.

A tombstone has a scope: `user` (all ratings of a user), `item` (all of an item), `rating` (one
pair, as it was rated up to the request) or `window` (a user's ratings with
`from_ts <= rated_at < to_ts`, up to the request). `reinstate` lifts the earlier user or item
tombstones of an id.

A request is pending until a model version has a receipt for it. Whether it is pending matters only
after a reinstatement:

=======  ========================================================================
request  a user or item tombstone that was lifted since
=======  ========================================================================
pending  still covers what was rated up to its `requested_at`: that was to be forgotten
done     covers nothing: what comes in again is welcome
=======  ========================================================================

Ingestion asks what may be stored; it treats every lifted tombstone as done (`guard`).

A rating whose time is unknown counts as older than every request, and is in no window.

This module turns requests into rules; an engine finds the ratings that the rules cover.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pyarrow as pa

from unlearn_spark.tables import receipts, tombstones
from unlearn_spark.tables.relational import query
from unlearn_spark.tables.store import TIMESTAMP
from unlearn_spark.tables.tombstones import SPEC

if TYPE_CHECKING:
    from unlearn_spark.tables.store import Store

SCOPES = ("user", "item", "rating", "window", "reinstate")

LIFT = "reinstate"
"""The scope that deletes nothing and lifts earlier requests."""

EFFECTIVE = pa.schema(
    [*SPEC.schema, pa.field("reinstated_at", TIMESTAMP), pa.field("pending", pa.bool_())]
)
"""Columns of `effective`."""


def asked(store: Store, tombstones_version: int, receipts_version: int | None) -> pa.Table:
    """The requests (`effective`) at a version of the tombstones; those without a receipt at
    `receipts_version` (None: there are no receipts) are pending."""
    done = None if receipts_version is None else receipts.read(store, receipts_version)
    return effective(tombstones.read(store, tombstones_version), done)


def rules_of(
    store: Store, tombstones_version: int | None, receipts_version: int | None
) -> pa.Table | None:
    """The `rules` that say what may not be learnt; None: there are none.

    Parameters
    ----------
    tombstones_version
        As from `tombstones.version`; None: there are no requests.
    receipts_version
        Delta version of the receipts that the published model names; None: there are none. A
        request without a receipt covers what it names even if it was lifted since.
    """
    if tombstones_version is None:
        return None
    found = rules(asked(store, tombstones_version, receipts_version), guard=False)
    return found if found.num_rows else None


def effective(every: pa.Table, done: pa.Table | None = None) -> pa.Table:
    """The deletion requests among the tombstones, with two more columns.

    `reinstated_at` (timestamp) is the first reinstatement of the request's user or item that is
    later than the request; null while the request is in force, and always for `rating` and
    `window`. A reinstatement at the very time of the request does not lift it. `pending` (boolean)
    says whether the request has no receipt.

    Parameters
    ----------
    every
        The whole tombstones table: a part of it does not show which requests were lifted.
    done
        Receipts, with `request_id`; None: there are none.
    """
    if done is None:
        done = pa.table({"request_id": pa.array([], pa.string())})
    found = query(
        """
        WITH lifts AS (
            SELECT 'user' AS scope, user_id AS id, requested_at AS moment
            FROM tombstones WHERE scope = 'reinstate' AND user_id IS NOT NULL
            UNION ALL
            SELECT 'item', item_id, requested_at
            FROM tombstones WHERE scope = 'reinstate' AND item_id IS NOT NULL
        ), requests AS (
            SELECT row_number() OVER () AS place, * FROM tombstones WHERE scope <> 'reinstate'
        ), lifted AS (
            SELECT place, min(moment) AS reinstated_at
            FROM requests JOIN lifts ON lifts.scope = requests.scope AND moment > requested_at
            AND lifts.id = CASE requests.scope WHEN 'user' THEN user_id ELSE item_id END
            GROUP BY place
        )
        SELECT requests.* EXCLUDE (place), reinstated_at,
            request_id NOT IN (SELECT request_id FROM done WHERE request_id IS NOT NULL) AS pending
        FROM requests LEFT JOIN lifted USING (place) ORDER BY place
        """,
        tombstones=every.select(SPEC.schema.names),
        done=done.select(["request_id"]),
    )
    return found.cast(EFFECTIVE)


def rules(requests: pa.Table, guard: bool) -> pa.Table:
    """Every request in one form, looked up by its user or its item.

    A rule covers a rating of that id if all its non-null fields hold: the item matches, the time is
    in [from, to), and it is not after `until`.

    Parameters
    ----------
    requests
        Rows of `effective`.
    guard
        True: find what may not be stored. False: find what must be removed or may not be learnt
        (see the module).

    Returns
    -------
    pa.Table
        by ("user" or "item"), id, request_id, item: strings; from, to, until: timestamps.
    """
    return query(
        """
        SELECT
            CASE scope WHEN 'item' THEN 'item' ELSE 'user' END AS by,
            CASE scope WHEN 'item' THEN item_id ELSE user_id END AS id,
            request_id,
            CASE WHEN scope = 'rating' THEN item_id END AS item,
            CASE WHEN scope = 'window' THEN from_ts END AS "from",
            CASE WHEN scope = 'window' THEN to_ts END AS "to",
            CASE WHEN NOT is_open_ended THEN requested_at END AS until
        FROM (
            SELECT *,
                scope IN ('user', 'item') AND reinstated_at IS NULL AS is_open_ended,
                scope IN ('user', 'item') AND reinstated_at IS NOT NULL
                    AND ($guard OR NOT pending) AS covers_nothing
            FROM requests
        ) WHERE NOT covers_nothing
        """,
        {"guard": guard},
        requests=requests,
    ).cast(RULES)


RULES = pa.schema(
    [
        *[pa.field(name, pa.string()) for name in ("by", "id", "request_id", "item")],
        *[pa.field(name, TIMESTAMP) for name in ("from", "to", "until")],
    ]
)
"""Columns of `rules`."""
