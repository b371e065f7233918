"""What the pages say is what the code does.

Every command in a ```bash block is taken through the job's own parser without being run; make
targets, links, headings and the modules that are named exist; the settings table is complete and
its defaults are true. The README's first Python example and the notebook are run.
"""

from __future__ import annotations

import ast
import functools
import inspect
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from click.testing import CliRunner

import unlearn_spark
from unlearn_spark import config
from unlearn_spark.__main__ import JOBS as COMMANDS
from unlearn_spark.engine import SPARK_VARIABLES
from unlearn_spark.evaluation import synthetic

REPOSITORY = Path(__file__).resolve().parent.parent
README = REPOSITORY / "README.md"
DESIGN = REPOSITORY / "docs" / "design.md"
NOTEBOOK = REPOSITORY / "notebooks" / "quickstart.py"
PAGES = [README, *sorted((REPOSITORY / "docs").glob("*.md"))]
JOBS = sorted({*COMMANDS, *(path.stem for path in (REPOSITORY / "jobs").glob("*.py"))})

_JOB = re.compile(r"^jobs/(\w+)\.py$")
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_STOPS = {"|", "||", "&&", ";", "&", ">", ">>", "2>", "<"}


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of one language."""
    return [m[2] for m in _FENCE.finditer(page.read_text("utf-8")) if m[1] == language]


def commands(script: str) -> Iterator[list[str]]:
    """The commands of a shell script as words; continued lines joined, here-documents left out."""
    lines = iter(script.replace("\\\n", " ").splitlines())
    for line in lines:
        here = re.search(r"<<-?\s*['\"]?(\w+)", line)
        if here:
            for body in lines:
                if body.strip() == here[1]:
                    break
            line = line[: here.start()]
        words: list[str] = []
        for word in shlex.split(line, comments=True):
            if word in _STOPS:
                if words:
                    yield words
                words = []
            else:
                words.append(word)
        if words:
            yield words


def load_job(name: str) -> click.Command:
    """The click command of jobs/<name>.py."""
    path = REPOSITORY / "jobs" / f"{name}.py"
    assert path.exists(), f"jobs/{name}.py is named but does not exist"
    return COMMANDS[name]


def parse(name: str, arguments: list[str]) -> None:
    """Take arguments through a job's parser and its settings, without running the job."""
    context = load_job(name).make_context(name, list(arguments))
    config.load_settings(None, context.params["overrides"])
    conf = context.params["conf"]
    if conf is not None and "$" not in conf:
        config.load_settings(REPOSITORY / conf, context.params["overrides"])


def job_call(words: list[str]) -> tuple[str, list[str]] | None:
    """The job and the arguments of a command; None if it runs no job."""
    for place, word in enumerate(words):
        match = _JOB.match(word)
        if match:
            return match[1], words[place + 1 :]
        if Path(word).name == "unlearn-spark":
            return words[place + 1], words[place + 2 :]
    return None


def job_calls() -> list[Any]:
    found = []
    for page in PAGES:
        for script in blocks(page, "bash"):
            for words in commands(script):
                call = job_call(words)
                if call is not None:
                    name, arguments = call
                    text = f"{page.name}: {name} {' '.join(arguments)}"
                    found.append(pytest.param(name, arguments, id=text))
    return found


def without_fences(page: Path) -> str:
    return _FENCE.sub("", page.read_text("utf-8"))


