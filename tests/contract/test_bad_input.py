"""Whatever a user gets wrong, a job says it in one line, ends with 2, and has written nothing.

The line starts with `error: ` and names the file, row or key and the mend. One table of cases over
all jobs runs embedded. Those of `ON_SPARK`, in which an engine's own code finds the mistake, run on
Spark as well.
"""

from __future__ import annotations

import os
import shlex
import shutil
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

REPOSITORY = Path(__file__).resolve().parent.parent.parent

FILES = {
    "list.yaml": "- als\n- unlearn\n",
    "torn.yaml": "als: {rank: 4\nunlearn: ]\n",
    "binary.yaml": b"\xff\xfe\x00\x01",
    "nothing.yaml": "",
    "misspelt.yaml": "als:\n  rnak: 4\n",
    "good.csv": "user_id,item_id,rating,rated_at\n1,1,3,1000\n1,2,4,1000\n",
    "other.csv": "user_id,film,rating\n1,1,3\n",
    "twice.csv": "user_id,item_id,rating,rating\n1,1,3,4\n",
    "empty.csv": "",
    "blank.csv": "\n   \n\n",
    "header.csv": "user_id,item_id,rating\n",
    "hopeless.csv": "user_id,item_id,rating\n1,1,good\n1,2,\n,3,4\n1,4,better\n",
    "texts.csv": "user_id,item_id,rating\nada,1,3\nbob,2,4\n",
    "foreign-items.csv": "user_id,item_id,rating\n1,007,3\n1,x,4\n",
    "no-request-id.csv": "scope,user_id\nuser,1\n",
    "no-scope.csv": "request_id,user_id\nr-1,1\n",
    "no-requests.csv": "request_id,scope,user_id\n",
    "hopeless-requests.csv": "request_id,scope,user_id\nr-1,everything,1\nr-2,,1\nr-3,all,2\n",
    "foreign-requests.csv": "request_id,scope,user_id\nr-1,user,1.0\nr-2,user,01\n",
    "requests.txt": "request_id,scope,user_id\nr-1,user,1\n",
    "not.jsonl": "request_id,scope,user_id\nr-1,user,1\n",
    "not.parquet": "user_id,item_id,rating\n1,1,3\n",
    "movies.txt": "1:\n1,3,2005-09-06\n",
    "a-file": "",
}

