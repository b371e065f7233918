"""Find and open input files, local or in an object store, and read text in chunks of whole lines.

A local path that exists is meant literally; any other may be a glob. Of a folder come the files
directly in it and those in subfolders `name=value`, whose names give columns. In folders, names
that begin with _ or . are skipped.
"""

from __future__ import annotations

import fnmatch
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.fs as pafs
from deltalake.exceptions import DeltaError

from unlearn_spark.errors import InputError
from unlearn_spark.ingestion.rules import REPLACEMENT, check_exists
from unlearn_spark.preconditions import is_remote
from unlearn_spark.tables.delta_rs import unsupported_features

CHUNK_BYTES = 1 << 24
"""Text that is read and judged at a time."""

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_MARKS = "*?[{"
_HIDDEN = "_."


@dataclass(frozen=True)
class File:
    """One file of an input.

    Attributes
    ----------
    path
        Within `system`.
    partition
        The columns that the names of its folders give.
    """

    system: pafs.FileSystem
    path: str
    partition: dict[str, str | None] = field(default_factory=dict)


def find(path: str) -> list[File]:
    """The files that an input names, sorted.

    Raises
    ------
    InputError
        There is no such path, or its files are all hidden.
    """
    check_exists(path)
    system, inner = _system_of(path)
    roots = _roots(system, inner, is_glob=not _exists(system, inner))
    if not roots:
        raise InputError(f"--input {path}: no such file or folder; check the path")
    found = [file for root in roots for file in _below(system, root, {})]
    if not found and _has_files(system, inner):
        raise InputError(
            f"--input {path}: files whose names begin with _ or . are skipped; "
            "rename what is to be read"
        )
    return found


def exists(path: str) -> bool:
    """Whether there is a file or folder of exactly this name."""
    return _exists(*_system_of(path))


def _system_of(path: str) -> tuple[pafs.FileSystem, str]:
    if not is_remote(path):
        return pafs.LocalFileSystem(), str(Path(path).absolute())
    from deltalake.fs import DeltaStorageHandler

    # Credentials as for tables. The handler sees what is below a folder.
    fixed = re.split(r"[*?\[{]", path.rstrip("/"), maxsplit=1)[0]
    folder = fixed.rpartition("/")[0]
    return pafs.PyFileSystem(DeltaStorageHandler(folder)), path.rstrip("/")[len(folder) + 1 :]


def _exists(system: pafs.FileSystem, path: str) -> bool:
    return bool(system.get_file_info(path).type != pafs.FileType.NotFound)


def _roots(system: pafs.FileSystem, path: str, is_glob: bool) -> list[pafs.FileInfo]:
    """The file or folder of that name, or those that match it."""
    if not is_glob:
        return [system.get_file_info(path)]
    found: list[pafs.FileInfo] = []
    for pattern in _without_braces(path):
        parts = PurePosixPath(pattern).parts
        first = next((n for n, part in enumerate(parts) if any(m in part for m in _MARKS)), None)
        if first is None:
            found += [system.get_file_info(pattern)] if _exists(system, pattern) else []
            continue
        places = [str(PurePosixPath(*parts[:first])) if first else ""]
        for part in parts[first:]:
            entries = [info for place in places for info in _entries(system, place)]
            matching = [
                info
                for info in entries
                if fnmatch.fnmatchcase(info.base_name, part)
                and (part[0] in _HIDDEN or info.base_name[0] not in _HIDDEN)
            ]
            places = [info.path for info in matching]
        found += matching
    return sorted(found, key=lambda info: info.path)


def _without_braces(pattern: str) -> list[str]:
    """The patterns that `{a,b}` stands for."""
    found = re.search(r"\{([^{}]*)\}", pattern)
    if found is None:
        return [pattern]
    head, tail = pattern[: found.start()], pattern[found.end() :]
    return [each for word in found[1].split(",") for each in _without_braces(head + word + tail)]


def _entries(system: pafs.FileSystem, folder: str) -> list[pafs.FileInfo]:
    selector = pafs.FileSelector(folder, allow_not_found=True)
    return sorted(system.get_file_info(selector), key=lambda info: str(info.path))


def _below(
    system: pafs.FileSystem, root: pafs.FileInfo, partition: dict[str, str | None]
) -> Iterator[File]:
    if root.type == pafs.FileType.File:
        yield File(system, root.path, partition)
        return
    for info in _entries(system, root.path):
        if info.base_name[0] in _HIDDEN:
            continue
        name, equals, value = info.base_name.partition("=")
        if info.type == pafs.FileType.File:
            yield File(system, info.path, partition)
        elif equals:
            text = None if value == "__HIVE_DEFAULT_PARTITION__" else unquote(value)
            yield from _below(system, info, {**partition, unquote(name): text})


def _has_files(system: pafs.FileSystem, path: str) -> bool:
    if not _exists(system, path):
        return False
    infos = system.get_file_info(pafs.FileSelector(path, recursive=True))
    return any(info.type == pafs.FileType.File for info in infos)


@contextmanager
def explained(path: str, format: str) -> Iterator[None]:
    """Turn complaints about an input's files into one line that names the input."""
    try:
        yield
    except FileNotFoundError as error:
        raise InputError(f"--input {path}: no such file or folder; check the path") from error
    except PermissionError as error:
        raise InputError(f"--input {path}: not readable; check its permissions") from error
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError, zlib.error) as error:
        raise unreadable(path, format) from error
    except DeltaError as error:
        unsupported = unsupported_features(str(error))
        if unsupported is not None:
            raise InputError(
                f"--input {path}: has Delta features that the embedded engine does not support: "
                f"{unsupported}; run with --engine spark"
            ) from error
        raise unreadable(path, format) from error


def unreadable(path: str, format: str) -> InputError:
    """The error for files that are not of their format, or not whole."""
    return InputError(
        f"--input {path}: cannot be read as {format}; check --format and that the file is whole"
    )


# --- text -----------------------------------------------------------------------------------


def chunks(file: File) -> Iterator[bytes]:
    """Whole lines in valid UTF-8, about `CHUNK_BYTES` at a time.

    Every line ends with a line feed. Bytes that are not UTF-8 become U+FFFD, and a byte order mark
    at the beginning is left out. Files that end with .gz or .bz2 are unpacked.
    """
    rest, is_first = b"", True
    with file.system.open_input_stream(file.path, compression="detect") as stream:
        while data := stream.read(CHUNK_BYTES):
            if is_first:
                data, is_first = data.removeprefix(_BYTE_ORDER_MARK), False
            data = rest + data
            # A carriage return at the very end may belong to a line feed that follows.
            cut = max(data.rfind(b"\n"), data.rfind(b"\r", 0, len(data) - 1)) + 1
            if cut:
                yield _cleaned(data[:cut])
            rest = data[cut:]
    if rest:
        yield _cleaned(rest)


def _cleaned(data: bytes) -> bytes:
    if b"\r" in data:
        data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    if not data.endswith(b"\n"):
        data += b"\n"
    try:
        data.decode()
    except UnicodeDecodeError:
        return data.decode(errors="replace").encode()
    return data


def has_replacement(data: bytes) -> bool:
    """Whether U+FFFD occurs, which stands for bytes that were not UTF-8."""
    return REPLACEMENT.encode() in data
