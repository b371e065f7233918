"""Files are read in chunks and batches whose seams do not show.

Proves: ratings and requests are the same however text is cut; a line's position decides between
equals across chunks; inputs of an object store are found and read by the same rules.
"""

from __future__ import annotations

import pytest

from unlearn_spark.embedded import files, formats, ingest
from unlearn_spark.errors import InputError
from unlearn_spark.ingestion import rules
from unlearn_spark.tables import quarantine


def read(path, format, columns=None, threads=3):
    found = ingest.read(formats.read_ratings(str(path), format, columns or {}), None, threads)
    rows = [tuple(row.values())[:3] for row in found.usable.to_pylist()]
    return rows, [(row["raw"], row["reason"]) for row in found.refused.to_pylist()]


@pytest.mark.parametrize("size", [30, 600, 1 << 20])
def test_csv_does_not_depend_on_chunks(tmp_path, monkeypatch, size):
    monkeypatch.setattr(files, "CHUNK_BYTES", size)
    lines = ["user_id,item_id,rating"]
    good, bad = [], []
    for n in range(200):
        kind = n % 7
        if kind == 0:
            lines.append(f'"ü{n}, x",{n},1')
            good.append((f"ü{n}, x", n, 1.0))
        elif kind == 1:
            lines.append(f"{n},{n}")
            bad.append((lines[-1], rules.WRONG_WIDTH))
        elif kind == 2:
            lines += ["", "  "]
        else:
            lines.append(f"{n},{n},2")
            good.append((str(n), n, 2.0))
    ends = ["\n", "\r\n", "\r"]
    text = "".join(line + ends[n % 3] for n, line in enumerate(lines))
    (tmp_path / "r.csv").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert read(tmp_path / "r.csv", "csv") == (good, bad)


@pytest.mark.parametrize("size", [60, 600, 1 << 20])
def test_netflix_lines_belong_to_the_movie_above(tmp_path, monkeypatch, size):
    monkeypatch.setattr(files, "CHUNK_BYTES", size)
    movies = {m: [m * 10 + k for k in range(m % 4 * 5)] for m in range(1, 60)}
    text = "".join(
        f"{movie}:\n" + "".join(f"{user},{1 + user % 5},2005-09-06\n" for user in users)
        for movie, users in movies.items()
    )
    (tmp_path / "n").mkdir()
    (tmp_path / "n" / "a.txt").write_text(text)
    (tmp_path / "n" / "b.txt").write_text(" 900: \n7,5,2004-01-01\n8,5\n")
    (tmp_path / "n" / "c.txt").write_text("7,5,2004-01-01\n")
    good, bad = read(tmp_path / "n", "netflix")
    assert [row[:2] for row in good] == [
        *((user, movie) for movie, users in movies.items() for user in users),
        (7, 900),
    ]
    assert bad == [("900:8,5", rules.WRONG_WIDTH), (":7,5,2004-01-01", rules.NO_MOVIE)]


def test_ids_are_integers_only_if_all_of_a_file_are(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "CHUNK_BYTES", 40)
    head, lines = "user_id,item_id,rating\n", "".join(f"{n},{n},1\n" for n in range(40))
    (tmp_path / "r.csv").write_text(f"{head}{lines}007,1,1\nx,1,bad\n")
    good, _ = read(tmp_path / "r.csv", "csv")
    assert good == [*((str(n), n, 1.0) for n in range(40)), ("007", 1, 1.0)]


def test_the_quarantine_keeps_so_many_rows_and_counts_all(tmp_path, monkeypatch):
    monkeypatch.setattr(quarantine, "MOST_KEPT", 5)
    monkeypatch.setattr(files, "CHUNK_BYTES", 20)
    (tmp_path / "r.csv").write_text("user_id,item_id,rating\n1,1,1\n" + "1,1,x\n" * 30)
    found = ingest.read(formats.read_ratings(str(tmp_path / "r.csv"), "csv", {}), None, 2)
    assert (found.read, found.refused.num_rows, found.problems.total()) == (31, 5, 30)


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_where_inputs_are_found(tmp_path, scheme):
    for name in ("1.csv", "2.csv", "_3.csv", "x=1/4.csv", "x=1/y=%20/5.csv", "_h/6.csv", "z/7.csv"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("user_id\n")

    def found(pattern):
        return [
            (file.path.rpartition("/")[2], file.partition)
            for file in files.find(f"{scheme}{tmp_path}/{pattern}")
        ]

    below = [("4.csv", {"x": "1"}), ("5.csv", {"x": "1", "y": " "})]
    assert found("") == [("1.csv", {}), ("2.csv", {}), *below]
    assert found("1.csv") == found("[1_].csv") == found("{1,8}.csv") == [("1.csv", {})]
    assert found("*.csv") == [("1.csv", {}), ("2.csv", {})]
    assert found("x=1") == [("4.csv", {}), ("5.csv", {"y": " "})]
    assert found("z/[0-9]*") == [("7.csv", {})]
    for absent in ("8.csv", "8*", "{8,9}.csv"):
        with pytest.raises(InputError, match="no such file or folder"):
            found(absent)
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / "_1.csv").touch()
    with pytest.raises(InputError, match="names begin with _ or"):
        found("hidden")
