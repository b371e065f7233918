"""The product in Python: `open(root)` gives an object with a method for every job.

    import unlearn_spark

    shop = unlearn_spark.open("tables", rank=32)
    shop.ingest_ratings("ratings.csv", format="movielens")
    shop.train()
    shop.forget(users=[42])
    assert shop.audit().holds

The jobs on the command line are thin layers over these methods.
"""

from __future__ import annotations

import math
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unlearn_spark import engine as engines
from unlearn_spark.config import AlsSettings, Settings, UnlearnSettings, load_settings
from unlearn_spark.core.training import Progress
from unlearn_spark.errors import InputError, SettingsError
from unlearn_spark.ingestion import rules
from unlearn_spark.preconditions import require_picture

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from numpy.typing import NDArray

    from unlearn_spark.engine import Engine
    from unlearn_spark.tables.models import ModelVersion
    from unlearn_spark.tables.store import Store


class Result(Mapping[str, Any]):
    """Figures of a job: a mapping whose keys are also attributes, as in the job's JSON.

    The exception is `items`, a method of every mapping: `result["items"]` is the figure.
    """

    def __init__(self, figures: Mapping[str, Any]) -> None:
        self._figures = dict(figures)

    def __getitem__(self, key: str) -> Any:
        return self._figures[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._figures)

    def __len__(self) -> int:
        return len(self._figures)

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["_figures"][name]
        except KeyError:
            raise AttributeError(
                f"there is no figure {name}; there are {', '.join(self.__dict__['_figures'])}"
            ) from None

    def __repr__(self) -> str:
        return f"Result({self._figures})"


def silent(message: str) -> None:
    """Report nothing."""


def to_stderr(message: str) -> None:
    """Print one line of progress to stderr."""
    print(message, file=sys.stderr, flush=True)


