"""What is checked before a job's work, so that it does not fail when the work is done."""

from __future__ import annotations

import os
import re
from importlib.util import find_spec
from pathlib import Path

from unlearn_spark.errors import InputError, UserError


def require_package(module: str, distribution: str, purpose: str) -> None:
    """Raise UserError, with the mend, where an optional package is missing."""
    if find_spec(module) is None:
        raise UserError(f"{purpose} needs {distribution}; pip install 'unlearn-spark[evaluation]'")


def is_remote(path: str) -> bool:
    """Is this a place that only Spark can look at?"""
    return "://" in path or path.startswith(("dbfs:", "/Volumes/"))


def for_spark(path: str, glob: bool = True) -> str:
    """A path as Spark's readers take it: what is there under that very name is meant by it.

    Parameters
    ----------
    glob
        The reader takes patterns (that of Delta does not), so their marks in a name need escaping.
    """
    if is_remote(path) or not os.path.exists(path):
        return path
    # Absolute, as Hadoop takes what stands before a colon at the beginning for a scheme.
    absolute = str(Path(path).absolute())
    return re.sub(r"([\\\[\]{}*?])", r"\\\1", absolute) if glob else absolute


def nearest_existing(path: Path) -> Path:
    """A local path itself, or the first of its parents that is there."""
    return next(p for p in (path, *path.absolute().parents) if os.path.exists(p))


def require_creatable(option: str, path: str) -> None:
    """Raise InputError where nothing can be created at a local path that an option names.

    Missing parents are no hindrance; whether something is there already is the caller's question.
    """
    target = Path(path).absolute()
    folder = nearest_existing(target if target.is_dir() else target.parent)
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"{option} {path}: {folder} is no writable directory; name another")


def require_local_file(option: str, path: str) -> None:
    """Raise InputError where a path that an option names cannot be that of a file here."""
    if "://" in path or path.startswith("dbfs:"):
        raise InputError(f"{option} {path}: is written on this machine; name a local file")
    if Path(path).is_dir():
        raise InputError(f"{option} {path}: is a directory; name a file")


def require_picture(path: str) -> None:
    """Raise UserError where `--plot` could not draw to this path."""
    require_local_file("--plot", path)
    require_creatable("--plot", path)
    require_package("matplotlib", "matplotlib", f"--plot {path}")