# name of the case, job, arguments, and what the line has to say. {names} are paths, see `places`.
CASES = [
    # --- settings: refused before Spark is asked for anything
    ("unknown setting", "train", "--root {new} --set als.rnk=3", "als.rnk; did you mean als.rank?"),
    ("unknown section", "train", "--root {new} --set alls.rank=3",
     "unknown setting alls; did you mean als?"),
    ("unknown setting in a file", "train", "--root {new} --conf {misspelt.yaml}",
     "{misspelt.yaml}: unknown setting als.rnak; did you mean als.rank?"),
    ("unknown setting like no other", "train", "--root {new} --set colour=red",
     "--set colour=red: unknown setting colour", "conf/local.yaml"),
    ("rank 0", "train", "--root {new} --set als.rank=0", "als.rank = 0", "greater than or equal"),
    ("negative regularisation", "train", "--root {new} --set als.reg_param=-0.1",
     "als.reg_param = -0.1", "greater than or equal to 0"),
    ("not a number", "train", "--root {new} --set als.rank=many", "als.rank = 'many'", "integer"),
    ("not finite", "train", "--root {new} --set als.reg_param=.inf", "als.reg_param", "finite"),
    ("tau 0", "unlearn", "--root {new} --set unlearn.tau=0", "unlearn.tau = 0", "greater than 0"),
    ("one of a few words", "unlearn", "--root {new} --set unlearn.direct_rows=skip",
     "unlearn.direct_rows = 'skip'", "'resolve' or 'threshold'"),
    ("neither version nor word", "train", "--root {new} --set als.warm_start=yesterday",
     "setting als.warm_start = 'yesterday'", "'latest'"),
    ("Spark setting that is a list", "train", "--root {new} --set spark.conf.spark.jars=[1,2]",
     "setting spark.conf", "[1, 2]"),
    ("unknown kind of master", "train", "--root {new} --set spark.master=nowhere",
     "spark.master = 'nowhere'", "expected local[N], yarn, spark://"),
    ("memory without a unit", "train", "--root {new} --set spark.driver_memory=lots",
     "spark.driver_memory = 'lots'", "for example 4g"),
    ("section without a key", "train", "--root {new} --set als=3", "setting als = 3"),
    ("set without equals", "train", "--root {new} --set als.rank", "--set als.rank",
     "key=value"),
    ("set without key", "train", "--root {new} --set =3", "--set =3", "key=value"),
    ("master and remote", "train", "--root {new} --set spark.master=local --set spark.remote=sc://h",
     "spark.master", "spark.remote", "not both"),
    ("missing settings file", "train", "--root {new} --conf {absent}", "--conf {absent}",
     "give a YAML file"),
    ("settings file is a folder", "train", "--root {new} --conf {files}", "--conf {files}",
     "give a YAML file"),
    ("settings file is no YAML", "train", "--root {new} --conf {torn.yaml}",
     "{torn.yaml}: not valid YAML", "line"),
    ("settings file is binary", "train", "--root {new} --conf {binary.yaml}",
     "{binary.yaml}: not valid YAML"),
    ("settings file is a list", "train", "--root {new} --conf {list.yaml}",
     "{list.yaml}: expected a mapping"),
    ("no place for the tables", "audit", "--conf {empty.csv}", "--root DIR"),
    ("root and catalog", "audit", "--conf {empty.csv} --set root=x --set catalog=a.b",
     "root or catalog, not both"),
    # --- options
    ("unknown option", "unlearn", "--root {new} --fast", "--fast"),
    ("option left out", "ingest_ratings", "--root {new} --format csv", "--input"),
    ("top 0", "recommend", "--root {trained} --top 0", "--top", "0 is not in the range"),
    ("no place to count", "evaluate", "--root {trained} --split 0.5 --k 0", "--k"),
    ("whole split", "evaluate", "--root {trained} --split 1", "--split"),
    ("input and split", "evaluate", "--root {trained} --split 0.5 --input {good.csv}",
     "exactly one of --input and --split"),
    ("split of a version", "evaluate", "--root {trained} --split 0.5 --model-version 1",
     "leave out --model-version"),
    ("rollback to a word", "rollback", "--root {trained} --to first", "'first'", "integer"),
    ("more ratings than pairs", "generate_ratings",
     "--users 2 --items 3 --ratings 7 --output {new}/r.csv", "--ratings 7", "only 6 pairs"),
    ("no users", "generate_ratings", "--users 0 --items 3 --ratings 7 --output {new}/r.csv",
     "--users 0: expected at least 1"),
    ("wrong suffix", "generate_ratings", "--users 2 --items 3 --ratings 6 --output {new}/r.txt",
     "{new}/r.txt", ".csv or .parquet"),
    ("output is a folder", "generate_ratings",
     "--users 2 --items 3 --ratings 6 --output {files}/a-folder.csv", "{files}/a-folder.csv",
     "is a directory; name a file"),
    ("output elsewhere", "generate_ratings",
     "--users 2 --items 3 --ratings 6 --output s3://bucket/r.csv", "s3://bucket/r.csv",
     "name a local file"),
    ("output under a file", "generate_ratings",
     "--users 2 --items 3 --ratings 6 --output {a-file}/r.csv", "{a-file}/r.csv",
     "cannot be written"),
    # --- roots
    ("root is a file (train)", "train", "--root {a-file}", "{a-file} is a file",
     "name a directory"),
    ("root is a file (ingest)", "ingest_ratings",
     "--root {a-file} --input {good.csv} --format csv", "{a-file} is a file", "name a directory"),
    ("root is a file (demo)", "demo", "--root {a-file}", "{a-file} is a file",
     "name a directory"),
    ("root under a file", "ingest_tombstones",
     "--root {a-file}/tables --input {no-scope.csv}", "{a-file} is a file", "name a directory"),
    ("root in storage that is not there", "train", "--root nowhere://bucket/tables",
     "root nowhere://bucket/tables", "no access to storage of that kind"),
    ("log without a commit", "train", "--root {begun}", "table ratings is missing",
     "run job ingest_ratings first"),
    # --- jobs in the wrong order
    ("train without ratings", "train", "--root {new}", "table ratings is missing",
     "run job ingest_ratings first"),
    ("unlearn without a model", "unlearn", "--root {new}", "table models is missing",
     "run job train first"),
    ("update without a model", "update", "--root {new}", "table models is missing",
     "run job train first"),
    ("audit without a model", "audit", "--root {new}", "table models is missing",
     "run job train first"),
    ("recommend without a model", "recommend", "--root {new} --top 3", "table models is missing",
     "run job train first"),
    ("evaluate without a model", "evaluate", "--root {new} --input {good.csv}",
     "table models is missing", "run job train first"),
    ("split without ratings", "evaluate", "--root {new} --split 0.5", "table ratings is missing",
     "run job ingest_ratings first"),
    ("rollback without a model", "rollback", "--root {new} --to 1", "table models is missing",
     "run job train first"),
    ("warm start without a model", "train", "--root {forgotten} --set als.warm_start=latest",
     "table models is missing", "run job train first"),
    ("every rating is to be forgotten", "train", "--root {forgotten}", "no ratings to train on",
     "ingest"),
    ("every rating of the model goes", "unlearn", "--root {emptied}", "every rating of the model",
     "ingest other ratings first"),
    # --- versions and ids that are not there
    ("audit of an unknown version", "audit", "--root {trained} --model-version 9",
     "model version 9 is not published", "[1, 2]"),
    ("recommend by an unknown version", "recommend", "--root {trained} --top 3 --model-version 9",
     "model version 9 is not published", "[1, 2]"),
    ("evaluate an unknown version", "evaluate",
     "--root {trained} --input {good.csv} --model-version 0", "model version 0 is not published",
     "[1, 2]"),
    ("warm start from an unknown version", "train", "--root {trained} --set als.warm_start=9",
     "model version 9 is not published", "[1, 2]"),
    ("warm start with another rank", "train",
     "--root {trained} --set als.warm_start=2 --set als.rank=3", "rank 2, als.rank is 3",
     "set them equal"),
    ("rollback to an unknown version", "rollback", "--root {trained} --to 9",
     "model version 9 is not published", "[1, 2]"),
    ("rollback to an impossible version", "rollback", "--root {trained} --to -1",
     "model version -1 is not published"),
    ("rollback to where we are", "rollback", "--root {trained} --to 2", "version 2",
     "newest already"),
    ("rollback behind a deletion", "rollback", "--root {trained} --to 1", "version 1",
     "version 2 forgot", "train anew"),
    ("recommend to strangers", "recommend", "--root {trained} --top 3 --users ada,99",
     "--users ada,99", "name users that have ratings"),
    ("recommend into a file that is there", "recommend",
     "--root {trained} --top 3 --output {good.csv}", "{good.csv}: exists already",
     "name another"),
    ("recommend under a file", "recommend", "--root {trained} --top 3 --output {a-file}/out",
     "{a-file}", "name another"),
    ("picture under a file", "train", "--root {trained} --set als.rank=2 --plot {a-file}/p.png",
     "--plot {a-file}/p.png", "name another"),
    # --- inputs: ratings
    ("missing input", "ingest_ratings", "--root {new} --input {absent} --format csv", "{absent}",
     "check the path"),
    ("glob without a match", "ingest_ratings", "--root {new} --input '{files}/*.gz' --format csv",
     "{files}/*.gz", "check the path"),
    ("unknown format", "ingest_ratings", "--root {new} --input {good.csv} --format excel",
     "'excel' is not one of", "'movielens'"),
    ("unknown format of held-out ratings", "evaluate",
     "--root {trained} --input {good.csv} --format excel", "excel", "movielens"),
    ("empty file", "ingest_ratings", "--root {new} --input {empty.csv} --format csv",
     "{empty.csv}: is empty", "give a file with some"),
    ("blank lines only", "ingest_ratings", "--root {new} --input {blank.csv} --format csv",
     "{blank.csv}: is empty", "give a file with some"),
    ("empty folder", "ingest_ratings", "--root {new} --input {folder} --format parquet",
     "{folder}", "check --format"),
    ("header only", "ingest_ratings", "--root {new} --input {header.csv} --format csv",
     "{header.csv}: has no ratings", "give a file with some"),
    ("table without rows", "ingest_ratings", "--root {new} --input {none.parquet} --format parquet",
     "{none.parquet}: has no ratings", "give a file with some"),
    ("held out without rows", "evaluate", "--root {trained} --input {header.csv}",
     "no held-out ratings", "give some"),
    ("no row is usable", "ingest_ratings", "--root {new} --input {hopeless.csv} --format csv",
     "{hopeless.csv}: none of its 4 rows is usable", "rating is not a number"),
    ("text ids in a table of integers (csv)", "ingest_ratings",
     "--root {trained} --input {texts.csv} --format csv",
     "{texts.csv}: none of its 2 rows is usable", "id is not an integer as in the table"),
    ("text ids in a table of integers (parquet)", "ingest_ratings",
     "--root {trained} --input {texts.parquet} --format parquet",
     "{texts.parquet}: none of its 2 rows is usable", "id is not an integer as in the table"),
    ("item ids that are no integers", "ingest_ratings",
     "--root {trained} --input {foreign-items.csv} --format csv",
     "{foreign-items.csv}: none of its 2 rows is usable", "id is not an integer as in the table"),
    ("ids of another kind", "ingest_ratings",
     "--root {new} --input {float-ids.parquet} --format parquet",
     "{float-ids.parquet}: none of its 1 rows is usable", "user_id is a fraction"),
    ("ids that are no numbers", "ingest_ratings",
     "--root {new} --input {true-ids.parquet} --format parquet",
     "{true-ids.parquet}: column user_id has type boolean", "cast it first"),
    ("missing column", "ingest_ratings", "--root {new} --input {other.csv} --format csv",
     "{other.csv}: has no column item_id (found: user_id, film, rating)", "--columns item_id="),
    ("missing column of a table", "ingest_ratings",
     "--root {new} --input {other.parquet} --format parquet",
     "{other.parquet}: has no column item_id (found: user_id, film, rating)",
     "--columns item_id="),
    ("missing column of held-out ratings", "evaluate", "--root {trained} --input {other.csv}",
     "{other.csv}: has no column item_id", "--columns item_id="),
    ("column twice", "ingest_ratings", "--root {new} --input {twice.csv} --format csv",
     "{twice.csv}: has two columns rating", "rename one"),
    ("columns that are not there", "ingest_ratings",
     "--root {new} --input {good.csv} --format csv --columns user_id=uid",
     "{good.csv}: has no column uid", "--columns user_id="),
    ("columns of unknown parts", "ingest_ratings",
     "--root {new} --input {good.csv} --format csv --columns uid=user_id",
     "--columns uid=user_id", "none of user_id, item_id, rating, rated_at"),
    ("columns without equals", "ingest_ratings",
     "--root {new} --input {good.csv} --format csv --columns user_id", "--columns user_id",
     "part=column"),
    ("columns of a fixed format", "ingest_ratings",
     "--root {new} --input {good.csv} --format movielens --columns user_id=uid", "--columns",
     "leave it out"),
    ("movielens told, csv given", "ingest_ratings",
     "--root {new} --input {good.csv} --format movielens", "{good.csv}: is no MovieLens",
     "--format csv"),
    ("netflix told, csv given", "ingest_ratings",
     "--root {new} --input {good.csv} --format netflix", "{good.csv}: is no Netflix Prize file",
     "123:"),
    ("parquet told, csv given", "ingest_ratings",
     "--root {new} --input {not.parquet} --format parquet", "{not.parquet}: cannot be read",
     "check --format"),
    ("delta told, csv given", "ingest_ratings", "--root {new} --input {good.csv} --format delta",
     "{good.csv}: cannot be read as delta", "check --format"),
    ("delta told, folder given", "ingest_ratings", "--root {new} --input {folder} --format delta",
     "{folder}: cannot be read as delta", "check --format"),
    ("delta told, log alone given", "ingest_ratings",
     "--root {new} --input {log-alone} --format delta", "{log-alone}: cannot be read as delta",
     "check --format"),
    ("requests in a log alone", "ingest_tombstones", "--root {new} --input {log-alone}",
     "{log-alone}", "--format"),
    ("picture elsewhere", "train", "--root {trained} --plot s3://bucket/p.png",
     "--plot s3://bucket/p.png", "name a local file"),
    ("csv told, parquet given", "ingest_ratings",
     "--root {new} --input {texts.parquet} --format csv", "{texts.parquet}", "check --format"),
    ("csv told, large parquet given", "ingest_ratings",
     "--root {new} --input {large.parquet} --format csv", "{large.parquet}", "check --format"),
    ("csv told, netflix given", "ingest_ratings", "--root {new} --input {movies.txt} --format csv",
     "{movies.txt}: has no column user_id (found: 1:)"),
    ("demo of a missing file", "demo", "--root {new} --input {absent}", "{absent}",
     "check the path"),
    ("demo in an unknown format", "demo", "--root {new} --input {good.csv} --format excel",
     "excel", "movielens"),
    # --- inputs: deletion requests
    ("missing requests", "ingest_tombstones", "--root {trained} --input {absent}.csv",
     "{absent}.csv", "check the path"),
    ("requests without request_id", "ingest_tombstones",
     "--root {trained} --input {no-request-id.csv}",
     "{no-request-id.csv}: has no column request_id (found: scope, user_id)"),
    ("requests without scope", "ingest_tombstones", "--root {new} --input {no-scope.csv}",
     "{no-scope.csv}: has no column scope (found: request_id, user_id)"),
    ("requests in an empty file", "ingest_tombstones", "--root {trained} --input {empty.csv}",
     "{empty.csv}: is empty", "give a file with some"),
    ("no requests", "ingest_tombstones", "--root {trained} --input {no-requests.csv}",
     "{no-requests.csv}: has no requests", "give a file with some"),
    ("no request is usable", "ingest_tombstones",
     "--root {trained} --input {hopeless-requests.csv}", "{hopeless-requests.csv}: none of its 3",
     "scope is none of user, item, rating, window, reinstate"),
    ("requests of ids that the ratings cannot have", "ingest_tombstones",
     "--root {trained} --input {foreign-requests.csv}",
     "{foreign-requests.csv}: none of its 2 requests is usable",
     "user_id is not an integer as in the table"),
    ("requests of unknown suffix", "ingest_tombstones", "--root {trained} --input {requests.txt}",
     "{requests.txt}", "--format"),
    ("requests of unknown format", "ingest_tombstones",
     "--root {trained} --input {requests.txt} --format excel", "'excel' is not one of", "'jsonl'"),
    ("json told, csv given", "ingest_tombstones", "--root {trained} --input {not.jsonl}",
     "{not.jsonl}: none of its 2", "is not a JSON object"),
    ("requests: parquet told, csv given", "ingest_tombstones",
     "--root {trained} --input {not.parquet}", "{not.parquet}: cannot be read", "check --format"),
]  # fmt: skip