def open(
    root: str | Path | None = None,
    engine: str = "auto",
    *,
    catalog: str | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> Recommender:
    """Open the tables under a root directory or in a catalog, whether or not there are any yet.

    Parameters
    ----------
    root, catalog
        A directory or object-store URL, or `catalog.schema`; one of the two.
    engine
        auto, embedded or spark (`engine.choose`).
    progress
        Takes lines of progress; by default they go to stderr.
    settings
        By name: those of `als` and `unlearn` without a prefix (rank=32), or whole sections
        (als={"rank": 32}, execution={"threads": 1}).

    Raises
    ------
    SettingsError
        Neither or both of root and catalog are given; a setting is unknown or unusable.
    """
    if root is None and catalog is None:
        raise SettingsError("no place for the tables: give root or catalog")
    sections: dict[str, dict[str, Any]] = {}
    tree: dict[str, Any] = {}
    for name, value in settings.items():
        section = _SECTION_OF.get(name)
        if section is not None:
            sections.setdefault(section, {})[name] = value
        elif name in Settings.model_fields:
            tree[name] = value
        else:
            near = get_close_matches(name, [*_SECTION_OF, *Settings.model_fields], n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(_SECTION_OF)}"
            raise SettingsError(f"unknown setting {name}; {hint}")
    sections["execution"] = {"engine": engine}
    for section, values in sections.items():
        given = tree.get(section, {})
        # What is no mapping is refused with the other unusable settings.
        tree[section] = {**given, **values} if isinstance(given, Mapping) else given
    loaded = load_settings(tree=tree, root=None if root is None else str(root), catalog=catalog)
    return Recommender(loaded, progress or to_stderr)


_SECTION_OF = {
    name: section
    for section, model in (("unlearn", UnlearnSettings), ("als", AlsSettings))
    for name in model.model_fields
}


@dataclass
class Recommender:
    """The tables of one root, and a method for every job.

    Methods return a `Result` whose keys are those of the job's JSON. They raise `UserError` for
    what a user can mend, and `ConflictError` if another job wrote meanwhile.
    """

    settings: Settings
    progress: Progress = silent
    _engine: Any = field(default=None, repr=False)

    # --- the engine --------------------------------------------------------------------------

    def _for(self, need: Callable[[], int] | int = 0) -> Engine:
        """The engine for a job; the embedded one only if it has memory for `need` bytes."""
        if self._engine is None or self._engine.name == "embedded":
            base = self._engine or engines.open_engine(self.settings)
            if base.name == "embedded":
                needed = need(base.store) if callable(need) else need  # type: ignore[call-arg]
                if engines.choose(self.settings, needed) == "spark":
                    base = engines.open_engine(self.settings, needed)
            self._engine = base
        return self._engine

    @property
    def engine(self) -> Engine:
        """The engine that the settings ask for."""
        return self._for()

    @property
    def store(self) -> Store:
        """The tables."""
        return self.engine.store

    def _tables(self) -> Engine:
        return self._for(engines.need_of_tables)  # type: ignore[arg-type]

    def _result(self, engine: Engine, figures: Mapping[str, Any]) -> Result:
        return Result({**figures, "engine": engine.name})

    # --- jobs --------------------------------------------------------------------------------

    def ingest_ratings(
        self, source: Any, format: str | None = None, columns: Mapping[str, str] | None = None
    ) -> Result:
        """Validate ratings and write those that are the newest of their (user, item).

        Parameters
        ----------
        source
            A file, folder or glob; or a table (Arrow, pandas; Spark's on that engine) with
            user_id, item_id, rating and, if known, rated_at.
        format
            One of `ingestion.rules.FORMATS`; needed for paths.
        columns
            By part (user_id, ...) the name of its column, where that differs.
        """
        source, format = _source(source, format, "--format", rules.FORMATS)
        engine = self._for(engines.need_of_input(source))
        report = engine.ingest_ratings(source, format, dict(columns or {}))
        self.progress(
            f"{_name(source)}: {report.read} ratings read, {report.written} written, "
            f"{report.superseded} superseded, {report.quarantined} quarantined"
        )
        return self._result(
            engine,
            {
                "ratings_read": report.read,
                "ratings_written": report.written,
                "superseded": report.superseded,
                "quarantined": report.quarantined,
                "ratings_version": report.version,
            },
        )

    def ingest_tombstones(self, source: Any, format: str | None = None) -> Result:
        """Validate deletion requests and add those that are new; `unlearn` honours them.

        `source` is as for `ingest_ratings`, with request_id, scope and the columns of the scope.
        """
        if isinstance(source, (str, Path)):
            source = str(source)
            rules.check_exists(source)
        engine = self._for(engines.need_of_input(source))
        report = engine.ingest_requests(source, format)
        self.progress(
            f"{_name(source)}: {report.read} requests read, {report.accepted} accepted, "
            f"{report.duplicates} duplicates, {report.quarantined} quarantined"
        )
        return self._result(
            engine,
            {
                "read": report.read,
                "accepted": report.accepted,
                "duplicates": report.duplicates,
                "quarantined": report.quarantined,
                "tombstones_version": report.version,
            },
        )

    def train(self, plot: str | None = None) -> Result:
        """Fit a model to the ratings table and publish it; `plot` names a picture to draw."""
        if plot:
            require_picture(plot)
        started = time.perf_counter()
        engine, als = self._tables(), self.settings.als
        version, summary = engine.train(self.progress)
        if not summary.converged:
            self.progress(
                f"stopped at als.max_sweeps = {als.max_sweeps} with residual "
                f"{summary.max_residual:.2e}; als.tol = {als.tol:.2e} was not reached"
            )
        if plot:
            from unlearn_spark.evaluation.plots import convergence

            convergence(summary.history, plot)
        figures = {f.name: getattr(summary, f.name) for f in fields(summary)}
        figures.pop("history")
        return self._result(
            engine,
            {
                "model_version": version.model_version,
                **figures,
                "seconds": time.perf_counter() - started,
            },
        )

    def import_model(self, source: str | Path, format: str, converge: bool = False) -> Result:
        """Publish factors that were trained elsewhere on the ratings of the table.

        `converge`: sweep until no residual exceeds `als.tol`, starting from these factors.
        """
        rules.check_exists(str(source))
        engine = self._tables()
        return self._result(
            engine, engine.import_factors(str(source), format, converge, self.progress)
        )

    def unlearn(self) -> Result:
        """Honour all pending requests and publish a model without what they cover."""
        engine = self._tables()
        return self._result(engine, engine.run_night("unlearn", self.progress))

    def update(self) -> Result:
        """Fold in ratings that were ingested since the published version; honour requests too."""
        engine = self._tables()
        return self._result(engine, engine.run_night("update", self.progress))

    def forget(
        self,
        users: Iterable[Any] = (),
        items: Iterable[Any] = (),
        pairs: Iterable[tuple[Any, Any]] = (),
    ) -> Result:
        """Make a request for each of these users, items and (user, item) pairs, and honour them.

        Raises
        ------
        InputError
            Nothing is named, or an id is not in the form of the table's ids; nothing was done.
        """
        import pyarrow as pa

        wanted = [("user", user, None) for user in users]
        wanted += [("item", None, item) for item in items]
        wanted += [("rating", user, item) for user, item in pairs]
        if not wanted:
            raise InputError("forget: name users, items or pairs")
        batch = uuid.uuid4().hex[:12]
        texts = [[None if id is None else str(id) for id in row[1:]] for row in wanted]
        requests = pa.table(
            {
                "request_id": [f"{batch}-{number}" for number in range(len(wanted))],
                "scope": [row[0] for row in wanted],
                "user_id": pa.array([row[0] for row in texts], pa.string()),
                "item_id": pa.array([row[1] for row in texts], pa.string()),
            }
        )
        report = self.ingest_tombstones(requests)
        if report.quarantined:
            raise InputError(
                f"forget: {report.quarantined} of {report.read} ids are not in the form of the "
                "table's ids; the others are accepted, run unlearn() for them"
            )
        return self.unlearn()

    def audit(
        self,
        model_version: int | None = None,
        *,
        retrain: bool = False,
        seeds: int = 3,
        held_out: str | None = None,
        held_out_format: str = "csv",
        plot: str | None = None,
    ) -> Result:
        """Compute every row's residual anew from the ratings, and compare it with the promises.

        `retrain`: also train models without the deleted ratings and compare this one with them.
        """
        from unlearn_spark.tables import audits

        engine, model = self._tables(), self.model(model_version)
        comparing = None
        if retrain:  # refuses before the scan, which takes minutes
            comparing = engine.prepare_comparison(
                model, held_out, held_out_format, plot, self.progress
            )
        self.progress(f"auditing model version {model.model_version}")
        found = engine.audit(model)
        audits.append(engine.store, found)
        figures: dict[str, Any] = {
            "model_version": found.model_version,
            "max_residual": {
                side: residual if math.isfinite(residual) else None
                for side, residual in found.max_residual.items()
            },
            "ledger_holds": found.ledger_holds,
            "tombstoned_ratings_found": found.tombstoned_ratings_found,
            "tau": found.tau,
            "floor": found.floor,
            "holds": found.holds,
            "rows": found.rows,
            "rows_without_ratings": found.rows_without_ratings,
            "ratings_without_rows": found.ratings_without_rows,
        }
        if comparing is not None:
            figures["comparison"] = comparing(seeds)
        if not found.holds:
            self.progress(f"model version {found.model_version} fails: {'; '.join(found.failures)}")
            figures["exit_code"] = 1
        return self._result(engine, figures)

    def recommend(
        self,
        top: int = 10,
        users: Iterable[Any] | None = None,
        model_version: int | None = None,
        exclude_seen: bool = True,
        output: str | None = None,
    ) -> Result:
        """Write the best items of all users, or of some, to the table recommendations.

        `output`: a directory instead: x.csv, x.parquet, or else a Delta table.
        """
        from unlearn_spark.tables import recommendations

        if output is not None:
            recommendations.check_export(output)
        engine, model = self._tables(), self.model(model_version)
        named = None if users is None else list(dict.fromkeys(str(user) for user in users))
        found = engine.recommend(model, top, named, exclude_seen, output, self.progress)
        unknown = found.pop("unknown_users", [])
        return self._result(
            engine,
            {
                "users": found["users"],
                "rows": found["rows"],
                "model_version": model.model_version,
                "output": found["output"],
                **({"unknown_users": unknown} if unknown else {}),
            },
        )

    def evaluate(
        self,
        source: Any = None,
        format: str | None = None,
        columns: Mapping[str, str] | None = None,
        *,
        model_version: int | None = None,
        split: float | None = None,
        split_seed: int = 0,
        k: int = 10,
        min_rating: float | None = None,
    ) -> Result:
        """Measure held-out quality: of a published model on `source`, or of the settings on a
        `split` of the ratings table (nothing is published)."""
        if (source is None) == (split is None):
            raise SettingsError("give exactly one of --input and --split")
        if split is not None and model_version is not None:
            raise SettingsError("--split fits a model of its own; leave out --model-version")
        engine = self._tables()
        if split is not None:
            found = engine.evaluate_split(split, split_seed, k, min_rating, self.progress)
            return self._result(engine, {"model_version": None, **found})
        source, format = _source(source, format, "--format", rules.FORMATS)
        model = self.model(model_version)
        found = engine.evaluate(model, source, format, dict(columns or {}), k, min_rating)
        return self._result(engine, {"model_version": model.model_version, **found})

    def rollback(self, to: int) -> Result:
        """Publish an earlier version again, as the newest one."""
        from unlearn_spark.publishing import roll_back

        engine = self.engine
        version = roll_back(engine.store, to)
        return self._result(
            engine,
            {
                "model_version": version.model_version,
                "parent": version.parent,
                "rolled_back_to": to,
            },
        )

    def predict(
        self, users: Iterable[Any], items: Iterable[Any], model_version: int | None = None
    ) -> NDArray[np.float64]:
        """Predicted ratings of (user, item) pairs, float64 (n,); NaN where the model lacks one.

        Parameters
        ----------
        users, items
            Ids, as many of the one as of the other; text counts as the id that is written so.

        Raises
        ------
        InputError
            There are more of the one than of the other.
        """
        import pyarrow as pa

        columns = {"user_id": _ids(users), "item_id": _ids(items)}
        n_users, n_items = (len(column) for column in columns.values())
        if n_users != n_items:
            raise InputError(f"predict: {n_users} users and {n_items} items; give pairs")
        pairs = pa.table(columns)
        engine = self._tables()
        return engine.predict(self.model(model_version), pairs)

    # --- reading -----------------------------------------------------------------------------

    def model(self, model_version: int | None = None) -> ModelVersion:
        """A published version, the newest by default."""
        from unlearn_spark.tables import models

        return models.published(self.store, model_version)

    def table(self, name: str) -> pa.Table:
        """All rows of one of the tables, in Arrow."""
        return self.store.arrow(name)


def _source(
    source: Any, format: str | None, option: str, formats: tuple[str, ...]
) -> tuple[Any, str]:
    """The input as engines take it, and its format (tables: parquet)."""
    if not isinstance(source, (str, Path)):
        return source, "parquet"
    rules.check_exists(str(source))
    if format is None:
        raise SettingsError(f"{option}: say which of {', '.join(formats)} the input is")
    return str(source), format


def _ids(ids: Iterable[Any]) -> pa.Array:
    """Ids in Arrow; as text if they are of several types."""
    import pyarrow as pa

    values = list(ids)
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        return pa.array([str(value) for value in values])


def _name(source: Any) -> str:
    return source if isinstance(source, str) else rules.GIVEN_TABLE
