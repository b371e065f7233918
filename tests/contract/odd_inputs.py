"""Inputs as other software writes them, as plain data: what writes each, and what becomes of it."""

from __future__ import annotations

import bz2
import datetime as dt
import gzip
import json
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet

from unlearn_spark.ingestion import rules

NBSP, TAB, WIDE = "\u00a0", "\t", "\u3000"
NEW_YEAR = 1609459200  # 2021-01-01, in seconds


@dataclass(frozen=True)
class Read:
    """What an input becomes: the (user, item) pairs that are read, as text, and the reasons of the
    other rows; both sorted."""

    pairs: list[tuple[str, str]]
    reasons: list[str]


def text(content, name="input", encoding="utf-8"):
    """Writes one text file."""

    def write(folder: Path) -> str:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        data = content.encode(encoding, "surrogateescape")
        packed = {".gz": gzip.compress, ".bz2": bz2.compress}.get(path.suffix, bytes)
        path.write_bytes(packed(data))
        return str(path)

    return write


def files(**written):
    """Writes several inputs into one folder, which is the input."""

    def write(folder: Path) -> str:
        for each in written.values():
            each(folder / "folder")
        return str(folder / "folder")

    return write


def parquet(name="input.parquet", **columns):
    """Writes one Parquet file."""

    def write(folder: Path) -> str:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(pa.table(columns), path)
        return str(path)

    return write


def matching(pattern, write):
    """Writes an input, and names it by a pattern in its folder."""

    def written(folder: Path) -> str:
        return str(Path(write(folder)).parent / pattern)

    return written


def raw_strings(*values):
    """A string column of any bytes."""
    return pa.Array.from_buffers(pa.string(), len(values), pa.array(values, pa.binary()).buffers())


def rated(*users, **others):
    n = len(users)
    return {"user_id": list(users), "item_id": list(range(n)), "rating": [3.0] * n, **others}


CSV = "user_id,item_id,rating\n"
INEXACT = rules.INEXACT_ID.format(column="user_id")
MISSING = "user_id is missing"

