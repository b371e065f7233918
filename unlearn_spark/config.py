"""Validated settings: one YAML file, overridden by `--set key=value`, checked before any work.

Every key is a field of the models below: `als.rank` on the command line is field `rank` of
`AlsSettings`. Unknown keys are refused, and the message suggests the nearest known key.
"""

from __future__ import annotations

import contextlib
import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from unlearn_spark.errors import SettingsError

_ABOVE = Path(__file__).resolve().parent.parent
CHECKOUT = _ABOVE if (_ABOVE / "conf").is_dir() and (_ABOVE / "setup.cfg").exists() else None
"""The checkout that holds this package; None if the package was installed from a wheel."""

_MASTER = r"local(\[.+\])?|local-cluster\[.+\]|yarn|(spark|k8s)://.+"


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class AlsSettings(_Section):
    """How a model is fitted. Objective and scaling as in Spark MLlib's ALS."""

    rank: int = Field(32, ge=1, le=2048)
    """Number of latent factors."""
    reg_param: float = Field(0.05, ge=0, allow_inf_nan=False)
    """lambda; scaled by the number of ratings of each row (ALS-WR)."""
    implicit_prefs: bool = False
    alpha: float = Field(1.0, ge=0, allow_inf_nan=False)
    """Confidence of implicit preferences: c = alpha |r|."""
    nonnegative: bool = False
    tol: float = Field(2.5e-4, gt=0, allow_inf_nan=False)
    """Stop when no factor row's relative residual exceeds this."""
    max_sweeps: int = Field(200, ge=1)
    seed: int = 0
    user_blocks: int | None = Field(None, ge=1, le=65536)
    """Storage blocks of the user side; by default chosen from the number of users."""
    item_blocks: int | None = Field(None, ge=1, le=65536)
    warm_start: int | Literal["latest"] | None = None
    """Model version to start from."""
    memory: int = Field(1, ge=0, le=10)
    """Earlier iterates kept for Anderson acceleration; 0 is plain alternation."""
    dtype: Literal["float32", "float64"] = "float32"
    """Precision of the solves; factors are stored as float32."""


LEAST_TAU, ROOM = 1e-3, 4.0
"""Without `unlearn.tau`, tau is `ROOM` times what the last sweeps reached, at least `LEAST_TAU`."""


class UnlearnSettings(_Section):
    """Which factor rows a night re-solves, and when it sweeps everything instead."""

    tau: float | None = Field(None, gt=0, allow_inf_nan=False)
    """The certificate promises that no row's relative residual on the retained ratings exceeds
    tau. None: derived from the model (`resolved`)."""
    lower_mark: float = Field(0.25, gt=0, le=1)
    """In explicit mode, rounds solve a side down to `lower_mark * tau` once it has a row over tau
    (hysteresis). Whole sweeps go down to this mark in both modes."""
    direct_rows: Literal["resolve", "threshold"] = "resolve"
    """Re-solve every row whose own ratings changed, or only those over tau."""
    max_rounds: int = Field(40, ge=1)
    """Rounds of the frontier loop before whole sweeps take over."""

    def resolved(self, reached: float) -> ResolvedUnlearn:
        """These settings with a definite tau. `reached` is the largest residual that the model's
        last sweeps ended with; 0 if unknown."""
        tau = max(LEAST_TAU, ROOM * reached) if self.tau is None else self.tau
        return ResolvedUnlearn.model_validate({**self.model_dump(), "tau": tau})


class ResolvedUnlearn(UnlearnSettings):
    """`UnlearnSettings` of one night, with a definite tau."""

    tau: float = Field(gt=0, allow_inf_nan=False)

    @property
    def mark(self) -> float:
        """The lower mark, as a residual."""
        return self.lower_mark * self.tau


def _size(value: str | None) -> str | None:
    if value is not None and not re.fullmatch(r"(?i)[1-9][0-9]*[kmgt]b?", value):
        raise ValueError("expected a size with its unit, for example 4g")
    return value


class ExecutionSettings(_Section):
    """Which engine works, and how work is cut. Models do not depend on these settings, apart from
    the rounding of sums."""

    engine: Literal["auto", "embedded", "spark"] = "auto"
    """embedded: in this process. spark: in a Spark session. auto: `engine.choose`."""
    memory: str | None = None
    """Most memory that the embedded engine may need; by default half of the machine's."""
    threads: int | None = Field(None, ge=1, le=1024)
    """Threads of the embedded engine; by default all cores. Results do not depend on them."""
    part_ratings: int = Field(8_000_000, ge=1)
    """Ratings that one task holds at a time (about 8 bytes each, 40 while it sorts them)."""
    checkpoint: Literal["local", "persist"] = "local"
    """How Spark keeps a sweep's state: `local` truncates the plan, `persist` only caches it."""

    _is_memory = field_validator("memory")(_size)