OF_ONE_ENGINE = [
    ("embedded", "catalog without Spark", "train", "--conf {nothing.yaml} --set catalog=a.b",
     "catalog: the embedded engine finds tables by path; give --root"),
    ("embedded", "files of Databricks", "train", "--root dbfs:/tables",
     "root dbfs:/tables: only Spark reaches it; run with --engine spark"),
    ("embedded", "root with a mark of URLs", "train", "--root '{base}/100%25'",
     "100%25: the embedded engine cannot use a path with '%25'", "name another"),
    ("embedded", "root with a mark of globs", "train", "--root '{base}/[a]'",
     "[a]: the embedded engine cannot use a path with '['", "run with --engine spark"),
    ("embedded", "Delta output with a mark of URLs", "recommend",
     "--root {trained} --top 3 --output '{base}/a%20b'", "--output {base}/a%20b",
     "cannot use a path with '%20'"),
    ("embedded", "too little memory", "train",
     "--root {trained} --set execution.memory=1k --set als.rank=2",
     "execution.memory is 0.0 MiB; raise it, or run with --engine spark"),
    ("embedded", "memory in no unit", "train", "--root {new} --set execution.memory=3",
     "setting execution.memory = 3"),
    ("spark", "no such catalog", "train",
     "--conf {nothing.yaml} --set catalog=no-such.schema", "catalog no-such.schema",
     "create it first"),
]  # fmt: skip

