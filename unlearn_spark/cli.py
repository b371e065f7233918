"""The command line that all jobs share: options, exit codes, and one JSON object at the end.

Exit codes: 0 done; 2 bad input or settings, with one line on stderr; 1 any other failure.
"""

from __future__ import annotations

import inspect
import json
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import click

from unlearn_spark.config import CHECKOUT, Settings, load_settings
from unlearn_spark.errors import UserError

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

    from unlearn_spark.tables.store import Store

DEFAULT_CONF = CHECKOUT / "conf" / "local.yaml" if CHECKOUT else None


@dataclass
class JobContext:
    """A job's validated settings; its Spark session and its tables open on first use."""

    settings: Settings
    _spark: Any = field(default=None, repr=False)
    _store: Any = field(default=None, repr=False)

    @property
    def spark(self) -> SparkSession:
        if self._spark is None:
            from unlearn_spark.spark.session import get_spark

            self._spark = get_spark(self.settings)
        return self._spark

    @property
    def store(self) -> Store:
        if self._store is None:
            from unlearn_spark.tables.store import Store, check_root

            check_root(self.settings)  # fail before a session starts
            self._store = Store(self.spark, root=self.settings.root, catalog=self.settings.catalog)
        return self._store


def progress(message: str) -> None:
    """Print one line of progress to stderr."""
    print(message, file=sys.stderr, flush=True)


def job(summary: str) -> Callable[[Callable[..., Mapping[str, Any]]], click.Command]:
    """Turn `main(context, **options) -> dict` into a job's command.

    Adds `--conf`, `--root` and `--set`; the returned mapping becomes the last line on stdout.
    """

    def decorate(main: Callable[..., Mapping[str, Any]]) -> click.Command:
        def callback(
            conf: str | None, root: str | None, overrides: tuple[str, ...], **options: Any
        ) -> Mapping[str, Any]:
            settings = load_settings(conf, overrides, root=root)
            return main(JobContext(settings), **options)

        command = click.Command(
            name=main.__module__.rpartition(".")[2],
            callback=callback,
            help=f"{summary}\n\n{inspect.getdoc(main) or ''}",
            params=[
                *reversed(getattr(main, "__click_params__", [])),
                click.Option(
                    ["--conf"],
                    metavar="FILE",
                    default=str(DEFAULT_CONF) if DEFAULT_CONF else None,
                    help="Settings (YAML).  [default: conf/local.yaml of a checkout]",
                ),
                click.Option(
                    ["--root"], metavar="DIR", help="Where the tables are; wins over the settings."
                ),
                click.Option(
                    ["--set", "overrides"],
                    multiple=True,
                    metavar="KEY=VALUE",
                    help="Override one setting, for example als.rank=64. Repeatable.",
                ),
            ],
            context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
        )
        return command

    return decorate


def run(command: click.Command, arguments: list[str] | None = None) -> None:
    """Run a job and exit with its code. Every script in jobs/ and every entry point calls this."""
    sys.exit(_run(command, arguments))


def _run(command: click.Command, arguments: list[str] | None) -> int:
    try:
        result = command.main(args=arguments, standalone_mode=False)
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.Abort:
        progress("interrupted")
        return 1
    except click.ClickException as error:
        progress(f"error: {_one_line(error.format_message())} (see --help)")
        return 2
    except UserError as error:
        progress(f"error: {_one_line(str(error))}")
        return 2
    except Exception:
        traceback.print_exc()
        return 1
    if isinstance(result, Mapping):
        print(json.dumps(result, default=_jsonable), flush=True)
        return int(result.get("exit_code", 0)) if "exit_code" in result else 0
    return 0


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _jsonable(value: Any) -> Any:
    if hasattr(value, "item"):  # numpy scalars
        return value.item()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")