class SparkSettings(_Section):
    """The Spark session. One that already runs gets the `conf` entries that can still change."""

    master: str | None = None
    remote: str | None = None
    """Spark Connect address (`sc://...`); excludes `master`."""
    driver_memory: str = "4g"
    conf: dict[str, str | int | float | bool] = Field(default_factory=dict)

    # Checked here because Spark's JVM would die of a bad value with a page of text.
    @field_validator("master")
    @classmethod
    def _is_master(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(_MASTER, value):
            raise ValueError("expected local[N], yarn, spark://HOST:PORT or k8s://URL")
        return value

    _is_memory = field_validator("driver_memory")(_size)


class Settings(_Section):
    """All settings of a job."""

    root: str | None = None
    """Directory or object-store prefix that holds one folder for each table."""
    catalog: str | None = None
    """`catalog.schema` that holds the tables by name; excludes `root`."""
    als: AlsSettings = AlsSettings()
    unlearn: UnlearnSettings = UnlearnSettings()
    execution: ExecutionSettings = ExecutionSettings()
    spark: SparkSettings = SparkSettings()


def _known_keys(model: type[BaseModel], prefix: str = "") -> Iterable[str]:
    for name, field in model.model_fields.items():
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, _Section):
            yield from _known_keys(annotation, f"{prefix}{name}.")
        else:
            yield prefix + name


def _explain(error: ValidationError, source: str) -> str:
    errors = error.errors()
    first = errors[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        sections = {known.partition(".")[0] for known in _known_keys(Settings)}
        near = difflib.get_close_matches(key, {*_known_keys(Settings), *sections}, n=1)
        hint = f"; did you mean {near[0]}?" if near else "; see conf/local.yaml for the known keys"
        return f"{source}: unknown setting {key}{hint}"
    # Pydantic reports a union field once for each member type and appends the type to the key.
    known = {*_known_keys(Settings), *Settings.model_fields}
    while key not in known and "." in key:
        key = key.rpartition(".")[0]
    same = [e["msg"] for e in errors if (".".join(map(str, e["loc"])) + ".").startswith(key + ".")]
    reason = ", or: ".join(dict.fromkeys(message.removeprefix("Value error, ") for message in same))
    return f"{source}: setting {key} = {first.get('input')!r} is not usable: {reason}"


def parse_override(text: str) -> tuple[list[str], Any]:
    """Split `a.b=value` into its keys and its value, which is read as YAML."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise SettingsError(f"--set {text}: expected key=value, for example als.rank=32")
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError:
        parsed = value
    if isinstance(parsed, str):
        # YAML 1.1 reads 1e-3 (no dot) as text; everybody means the number.
        with contextlib.suppress(ValueError):
            parsed = float(parsed)
    keys = key.strip().split(".")
    if keys[:2] == ["spark", "conf"] and len(keys) > 2:
        keys[2:] = [".".join(keys[2:])]  # names of Spark's settings contain dots
    return keys, parsed


def load_settings(
    path: str | Path | None = None,
    overrides: Iterable[str] = (),
    *,
    tree: Mapping[str, Any] | None = None,
    **top_level: Any,
) -> Settings:
    """Read, merge and validate settings.

    Parameters
    ----------
    path
        YAML file; `None` means defaults only.
    overrides
        `key=value` texts. Later ones win over earlier ones and over the file.
    tree
        Settings as the file has them, which win over it.
    top_level
        Values for `root` or `catalog` that, unless None, win over everything.

    Raises
    ------
    SettingsError
        The file, a key or a value is unusable, or two settings exclude each other.
    """
    source = str(path) if path is not None else "settings"
    read = {} if path is None else _read(path)
    _validate(read, source)
    tree = {**read, **(tree or {})}
    _validate(tree, source)
    for text in overrides:
        keys, value = parse_override(text)
        source = f"--set {text}"
        node = tree
        for key in keys[:-1]:
            child = node.get(key)
            child = dict(child) if isinstance(child, Mapping) else {}
            node[key] = child
            node = child
        node[keys[-1]] = value
        _validate(tree, source)
    if top_level.get("root") is not None:
        tree.pop("catalog", None)
    tree.update({key: value for key, value in top_level.items() if value is not None})
    settings = _validate(tree, source)
    if settings.root is not None and settings.catalog is not None:
        raise SettingsError(f"{source}: give root or catalog, not both")
    if settings.spark.master is not None and settings.spark.remote is not None:
        raise SettingsError(f"{source}: give spark.master or spark.remote, not both")
    return settings


def _read(path: str | Path) -> dict[str, Any]:
    """The settings of a YAML file."""
    try:
        loaded = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(
            f"--conf {path}: cannot be read ({error.strerror}); give a YAML file"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0]
        mark = getattr(error, "problem_mark", None)
        if mark is not None:
            reason = f"line {mark.line + 1}: {getattr(error, 'problem', None) or reason}"
        raise SettingsError(f"--conf {path}: not valid YAML ({reason}); correct it") from error
    if loaded is not None and not isinstance(loaded, Mapping):
        raise SettingsError(f"--conf {path}: expected a mapping of settings at the top")
    return dict(loaded or {})


def _validate(tree: Mapping[str, Any], source: str) -> Settings:
    try:
        return Settings.model_validate(tree)
    except ValidationError as error:
        raise SettingsError(_explain(error, source)) from error