ON_SPARK = {
    "root under a file",
    "root in storage that is not there",
    "log without a commit",
    "train without ratings",
    "unlearn without a model",
    "split without ratings",
    "warm start without a model",
    "every rating is to be forgotten",
    "every rating of the model goes",
    "audit of an unknown version",
    "evaluate an unknown version",
    "warm start with another rank",
    "rollback behind a deletion",
    "recommend to strangers",
    "recommend into a file that is there",
    "missing input",
    "glob without a match",
    "empty file",
    "header only",
    "table without rows",
    "held out without rows",
    "no row is usable",
    "text ids in a table of integers (parquet)",
    "item ids that are no integers",
    "ids of another kind",
    "missing column",
    "missing column of held-out ratings",
    "column twice",
    "columns that are not there",
    "movielens told, csv given",
    "netflix told, csv given",
    "parquet told, csv given",
    "delta told, csv given",
    "csv told, parquet given",
    "requests without request_id",
    "no requests",
    "no request is usable",
    "requests of ids that the ratings cannot have",
    "requests: parquet told, csv given",
}


def cases():
    """(engine, job, arguments, what the line says), each with the name of its case."""
    found = [("embedded", *case) for case in CASES]
    found += [("spark", *case) for case in CASES if case[0] in ON_SPARK]
    assert len(found) == len(CASES) + len(ON_SPARK)
    for engine, name, job, arguments, *says in found + OF_ONE_ENGINE:
        marks = [pytest.mark.spark] if engine == "spark" else []
        yield pytest.param(engine, job, arguments, says, id=f"{engine}: {name}", marks=marks)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """By name the inputs, the roots that `made` fills, and paths at which there is nothing."""
    base = tmp_path_factory.mktemp("bad-input")
    files = base / "files"
    for folder in ("folder", "a-folder.csv", "log-alone/_delta_log"):
        (files / folder).mkdir(parents=True)
    (base / "begun" / "ratings" / "_delta_log").mkdir(parents=True)
    for name, content in FILES.items():
        data = content if isinstance(content, bytes) else content.encode()
        (files / name).write_bytes(data)
    tables = {
        "none.parquet": {"user_id": pa.array([], pa.int64()), "item_id": pa.array([], pa.int64()),
                         "rating": pa.array([], pa.float32())},
        "texts.parquet": {"user_id": ["ada", "bob"], "item_id": [1, 2], "rating": [3.0, 4.0]},
        "float-ids.parquet": {"user_id": [1.5], "item_id": [1], "rating": [3.0]},
        "true-ids.parquet": {"user_id": [True], "item_id": [1], "rating": [3.0]},
        "other.parquet": {"user_id": [1], "film": [1], "rating": [3.0]},
        "large.parquet": {"user_id": [f"{n:032b}" for n in range(20_000)]},
    }  # fmt: skip
    for name, columns in tables.items():
        # Not compressed: the large one has to be one long line for a reader of text.
        pyarrow.parquet.write_table(pa.table(columns), files / name, compression="none")
    names = {path.name: path for path in files.iterdir()}
    roots = {name: base / name for name in ("trained", "forgotten", "emptied", "new", "begun")}
    return {**names, **roots, "files": files, "absent": base / "absent", "base": base}