def anchors(page: Path) -> set[str]:
    """The fragments of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", without_fences(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in headings}


@pytest.mark.parametrize(("name", "arguments"), job_calls())
def test_commands_on_the_pages_parse(name, arguments):
    parse(name, arguments)


def test_the_readme_shows_the_whole_way():
    shown = [parameters.values[0] for parameters in job_calls()]
    way = [
        "generate_ratings",
        "ingest_ratings",
        "train",
        "recommend",
        "ingest_tombstones",
        "unlearn",
        "audit",
    ]
    places = [shown.index(name) for name in way]
    assert places == sorted(places)


def test_a_wrong_option_would_be_noticed():
    """The parser above is strict about options, values and settings."""
    with pytest.raises(click.NoSuchOption):
        parse("train", ["--no-such-option"])
    with pytest.raises(click.BadParameter):
        parse("recommend", ["--top", "many"])
    with pytest.raises(click.MissingParameter):
        parse("recommend", [])
    with pytest.raises(config.SettingsError):
        parse("train", ["--set", "als.rnk=3"])
    script = "cat > x <<'END'\njobs/no.py --x\nEND\nmake a \\\n  b && make c # d\n"
    assert list(commands(script)) == [["cat"], ["x"], ["make", "a", "b"], ["make", "c"]]
    assert job_call(["spark-submit", "jobs/train.py", "--x"]) == ("train", ["--x"])
    assert job_call([".venv/bin/unlearn-spark", "train", "--x"]) == ("train", ["--x"])
    assert job_call(["pip", "install", "unlearn-spark[spark]"]) is None


def test_make_targets_exist():
    makefile = (REPOSITORY / "Makefile").read_text("utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    named = set()
    for page in PAGES:
        for script in blocks(page, "bash"):
            for words in commands(script):
                if words[0] == "make":
                    named.update(word for word in words[1:] if "=" not in word)
        named.update(re.findall(r"`make ([a-z-]+)`", without_fences(page)))
    assert {"demo", "test"} <= named
    assert named <= targets, f"named on the pages, not in the Makefile: {named - targets}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    targets = re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", without_fences(page))
    assert targets, "a page without a link is a dead end"
    for target in targets:
        if "://" in target:
            continue
        path, _, fragment = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f"{page.name}: {target} does not exist"
        if fragment:
            assert fragment in anchors(linked), f"{page.name}: {target} has no such heading"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_are_named_exist(page):
    named = re.findall(r"`((?:jobs|conf|docs|notebooks|tests)/[\w./-]+)`", without_fences(page))
    missing = sorted({name for name in named if not (REPOSITORY / name).exists()})
    assert not missing, f"{page.name} names {missing}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_modules_that_are_named_exist(page):
    package = REPOSITORY / "unlearn_spark"
    folders = "|".join(path.name for path in package.iterdir() if path.is_dir())
    text = without_fences(page)
    named = re.findall(rf"`(?:unlearn_spark/)?((?:{folders})/[\w./-]*)`", text)
    named += re.findall(r"`unlearn_spark/([\w./-]+)`", text)
    missing = sorted({name for name in named if not (package / name).exists()})
    missing = [name for name in missing if not (REPOSITORY / name).exists()]
    assert not missing, f"{page.name} names {missing}"


@pytest.mark.parametrize(
    "page", [README, REPOSITORY / "docs" / "design.md"], ids=lambda page: page.name
)
def test_the_tree_of_a_page_exists(page):
    """Folders end with a slash; what is indented lies in the folder above it."""
    (tree,) = [block for block in blocks(page, "") if block.startswith("unlearn_spark/")]
    folders = [REPOSITORY]
    for line in tree.splitlines():
        depth = (len(line) - len(line.lstrip(" "))) // 2
        path = folders[depth] / line.split()[0]
        assert path.exists(), f"the tree of {page.name} names {path.relative_to(REPOSITORY)}"
        folders = [*folders[: depth + 1], path]


def test_the_settings_table_is_complete_and_true():
    section = README.read_text("utf-8").split("\n## Settings\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `([\w.]+)` \| `([^`]+)` \|", section, re.MULTILINE)
    assert len(rows) == len(dict(rows))
    assert set(dict(rows)) == set(config._known_keys(config.Settings))
    for key, text in rows:
        value: Any = config.Settings()
        for part in key.split("."):
            value = getattr(value, part)
        _, shown = config.parse_override(f"{key}={text}")
        assert shown == value, f"{key}: the README says {text}, the default is {value}"
        assert isinstance(shown, bool) == isinstance(value, bool)


def test_the_exit_codes_are_those_of_the_command_line(monkeypatch, capsys):
    from unlearn_spark import cli
    from unlearn_spark.errors import ConflictError, InputError

    section = README.read_text("utf-8").split("\n## Exit codes\n")[1].split("\n## ")[0]
    codes = [int(code) for code in re.findall(r"^\| (\d) \|", section, re.MULTILINE)]
    outcomes: list[Any] = [None, ConflictError("again"), InputError("bad row")]

    def ending(outcome):
        @cli.job("A job.")
        def main(context):
            if outcome is not None:
                raise outcome
            return {"done": True}

        return cli._run(main, [])

    assert [ending(outcome) for outcome in outcomes] == codes


@pytest.mark.parametrize(
    "engine", ["embedded", pytest.param("spark", marks=[pytest.mark.spark, pytest.mark.slow])]
)
def test_the_first_python_example_forgets_and_holds(engine, request, tmp_path, monkeypatch):
    if engine == "spark":
        request.getfixturevalue("spark")
    synthetic.write(users=60, items=40, ratings=600, seed=0, output=tmp_path / "ratings.csv")
    monkeypatch.chdir(tmp_path)
    # The session of other tests would choose Spark.
    monkeypatch.setattr(unlearn_spark, "open", functools.partial(unlearn_spark.open, engine=engine))
    example = blocks(README, "python")[0]
    assert len([line for line in example.splitlines() if line]) == 10
    names: dict[str, Any] = {}
    exec(compile(example, "README.md", "exec"), names)
    assert names["audit"].engine == engine
    assert names["audit"].model_version == 2
    assert names["night"].requests == 2
    assert names["night"].ratings_removed > 1


def test_the_estimators_example_uses_real_parameters():
    from unlearn_spark.als import ALS, ALSModel

    example = blocks(README, "python")[1]
    methods = {"fit": ALS, "transform": ALSModel, "recommendForAllUsers": ALSModel}
    called = set()
    for node in ast.walk(ast.parse(example)):
        if not isinstance(node, ast.Call):
            continue
        keywords = {keyword.arg for keyword in node.keywords}
        if isinstance(node.func, ast.Name) and node.func.id == "ALS":
            assert keywords <= {parameter.name for parameter in ALS().params}
            called.add("ALS")
        elif isinstance(node.func, ast.Attribute):
            method = getattr(methods[node.func.attr], node.func.attr)
            assert keywords <= set(inspect.signature(method).parameters)
            called.add(node.func.attr)
    assert called == {"ALS", *methods}


def test_the_notebook_is_a_databricks_source_and_runs(tmp_path):
    text = NOTEBOOK.read_text("utf-8")
    assert text.startswith("# Databricks notebook source\n")
    assert text.count("# COMMAND ----------") >= 5
    environment = {key: value for key, value in os.environ.items() if key not in SPARK_VARIABLES}
    environment["TMPDIR"] = str(tmp_path)
    # A process of its own: the session of other tests would choose Spark.
    answer = subprocess.run(
        [sys.executable, str(NOTEBOOK)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=environment,
    )
    assert answer.returncode == 0, answer.stderr
    assert "'engine': 'embedded'" in answer.stdout
    assert "26 ratings removed" in answer.stdout


@pytest.mark.parametrize("name", JOBS)
def test_every_job_answers_help(name):
    answer = CliRunner().invoke(load_job(name), ["--help"])
    assert answer.exit_code == 0, answer.output
    for option in ("--conf", "--root", "--set", "--engine"):
        assert option in answer.output


@pytest.mark.parametrize("name", JOBS)
def test_a_file_of_a_job_runs_that_job(name):
    text = (REPOSITORY / "jobs" / f"{name}.py").read_text("utf-8")
    assert text.endswith(
        f"""from unlearn_spark.cli import run
from unlearn_spark.jobs.{name} import main

if __name__ == "__main__":
    run(main)
"""
    )


def test_a_script_and_the_command_answer_in_processes_of_their_own():
    script = [sys.executable, str(REPOSITORY / "jobs" / "train.py"), "--help"]
    command = [sys.executable, "-m", "unlearn_spark", "train", "--help"]
    for words in (script, command):
        answer = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
        assert answer.returncode == 0, answer.stderr
        assert "--root" in answer.stdout


def test_every_job_and_setting_section_is_in_the_readme():
    text = README.read_text("utf-8")
    rows = text.split("| job | keys of its JSON |")[1].split("\n\n")[0]
    listed = re.findall(r"`(\w+)`", " ".join(re.findall(r"^\| (.+?) \|", rows, re.MULTILINE)))
    assert sorted(listed) == JOBS
    for path in sorted((REPOSITORY / "conf").glob("*.yaml")):
        config.Settings.model_validate(yaml.safe_load(path.read_text("utf-8")))
