"""The command line that all jobs share: options, exit codes, and one JSON object at the end.

Exit codes: 0 done; 2 bad input or settings, with one line on stderr; 1 any other failure. A job
that lost against another one ends with 1 and one line.
"""

from __future__ import annotations

import inspect
import json
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import click

from unlearn_spark.config import CHECKOUT, load_settings
from unlearn_spark.errors import ConflictError, UserError
from unlearn_spark.recommender import Recommender, to_stderr

DEFAULT_CONF = CHECKOUT / "conf" / "local.yaml" if CHECKOUT else None


progress = to_stderr


def job(summary: str) -> Callable[[Callable[..., Mapping[str, Any]]], click.Command]:
    """Turn `main(recommender, **options) -> mapping` into a job's command.

    Adds `--conf`, `--root`, `--set` and `--engine`; the returned mapping becomes the last line on
    stdout.
    """

    def decorate(main: Callable[..., Mapping[str, Any]]) -> click.Command:
        def callback(
            conf: str | None,
            root: str | None,
            overrides: tuple[str, ...],
            engine: str | None,
            **options: Any,
        ) -> Mapping[str, Any]:
            if engine is not None:
                overrides = (*overrides, f"execution.engine={engine}")
            settings = load_settings(conf, overrides, root=root)
            return main(Recommender(settings, progress), **options)

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
                click.Option(
                    ["--engine"],
                    type=click.Choice(["auto", "embedded", "spark"]),
                    help="embedded: this process. spark: a Spark session.  [default: auto]",
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
    except ConflictError as error:
        progress(f"error: {_one_line(str(error))}")
        return 1
    except Exception:
        traceback.print_exc()
        return 1
    if isinstance(result, Mapping):
        print(json.dumps(dict(result), default=_jsonable), flush=True)
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