@pytest.fixture
def made(places, run_in_process):
    """`places`, with the roots made by the first case: a model that has forgotten once, ratings
    that are all to be forgotten, and a model of which nothing is to be left."""
    if places["trained"].exists():
        return places

    def done(job, root, *arguments):
        result = run_in_process(job, "--root", places[root], *arguments, "--engine", "embedded")
        assert result.exit_code == 0, result.stderr

    def ask(root, *users):
        path = places["base"] / "asked.csv"
        lines = [f"{root}-{user},user,{user}\n" for user in users]
        path.write_text("request_id,scope,user_id\n" + "".join(lines))
        done("ingest_tombstones", root, "--input", path)

    source = places["base"] / "ratings.csv"
    rows = [f"{u},{i},{1 + (u * i) % 5}\n" for u in range(8) for i in range(6) if (u + i) % 3]
    source.write_text("user_id,item_id,rating\n" + "".join(rows))
    done("ingest_ratings", "forgotten", "--input", source, "--format", "csv")
    shutil.copytree(places["forgotten"], places["trained"])
    ask("forgotten", *range(8))
    done("train", "trained", "--set", "als.rank=2", "--set", "als.tol=0.05")
    ask("trained", 7)
    # So tolerant that a model of eight users can forget one of them without sweeping everything.
    done("unlearn", "trained", "--set", "unlearn.tau=0.5")
    shutil.copytree(places["trained"], places["emptied"])
    ask("emptied", *range(7))
    return places