# name, format, what writes it, the (user, item) that are read, the reasons of the other rows
RATINGS = [
    ("white space in csv", "csv",
     text(f'{CSV}ann ,x,5\n{TAB}bob{NBSP},{WIDE}y, 4{TAB}\n" cat",z,3\n{NBSP},x,3\n'),
     [("ann", "x"), ("bob", "y"), ("cat", "z")], [MISSING]),
    ("white space in u.data", "movielens",
     text(f"ann \tx\t5\t1\n{NBSP}bob\ty\t 4\t1\n \tx\t3\t1\n"),
     [("ann", "x"), ("bob", "y")], [MISSING]),
    ("white space in ratings.dat", "movielens", text(f"ann ::x{TAB}::5::1\n{NBSP}::x::3::1\n"),
     [("ann", "x")], [MISSING]),
    ("white space in netflix", "netflix", text(f"7:\nann{NBSP},3,2005-01-01\n{TAB},3,2005-01-01\n"),
     [("ann", "7")], [MISSING]),
    ("white space in parquet", "parquet",
     parquet(user_id=["ann ", f"{TAB}bob{NBSP}", NBSP], item_id=["x", f"{WIDE}y", "z"],
             rating=[f" 5{NBSP}", "4", "3"], rated_at=[f"2020-01-01{NBSP}", " ", ""]),
     [("ann", "x"), ("bob", "y")], [MISSING]),
    ("blank lines", "csv", text(f"\n  \n{CSV}\nann,x,5\n   \n\nbob,y,4"),
     [("ann", "x"), ("bob", "y")], []),
    ("line ends of Windows and of old Macs", "csv",
     files(a=text(f"{CSV}ann,x,5\nbob,y,4\n".replace("\n", "\r\n"), "a.csv"),
           b=text(f"{CSV}cat,z,5\n".replace("\n", "\r"), "b.csv")),
     [("ann", "x"), ("bob", "y"), ("cat", "z")], []),
    ("quotes", "csv",
     text('"user_id","item_id","rating"\n"a,b","1","5"\n"say ""a""",2,5\n5"x5" disc,3,5\n"",4,5\n'
          '"a"b"",5,5\n"c,6,5\n'),
     [("a,b", "1"), ('say "a"', "2"), ('5"x5" disc', "3"), ('"a"b""', "5")],
     [MISSING, rules.WRONG_WIDTH]),
    ("a quoted value over two lines", "csv",
     text(f'{CSV}"x\ny",1,5\n"a,b",2,5\n'), [("a,b", "2")], [rules.WRONG_WIDTH] * 2),
    ("line breaks in parquet", "parquet",
     parquet(user_id=["x\ny", "x\ry", "x\n"], item_id=["1", "2", "3"], rating=[5, 5, 5]),
     [("x", "3")], [rules.LINE_BREAK] * 2),
    ("a null character", "csv", text(f"{CSV}a\0b,x,5\na,x,5\n"), [("a", "x"), ("a\0b", "x")], []),
    ("latin-1 in csv", "csv", text(f"{CSV}andré,x,5\nandrè,x,1\neve,x,2\n", encoding="latin-1"),
     [("eve", "x")], [rules.NOT_UTF8] * 2),
    ("latin-1 in ratings.dat", "movielens",
     text("andré::x::5::1\neve::x::2::1\n", encoding="latin-1"),
     [("eve", "x")], [rules.NOT_UTF8]),
    ("latin-1 in netflix", "netflix",
     text("7:\nandré,3,2005-01-01\neve,3,2005-01-01\né:\neve,3,2005-01-01\n", encoding="latin-1"),
     [("eve", "7")], [rules.NOT_UTF8] * 2),
    ("latin-1 in parquet", "parquet", parquet(**rated() | {
        "user_id": raw_strings(b"andr\xe9", b"andr\xe8", "andré".encode()),
        "item_id": ["x", "y", "z"], "rating": [1, 2, 3]}),
     [("andré", "z")], [rules.NOT_UTF8] * 2),
    ("marks of UTF-8", "csv",
     files(a=text(f"{CSV}ann,x,5\n", "a.csv", "utf-8-sig"),
           b=text(f"{CSV}bob,y,5\n", "b.csv", "utf-8-sig")),
     [("ann", "x"), ("bob", "y")], []),
    ("names of other case in csv", "csv", text("User_ID,ITEM_ID,Rating\nann,x,5\n"),
     [("ann", "x")], []),
    ("names of other case in parquet", "parquet",
     parquet(User_ID=["ann"], ITEM_ID=["x"], Rating=[5], RATED_AT=[1]), [("ann", "x")], []),
    ("doubles", "parquet", parquet(**rated(1.0, 2.5, None, float("nan"), 2.0**53, 2.0**53 + 2)),
     [(1, 0), (2**53, 4)], [INEXACT] * 2 + [MISSING] * 2),
    ("floats", "parquet", parquet(**rated() | {
        "user_id": pa.array([1.0, 2.0**24 + 2], pa.float32()),
        "item_id": [0, 1], "rating": [1, 2]}),
     [(1, 0)], [INEXACT]),
    ("decimals", "parquet", parquet(**rated() | {
        "user_id": pa.array(["1.00", "2.50", "9007199254740993.00"]).cast(pa.decimal128(38, 2)),
        "item_id": [0, 1, 2], "rating": pa.array(["1.5"] * 3).cast(pa.decimal128(3, 1))}),
     [(1, 0), (2**53 + 1, 2)], [INEXACT]),
    ("unsigned integers", "parquet", parquet(
        user_id=pa.array([1, 2**63 - 1, 2**63], pa.uint64()),
        item_id=pa.array([0, 2**32 - 1, 2], pa.uint32()), rating=pa.array([1, 2, 3], pa.uint8())),
     [(1, 0), (2**63 - 1, 2**32 - 1)], [INEXACT]),
    ("categories", "parquet", parquet(**rated() | {
        "user_id": pa.array(["ann", "bob ", None]).dictionary_encode(),
        "item_id": ["x", "y", "z"], "rating": [1, 2, 3]}),
     [("ann", "x"), ("bob", "y")], [MISSING]),
    ("files of other widths", "parquet", files(
        a=parquet("a.parquet", user_id=pa.array([1], pa.int32()), item_id=[1], rating=[1.0]),
        b=parquet("b.parquet", user_id=[2**40], item_id=pa.array([2], pa.int16()), rating=[1.0])),
     [(1, 1), (2**40, 2)], []),
    ("ids in names of folders", "parquet", files(
        a=parquet("item_id=007/a.parquet", user_id=[1], rating=[3.0]),
        b=parquet("item_id=7/a.parquet", user_id=[2], rating=[3.0])),
     [(1, "007"), (2, "7")], []),
    ("nanoseconds that nobody needs", "parquet",
     parquet(**rated(1, exported=pa.array([NEW_YEAR * 10**9], pa.timestamp("ns")))), [(1, 0)], []),
    *[
        (f"the name {name}", "csv", text(f"{CSV}ann,x,5\n", name), [("ann", "x")], [])
        for name in ("r[1] {2}.csv", "r*?.csv", "r\\.csv", "ü%20,r.csv", "f[1]/_f/r.csv",
                     "r.csv.gz", "r.csv.bz2")
    ],
    ("a pattern", "csv", matching("r[12]{.csv,.csv.gz}", files(
        a=text(f"{CSV}ann,x,5\n", "../r1.csv"), b=text(f"{CSV}bob,y,5\n", "../r2.csv.gz"),
        c=text(f"{CSV}cat,z,5\n", "../r3.csv"))),
     [("ann", "x"), ("bob", "y")], []),
    ("a folder of odd names", "parquet",
     files(a=parquet("p [2]{*}%20.parquet", **rated(1)), b=parquet("_hidden", **rated(2))),
     [(1, 0)], []),
]  # fmt: skip

