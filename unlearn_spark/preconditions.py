"""Checks that a job makes before its work, so that it does not fail after it."""

from __future__ import annotations

import os
import re
from importlib.util import find_spec
from pathlib import Path

from unlearn_spark.errors import InputError, UserError


def require_package(module: str, distribution: str, purpose: str) -> None:
    """Raise UserError, with the command to install it, if an optional package is missing."""
    if find_spec(module) is None:
        raise UserError(f"{purpose} needs {distribution}; pip install 'unlearn-spark[evaluation]'")


def is_remote(path: str) -> bool:
    """Whether only Spark can look at this path."""
    return "://" in path or path.startswith(("dbfs:", "/Volumes/"))


def for_spark(path: str, glob: bool = True) -> str:
    """A path that makes Spark's readers open exactly the local file or folder of that name.

    Parameters
    ----------
    glob
        Whether the reader takes patterns (Delta's does not); if so, pattern marks are escaped.
    """
    if is_remote(path) or not os.path.exists(path):
        return path
    # Absolute, because Hadoop takes the text before a leading colon for a scheme.
    absolute = str(Path(path).absolute())
    return re.sub(r"([\\\[\]{}*?])", r"\\\1", absolute) if glob else absolute


# delta-rs turns a path into a URL, and either misreads these marks or panics.
_UNUSABLE = re.compile(r"[][\\^|\x00-\x1f\x7f]|%[0-9A-Fa-f]{2}")


def misread_by_delta_rs(path: str) -> str | None:
    """The first mark of a local path that delta-rs cannot use; None if it can use the path."""
    found = None if is_remote(path) else _UNUSABLE.search(str(Path(path).absolute()))
    return found and found[0]


def require_path_for_delta_rs(option: str, path: str) -> None:
    """Raise InputError if delta-rs cannot keep a table at a local path that an option names."""
    mark = misread_by_delta_rs(path)
    if mark:
        raise InputError(
            f"{option} {path}: the embedded engine cannot use a path with {mark!r} for a Delta "
            "table; name another, or run with --engine spark"
        )


def nearest_existing(path: Path) -> Path:
    """A local path if it exists, else its nearest parent that does."""
    return next(p for p in (path, *path.absolute().parents) if os.path.exists(p))


def require_creatable(option: str, path: str) -> None:
    """Raise InputError if nothing can be created at a local path that an option names.

    Missing parents are fine. The caller decides whether something may already be there.
    """
    target = Path(path).absolute()
    folder = nearest_existing(target if target.is_dir() else target.parent)
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"{option} {path}: {folder} is not a writable directory; name another")


def require_local_file(option: str, path: str) -> None:
    """Raise InputError if a path that an option names cannot be a file on this machine."""
    if "://" in path or path.startswith("dbfs:"):
        raise InputError(f"{option} {path}: is written on this machine; name a local file")
    if Path(path).is_dir():
        raise InputError(f"{option} {path}: is a directory; name a file")


def require_picture(path: str) -> None:
    """Raise UserError if `--plot` could not draw to this path."""
    require_local_file("--plot", path)
    require_creatable("--plot", path)
    require_package("matplotlib", "matplotlib", f"--plot {path}")