def tree(folder):
    """Every file under a folder, with its size."""
    return {
        str(path.relative_to(folder)): path.stat().st_size if path.is_file() else None
        for path in folder.rglob("*")
    }


@pytest.mark.parametrize(("engine", "job", "arguments", "says"), cases())
def test_mistakes_are_one_line_and_nothing_is_written(job, arguments, says, made, run_job):
    filled = {f"{{{name}}}": str(path) for name, path in made.items()}

    def fill(text):
        for placeholder, path in filled.items():
            text = text.replace(placeholder, path)
        assert "{" not in text
        return text

    before = tree(made["base"])
    result = run_job(job, *shlex.split(fill(arguments)))
    line = result.error
    for fragment in says:
        assert fill(fragment) in line
    # A night says what it is about to do before it finds that this would leave nothing.
    others = [other for other in result.stderr.splitlines() if "requests take" not in other]
    assert others == [line]
    assert line.isprintable()
    assert result.json is None
    assert tree(made["base"]) == before


@pytest.mark.on_both(slow=True)
def test_ids_of_another_kind_are_quarantined_one_by_one(made, open_shop, tmp_path):
    """A table of integer ids takes the integers of an input; its other rows have a reason."""
    shutil.copytree(made["trained"], tmp_path / "copy")
    shop = open_shop(tmp_path / "copy")
    count = shop.table("ratings").num_rows
    source = tmp_path / "mixed.csv"
    source.write_text("user_id,item_id,rating\n1,50,3\nada,1,3\n1,B0,3\n01,51,3\n")
    done = shop.ingest_ratings(source, "csv")
    assert (done.ratings_written, done.quarantined) == (1, 3)
    assert shop.table("ratings").num_rows == count + 1
    held = shop.table("quarantine").to_pylist()
    assert {(row["raw"], row["reason"]) for row in held} == {
        (raw, f"{name}_id is not an integer as in the table")
        for raw, name in (("ada,1,3", "user"), ("1,B0,3", "item"), ("01,51,3", "user"))
    }


@pytest.fixture
def locked():
    """A folder that the process may not write to. Root may write anywhere, so it becomes nobody."""
    folder = Path(tempfile.mkdtemp(prefix="unlearn-locked-"))
    (folder / "hidden").mkdir()
    (folder / "hidden").chmod(0o600)
    folder.chmod(0o555)
    is_root = os.geteuid() == 0
    if is_root:
        os.setresuid(65534, 65534, 0)
    try:
        if not os.access(REPOSITORY / "conf" / "local.yaml", os.R_OK):
            pytest.skip(f"the user nobody may not read {REPOSITORY}; run the tests as another user")
        yield folder
    finally:
        if is_root:
            os.setresuid(0, 0, 0)
        folder.chmod(0o755)
        shutil.rmtree(folder)


@pytest.mark.parametrize("below", ["", "tables/of/ours", "hidden/tables"])
def test_a_root_that_is_not_writable_is_one_line(below, locked, run_job):
    result = run_job("train", "--root", locked / below)
    assert f"--root {locked / below}: " in result.error
    assert "is not writable; name another" in result.error
    assert result.stderr.splitlines() == [result.error]