# What Hadoop or Parquet's types deny to Spark, and the embedded engine reads.
EMBEDDED_RATINGS = [
    ("a colon", "csv", text(f"{CSV}ann,x,5\n", "10:30.csv"), [("ann", "x")], []),
    ("a colon in a folder", "parquet", files(a=parquet("10:30.parquet", **rated(1))),
     [(1, 0)], []),
    ("hidden, but named", "csv", text(f"{CSV}ann,x,5\n", "_r.csv"), [("ann", "x")], []),
    ("hidden parquet, but named", "parquet", parquet(".r.parquet", **rated(1)), [(1, 0)], []),
    ("files of other units", "parquet", files(
        a=parquet("a.parquet", **rated(1, rated_at=pa.array([0], pa.timestamp("ns")))),
        b=parquet("b.parquet", **rated(2, rated_at=pa.array([0], pa.timestamp("us"))))),
     [(1, 0), (2, 0)], []),
]  # fmt: skip

# name, format, what writes it, what the line has to say
REFUSED = [
    ("utf-16", "csv", text(f"{CSV}ann,x,5\n", encoding="utf-16"), "is no text in UTF-8"),
    ("two names in csv", "csv", text("user_id,User_ID,item_id,rating\na,b,x,1\n"),
     "has two columns User_ID and user_id; rename one"),
    ("two names in parquet", "parquet", parquet(**rated(1, User_ID=[2])),
     "columns whose names differ only in case; rename"),
    ("a list", "parquet", parquet(**rated([1])), "column user_id has type array<bigint>"),
    ("a time as an id", "parquet", parquet(**rated(dt.datetime(2020, 1, 1))),
     "column user_id has type timestamp"),
    ("true as a rating", "parquet", parquet(**rated(1) | {"rating": [True]}),
     "column rating has type boolean; ratings must be numbers"),
    ("true as a time", "parquet", parquet(**rated(1, rated_at=[True])),
     "column rated_at has type boolean; times must be timestamps, text or seconds"),
    ("files of other types", "parquet", files(
        a=parquet("a.parquet", **rated("1")), b=parquet("b.parquet", **rated(1))),
     "its files hold a column in different types"),
    ("files of other headers", "csv", files(
        a=text(f"{CSV}ann,x,5\n", "a.csv"), b=text("item_id,user_id,rating\nx,bob,5\n", "b.csv")),
     "its files have different headers; make them alike"),
    ("half a gz", "csv", lambda folder: cut(text(CSV + "ann,x,5\n" * 99, "r.csv.gz")(folder)),
     "cannot be read as csv; check --format and that the file is whole"),
    ("half a parquet", "parquet", lambda folder: cut(parquet(**rated(1))(folder)),
     "cannot be read as parquet; check --format and that the file is whole"),
    ("hidden in a folder", "csv", files(a=text(f"{CSV}ann,x,5\n", "_r.csv")),
     "files whose names begin with _ or ."),
    ("no such pattern", "csv", lambda folder: f"{folder}/r[1].csv", "no such file or folder"),
]  # fmt: skip


