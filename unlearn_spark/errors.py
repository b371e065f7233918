"""The errors that a user can fix, and the one that running the job again fixes.

A `UserError` reaches the terminal as a single line and ends the job with exit code 2. Any other
exception is a fault of the program or its environment and ends the job with exit code 1.
"""

from __future__ import annotations


class UserError(Exception):
    """Bad input or settings; the message names the file, row or key, and the fix."""


class SettingsError(UserError):
    """A setting is unknown, of the wrong type or out of range."""


class InputError(UserError):
    """An input file or table cannot be used as it is."""


class TableMissingError(UserError):
    """A table that the job needs does not exist yet; the message names the job that makes it."""


class ConflictError(Exception):
    """Another job published first. Nothing was made visible; running the job again is safe."""