def cut(path: str) -> str:
    """Cut the second half off a file."""
    data = Path(path).read_bytes()
    Path(path).write_bytes(data[: len(data) // 2])
    return path


def lines_of(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def request(id, user, **others):
    return {"request_id": id, "scope": "user", "user_id": user, **others}


FOREIGN = rules.FOREIGN_ID.format(column="user_id")
NO_VALUE = "{} is a list, an object, true or false"

# name, what writes it, the user (or item) by request_id that is accepted, the other reasons.
# All are read where the ratings have integer ids.
REQUESTS = [
    ("csv", text(
        "Request_ID,scope,user_id,item_id\n"
        f" c1 ,user,43{NBSP},\nc2, USER{TAB}, 44{TAB},\nc3,item,,{WIDE}5\n"
        f"c4,user,42.0,\nc5,user,042,\nc6,user,+45,\nc7,user,abc,\nc8,user,{NBSP},\n"
        'c9,item,," 5.0"\nc10,user,4\udce9,\n',
        "re quests [1] ü%20.csv"),
     {"c1": "43", "c2": "44", "c3": "5"},
     [FOREIGN] * 4 + [FOREIGN.replace("user", "item"), "user_id is missing for this scope",
                      rules.NOT_UTF8]),
    ("jsonl", text(lines_of(
        request(1, 42), request(2.0, 42.0), request(f" j3{NBSP}", f"42{WIDE}"),
        request("j4", "42.0"), request("j5", 1.5), request("j6", 2**53 + 1), request("j7", 2**64),
        request("j8", [42]), request("j9", {"id": 42}), request("j10", True),
        request(["j11"], 42), request("j12", 42, requested_at=[1]), request("j13", None),
        request("j14", 42, requested_at=NEW_YEAR + 0.5)), "r.jsonl"),
     {"1": "42", "2": "42", "j3": "42", "j6": str(2**53 + 1), "j14": "42"},
     [FOREIGN, INEXACT, INEXACT] + [NO_VALUE.format("user_id")] * 3
     + [NO_VALUE.format("request_id"), NO_VALUE.format("requested_at"),
        "user_id is missing for this scope"]),
    ("doubles in parquet", parquet("r.parquet",
        request_id=["p1", "p2", "p3"], scope=["user", "item", "user"],
        user_id=[43.0, float("nan"), 1.5], item_id=[None, 6.0, None]),
     {"p1": "43", "p2": "6"}, [INEXACT]),
    ("text in parquet", parquet("r.parquet",
        request_id=[f"{TAB}q1", "q2", "q3"], scope=[f"User{NBSP}"] * 3,
        user_id=raw_strings(b"43 ", b"42.0", b"4\xff"), item_id=pa.nulls(3), from_ts=pa.nulls(3),
        requested_at=pa.array([NEW_YEAR * 10**9] * 3, pa.timestamp("ns", "UTC"))),
     {"q1": "43"}, [FOREIGN, rules.NOT_UTF8]),
]  # fmt: skip

REFUSED_REQUESTS = [
    ("booleans", parquet("r.parquet", request_id=["z"], scope=["user"], user_id=[True]),
     "column user_id has type boolean"),
    ("structs", parquet("r.parquet", request_id=["z"], scope=["user"], user_id=[{"a": 1}]),
     "column user_id has type struct<a:bigint>"),
    ("times that are none", parquet("r.parquet", request_id=["z"], scope=["user"], to_ts=[True]),
     "column to_ts has type boolean"),
    ("two names", text("request_id,scope,user_id,USER_ID\nz,user,1,2\n", "r.csv"),
     "has two columns USER_ID and user_id; rename one"),
    ("a folder that does not say its format", files(a=text("{}\n", "r.jsonl")),
     "say with --format"),
]  # fmt: skip
