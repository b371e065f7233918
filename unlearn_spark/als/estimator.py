"""`ALS` and `ALSModel` with the parameters and columns of `pyspark.ml.recommendation`.

They work in `Pipeline`, `CrossValidator` and `TrainValidationSplit`. To switch, change the import:

    from unlearn_spark.als import ALS

    model = ALS(rank=32, regParam=0.05, userCol="user_id", itemCol="item_id").fit(ratings)
    model.recommendForAllUsers(10, excludeSeen=ratings)

Three things differ: ids may be of any type, an iteration is an accelerated sweep, and fitting stops
early once no factor row's relative residual exceeds `tol`.
"""

# ruff: noqa: N815  (parameters are named as in MLlib)

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from pydantic import ValidationError
from pyspark import keyword_only
from pyspark.errors import AnalysisException
from pyspark.ml import Estimator, Model
from pyspark.ml.param import Param, Params, TypeConverters
from pyspark.ml.param.shared import (
    HasBlockSize,
    HasCheckpointInterval,
    HasMaxIter,
    HasPredictionCol,
    HasRegParam,
    HasSeed,
)
from pyspark.ml.util import (
    DefaultParamsReadable,
    DefaultParamsReader,
    DefaultParamsWriter,
    MLReadable,
    MLReader,
    MLWritable,
    MLWriter,
)
from pyspark.sql import functions as F
from pyspark.sql.types import ArrayType, FloatType, StructField, StructType
from pyspark.storagelevel import StorageLevel

from unlearn_spark.config import AlsSettings, ExecutionSettings
from unlearn_spark.core.training import TrainingSummary
from unlearn_spark.errors import InputError, SettingsError
from unlearn_spark.spark.scoring import predict_pairs, require_ids, top_n
from unlearn_spark.spark.training.training import fit_factors
from unlearn_spark.tables.delta_spark import quoted

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

_SETTINGS = {
    "rank": "rank",
    "maxIter": "max_sweeps",
    "regParam": "reg_param",
    "numUserBlocks": "user_blocks",
    "numItemBlocks": "item_blocks",
    "implicitPrefs": "implicit_prefs",
    "alpha": "alpha",
    "nonnegative": "nonnegative",
    "seed": "seed",
    "tol": "tol",
}
"""MLlib's parameter names and the fields of `AlsSettings` that they set."""


def _param(name: str, doc: str, converter: Any) -> Param[Any]:
    return Param(Params._dummy(), name, doc, typeConverter=converter)


class _ModelParams(HasPredictionCol, HasBlockSize):
    """Parameters that the estimator and its model share."""

    userCol: Param[str] = _param(
        "userCol", "column of user ids, of any type", TypeConverters.toString
    )
    itemCol: Param[str] = _param(
        "itemCol", "column of item ids, of any type", TypeConverters.toString
    )
    coldStartStrategy: Param[str] = _param(
        "coldStartStrategy",
        "what to do with rows whose user or item the model does not know: 'nan' or 'drop'",
        TypeConverters.toString,
    )

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._setDefault(userCol="user", itemCol="item", coldStartStrategy="nan", blockSize=4096)

    def getUserCol(self) -> str:
        """Column of user ids."""
        return self.getOrDefault(self.userCol)

    def getItemCol(self) -> str:
        """Column of item ids."""
        return self.getOrDefault(self.itemCol)

    def getColdStartStrategy(self) -> str:
        """What to do with rows with unknown ids: nan or drop."""
        return self.getOrDefault(self.coldStartStrategy)

    def setUserCol(self, value: str) -> Any:
        """Set the column of user ids."""
        return self._set(userCol=value)

    def setItemCol(self, value: str) -> Any:
        """Set the column of item ids."""
        return self._set(itemCol=value)

    def setColdStartStrategy(self, value: str) -> Any:
        """Set what to do with rows with unknown ids: nan or drop."""
        return self._set(coldStartStrategy=value)

    def setPredictionCol(self, value: str) -> Any:
        """Set the column that predictions go to."""
        return self._set(predictionCol=value)

    def setBlockSize(self, value: int) -> Any:
        """Set how many query rows a task scores at a time."""
        return self._set(blockSize=value)


class _FitParams(_ModelParams, HasMaxIter, HasRegParam, HasCheckpointInterval, HasSeed):
    """Parameters that only the estimator has."""

    rank: Param[int] = _param("rank", "number of latent factors", TypeConverters.toInt)
    numUserBlocks: Param[int] = _param(
        "numUserBlocks", "number of user blocks", TypeConverters.toInt
    )
    numItemBlocks: Param[int] = _param(
        "numItemBlocks", "number of item blocks", TypeConverters.toInt
    )
    implicitPrefs: Param[bool] = _param(
        "implicitPrefs", "whether ratings are implicit preferences", TypeConverters.toBoolean
    )
    alpha: Param[float] = _param(
        "alpha", "confidence of implicit preferences is alpha |r|", TypeConverters.toFloat
    )
    ratingCol: Param[str] = _param(
        "ratingCol", "column of ratings; empty: every rating is 1", TypeConverters.toString
    )
    nonnegative: Param[bool] = _param(
        "nonnegative", "whether factors are held at or above 0", TypeConverters.toBoolean
    )
    intermediateStorageLevel: Param[str] = _param(
        "intermediateStorageLevel",
        "StorageLevel of the ratings while fitting; cannot be NONE",
        TypeConverters.toString,
    )
    finalStorageLevel: Param[str] = _param(
        "finalStorageLevel", "StorageLevel of the model's factors", TypeConverters.toString
    )
    tol: Param[float] = _param(
        "tol",
        "fitting stops once no factor row's relative residual exceeds this",
        TypeConverters.toFloat,
    )

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._setDefault(
            rank=10,
            maxIter=10,
            regParam=0.1,
            numUserBlocks=10,
            numItemBlocks=10,
            implicitPrefs=False,
            alpha=1.0,
            ratingCol="rating",
            nonnegative=False,
            checkpointInterval=10,
            intermediateStorageLevel="MEMORY_AND_DISK",
            finalStorageLevel="MEMORY_AND_DISK",
            tol=2.5e-4,
            # pyspark's own default is Python's hash of the class name, which varies by process.
            seed=0,
        )

    def getRank(self) -> int:
        """Number of latent factors."""
        return self.getOrDefault(self.rank)

    def getNumUserBlocks(self) -> int:
        """Number of user blocks."""
        return self.getOrDefault(self.numUserBlocks)

    def getNumItemBlocks(self) -> int:
        """Number of item blocks."""
        return self.getOrDefault(self.numItemBlocks)

    def getImplicitPrefs(self) -> bool:
        """Whether ratings are implicit preferences."""
        return self.getOrDefault(self.implicitPrefs)

    def getAlpha(self) -> float:
        """Confidence of implicit preferences is alpha |r|."""
        return self.getOrDefault(self.alpha)

    def getRatingCol(self) -> str:
        """Column of ratings; empty: every rating is 1."""
        return self.getOrDefault(self.ratingCol)

    def getNonnegative(self) -> bool:
        """Whether factors are held at or above 0."""
        return self.getOrDefault(self.nonnegative)

    def getIntermediateStorageLevel(self) -> str:
        """StorageLevel of the ratings while fitting."""
        return self.getOrDefault(self.intermediateStorageLevel)

    def getFinalStorageLevel(self) -> str:
        """StorageLevel of the model's factors."""
        return self.getOrDefault(self.finalStorageLevel)

    def getTol(self) -> float:
        """Fitting stops once no factor row's relative residual exceeds this."""
        return self.getOrDefault(self.tol)


class _Writer(MLWriter):
    """Writes metadata in pyspark.ml's format, and a model's factors as Parquet beside it.

    It uses no Java object, so it also works over Spark Connect.
    """

    def __init__(self, instance: ALS | ALSModel) -> None:
        super().__init__()
        self.instance = instance

    def save(self, path: str) -> None:
        """Write to a path, which must not exist unless `overwrite()` was called."""
        mode = "overwrite" if self.shouldOverwrite else "error"
        spark = self.sparkSession
        extra = None
        if isinstance(self.instance, ALSModel):
            summary = self.instance.summary
            extra = {"rank": self.instance.rank, "summary": summary and asdict(summary)}
            # MLlib uses the same folder names.
            factors = {
                f"{path}/userFactors": self.instance.userFactors,
                f"{path}/itemFactors": self.instance.itemFactors,
            }
            for place, rows in factors.items():
                if set(rows.inputFiles()) & _files(spark, place):
                    raise InputError(f"{path}: the model is read from there; save it elsewhere")
            # Empty metadata first, the real last: if this dies, nobody reads half of an old model.
            self._write_metadata(path, [], mode)
            for place, rows in factors.items():
                rows.write.mode(mode).parquet(place)
            mode = "overwrite"
        text = DefaultParamsWriter._get_metadata_to_save(self.instance, spark, extra)
        self._write_metadata(path, [text], mode)

    def _write_metadata(self, path: str, lines: list[str], mode: str) -> None:
        # Through Arrow, for the same reason as `Store.frame`.
        table = pa.table({"value": pa.array(lines, pa.string())})
        metadata = self.sparkSession.createDataFrame(table).coalesce(1)
        metadata.write.mode(mode).text(f"{path}/metadata")


def _files(spark: SparkSession, path: str) -> set[str]:
    """The files of a Parquet folder, named as by `DataFrame.inputFiles`; none if it is missing."""
    try:
        return set(spark.read.parquet(path).inputFiles())
    except AnalysisException:  # no such folder
        return set()


def _first_line(spark: SparkSession, path: str) -> str | None:
    """The first line of a text folder; None if it has no line or is missing."""
    try:
        row = spark.read.text(path).first()
    except AnalysisException as error:
        if error.getCondition() != "PATH_NOT_FOUND":
            raise
        return None
    return None if row is None else str(row["value"])


class _ModelReader(MLReader["ALSModel"]):
    """Reads what `_Writer` wrote."""

    def load(self, path: str) -> ALSModel:
        """Read a model.

        Raises
        ------
        InputError
            The path holds nothing, or something other than an ALSModel of this package.
        """
        spark = self.sparkSession
        line = _first_line(spark, f"{path}/metadata")
        if line is None:
            raise InputError(f"{path}: no model here, or saving it never ended; save it again")
        metadata = json.loads(line)
        expected = f"{ALSModel.__module__}.{ALSModel.__name__}"
        if metadata["class"] != expected:
            raise InputError(
                f"{path}: holds a {metadata['class']}, not a {expected}; load it with its own class"
            )
        summary = metadata.get("summary")
        model = ALSModel(
            metadata["rank"],
            spark.read.parquet(f"{path}/userFactors"),
            spark.read.parquet(f"{path}/itemFactors"),
            TrainingSummary(**summary) if summary else None,
        )
        model._resetUid(metadata["uid"])
        DefaultParamsReader.getAndSetParams(model, metadata)
        return model


class ALS(Estimator["ALSModel"], _FitParams, MLWritable, DefaultParamsReadable["ALS"]):
    """Alternating least squares, explicit or implicit, with MLlib's objective.

    Regularisation is scaled by each row's number of ratings (Zhou et al. 2008); implicit
    preferences follow Hu, Koren and Volinsky (2008).

    Parameters
    ----------
    rank, regParam, implicitPrefs, alpha, nonnegative, userCol, itemCol, ratingCol, seed,
    coldStartStrategy, intermediateStorageLevel, finalStorageLevel
        As in MLlib. The seed is 0 unless set. With `finalStorageLevel="NONE"` every use of the
        factors computes them anew.
    maxIter
        Maximum number of accelerated sweeps; fitting ends earlier at `tol`.
    tol
        Fitting stops once no factor row's relative residual exceeds this.
    numUserBlocks, numItemBlocks
        Into how many blocks the work is cut. The starting factors do not depend on it.
    blockSize
        Query rows that a task scores at a time in the `recommendFor...` methods.
    checkpointInterval
        Accepted for compatibility; every sweep truncates its plan anyway.

    `fit` raises InputError for null ids, null ratings and ratings that are not finite. Repeated
    pairs are separate ratings, as in MLlib.
    """

    _input_kwargs: dict[str, Any]

    @keyword_only
    def __init__(
        self,
        *,
        rank: int = 10,
        maxIter: int = 10,
        regParam: float = 0.1,
        numUserBlocks: int = 10,
        numItemBlocks: int = 10,
        implicitPrefs: bool = False,
        alpha: float = 1.0,
        userCol: str = "user",
        itemCol: str = "item",
        seed: int | None = None,
        ratingCol: str = "rating",
        nonnegative: bool = False,
        checkpointInterval: int = 10,
        intermediateStorageLevel: str = "MEMORY_AND_DISK",
        finalStorageLevel: str = "MEMORY_AND_DISK",
        coldStartStrategy: str = "nan",
        blockSize: int = 4096,
        tol: float = 2.5e-4,
    ) -> None:
        super().__init__()
        self._set(**self._input_kwargs)

    @keyword_only
    def setParams(
        self,
        *,
        rank: int = 10,
        maxIter: int = 10,
        regParam: float = 0.1,
        numUserBlocks: int = 10,
        numItemBlocks: int = 10,
        implicitPrefs: bool = False,
        alpha: float = 1.0,
        userCol: str = "user",
        itemCol: str = "item",
        seed: int | None = None,
        ratingCol: str = "rating",
        nonnegative: bool = False,
        checkpointInterval: int = 10,
        intermediateStorageLevel: str = "MEMORY_AND_DISK",
        finalStorageLevel: str = "MEMORY_AND_DISK",
        coldStartStrategy: str = "nan",
        blockSize: int = 4096,
        tol: float = 2.5e-4,
    ) -> ALS:
        """Set the given parameters; leave the others."""
        return self._set(**self._input_kwargs)

    def setRank(self, value: int) -> ALS:
        """Set the number of latent factors."""
        return self._set(rank=value)

    def setMaxIter(self, value: int) -> ALS:
        """Set the maximum number of sweeps."""
        return self._set(maxIter=value)

    def setRegParam(self, value: float) -> ALS:
        """Set the regularisation parameter lambda."""
        return self._set(regParam=value)

    def setNumUserBlocks(self, value: int) -> ALS:
        """Set the number of user blocks."""
        return self._set(numUserBlocks=value)

    def setNumItemBlocks(self, value: int) -> ALS:
        """Set the number of item blocks."""
        return self._set(numItemBlocks=value)

    def setNumBlocks(self, value: int) -> ALS:
        """Set the number of blocks of both sides."""
        return self._set(numUserBlocks=value, numItemBlocks=value)

    def setImplicitPrefs(self, value: bool) -> ALS:
        """Set whether ratings are implicit preferences."""
        return self._set(implicitPrefs=value)

    def setAlpha(self, value: float) -> ALS:
        """Set the factor of implicit confidence."""
        return self._set(alpha=value)

    def setRatingCol(self, value: str) -> ALS:
        """Set the column of ratings; empty: every rating is 1."""
        return self._set(ratingCol=value)

    def setNonnegative(self, value: bool) -> ALS:
        """Set whether factors are held at or above 0."""
        return self._set(nonnegative=value)

    def setCheckpointInterval(self, value: int) -> ALS:
        """Accepted for compatibility; has no effect."""
        return self._set(checkpointInterval=value)

    def setIntermediateStorageLevel(self, value: str) -> ALS:
        """Set the StorageLevel of the ratings while fitting."""
        return self._set(intermediateStorageLevel=value)

    def setFinalStorageLevel(self, value: str) -> ALS:
        """Set the StorageLevel of the model's factors."""
        return self._set(finalStorageLevel=value)

    def setSeed(self, value: int) -> ALS:
        """Set the seed of the starting factors."""
        return self._set(seed=value)

    def setTol(self, value: float) -> ALS:
        """Set the residual at which fitting stops."""
        return self._set(tol=value)

    def write(self) -> MLWriter:
        """A writer of this estimator's parameters."""
        return _Writer(self)

    def _settings(self) -> AlsSettings:
        values = {field: self.getOrDefault(name) for name, field in _SETTINGS.items()}
        try:
            return AlsSettings(**values)
        except ValidationError as error:
            first = error.errors()[0]
            field = str(first["loc"][0])
            name = next(name for name, known in _SETTINGS.items() if known == field)
            raise SettingsError(
                f"ALS: {name} = {first['input']!r} is not usable: {first['msg']}"
            ) from error

    def _fit(self, dataset: DataFrame) -> ALSModel:
        settings = self._settings()
        during = _storage_level("intermediateStorageLevel", self.getIntermediateStorageLevel())
        after = _storage_level("finalStorageLevel", self.getFinalStorageLevel())
        if during == StorageLevel.NONE:
            raise SettingsError("ALS: intermediateStorageLevel cannot be NONE")
        _cold_start(self.getColdStartStrategy())
        ratings = self._ratings(dataset).persist(during)
        try:
            _require_usable(ratings)
            result = fit_factors(ratings, settings, ExecutionSettings())
            factors = {}
            for side, frame in (("user", result.user_factors), ("item", result.item_factors)):
                factors[side] = frame.select("id", F.col("factors").alias("features"))
                if after != StorageLevel.NONE:
                    factors[side] = factors[side].persist(after)
                    factors[side].count()
            result.release()
        finally:
            ratings.unpersist()
        model = ALSModel(settings.rank, factors["user"], factors["item"], result.summary)
        model._resetUid(self.uid)
        return self._copyValues(model)

    def _ratings(self, dataset: DataFrame) -> DataFrame:
        """The dataset's ratings as user_id, item_id, rating float."""
        rating_col = self.getRatingCol()
        named = [self.getUserCol(), self.getItemCol(), *([rating_col] if rating_col else [])]
        for name in named:
            if name not in dataset.columns:
                raise InputError(
                    f"ALS: column {name} is missing; there are {', '.join(dataset.columns)}"
                )
        rating = F.col(quoted(rating_col)) if rating_col else F.lit(1.0)
        return dataset.select(
            F.col(quoted(self.getUserCol())).alias("user_id"),
            F.col(quoted(self.getItemCol())).alias("item_id"),
            rating.cast("float").alias("rating"),
        )


class ALSModel(Model, _ModelParams, MLWritable, MLReadable["ALSModel"]):
    """A model that `ALS` fitted.

    Attributes
    ----------
    rank
        Number of latent factors.
    userFactors, itemFactors : DataFrame
        id, features array<float>.
    summary : TrainingSummary
        Sweeps, objective, largest residual, times; None if the factors' origin is unknown.
    """

    def __init__(
        self,
        rank: int,
        userFactors: DataFrame,
        itemFactors: DataFrame,
        summary: TrainingSummary | None = None,
    ) -> None:
        super().__init__()
        self.rank = rank
        self.userFactors = userFactors
        self.itemFactors = itemFactors
        self.summary = summary

    def recommendForAllUsers(
        self, numItems: int, *, excludeSeen: DataFrame | None = None
    ) -> DataFrame:
        """The best `numItems` items of every user.

        Parameters
        ----------
        excludeSeen
            Rows with userCol and itemCol: pairs that must not be recommended.

        Returns
        -------
        DataFrame
            userCol, recommendations array<struct<itemCol, rating float>>, best first.
        """
        return self._recommend(self.userFactors, "user", numItems, excludeSeen)

    def recommendForAllItems(
        self, numUsers: int, *, excludeSeen: DataFrame | None = None
    ) -> DataFrame:
        """The best `numUsers` users of every item; see `recommendForAllUsers`."""
        return self._recommend(self.itemFactors, "item", numUsers, excludeSeen)

    def recommendForUserSubset(
        self, dataset: DataFrame, numItems: int, *, excludeSeen: DataFrame | None = None
    ) -> DataFrame:
        """The best items of the users in userCol of `dataset`; unknown users get no row."""
        asked = self._subset(dataset, self.getUserCol(), self.userFactors)
        return self._recommend(asked, "user", numItems, excludeSeen)

    def recommendForItemSubset(
        self, dataset: DataFrame, numUsers: int, *, excludeSeen: DataFrame | None = None
    ) -> DataFrame:
        """The best users of the items in itemCol of `dataset`; unknown items get no row."""
        asked = self._subset(dataset, self.getItemCol(), self.itemFactors)
        return self._recommend(asked, "item", numUsers, excludeSeen)

    def write(self) -> MLWriter:
        """A writer of the parameters and factors."""
        return _Writer(self)

    @classmethod
    def read(cls) -> MLReader[ALSModel]:
        """A reader of models that `write` stored."""
        return _ModelReader()

    def _transform(self, dataset: DataFrame) -> DataFrame:
        return predict_pairs(
            dataset,
            _scorable(self.userFactors),
            _scorable(self.itemFactors),
            user_col=self.getUserCol(),
            item_col=self.getItemCol(),
            prediction_col=self.getPredictionCol(),
            cold_start=_cold_start(self.getColdStartStrategy()),
        )

    def _subset(self, dataset: DataFrame, column: str, factors: DataFrame) -> DataFrame:
        require_ids(dataset, column, factors)
        asked = dataset.select(F.col(quoted(column)).alias("id")).distinct()
        return factors.join(asked, "id", "left_semi")

    def _recommend(self, asked: DataFrame, side: str, n: int, seen: DataFrame | None) -> DataFrame:
        columns = {"user": self.getUserCol(), "item": self.getItemCol()}
        factors = {"user": self.userFactors, "item": self.itemFactors}
        other = "item" if side == "user" else "user"
        exclude = None
        if seen is not None:
            for kind, column in columns.items():
                require_ids(seen, column, factors[kind])
            exclude = seen.select(
                F.col(quoted(columns[side])).alias("query_id"),
                F.col(quoted(columns[other])).alias("candidate_id"),
            )
        found = top_n(
            _scorable(asked),
            _scorable(factors[other]),
            n,
            exclude,
            query_rows=self.getBlockSize(),
        )
        one = StructType(
            [
                StructField(columns[other], factors[other].schema["id"].dataType),
                StructField("rating", FloatType()),
            ]
        )
        return found.select(
            F.col("id").alias(columns[side]),
            F.col("recommendations").cast(ArrayType(one)).alias("recommendations"),
        )


def _scorable(factors: DataFrame) -> DataFrame:
    return factors.select("id", F.col("features").alias("factors"))


def _storage_level(name: str, value: str) -> StorageLevel:
    level = getattr(StorageLevel, value, None)
    if not isinstance(level, StorageLevel):
        raise SettingsError(f"ALS: {name} = {value!r} is unknown; use for example DISK_ONLY")
    return level


def _cold_start(value: str) -> str:
    if value.lower() not in ("nan", "drop"):
        raise SettingsError(f"ALS: coldStartStrategy = {value!r} is unknown; use 'nan' or 'drop'")
    return value.lower()


def _require_usable(ratings: DataFrame) -> None:
    """Raise InputError for null ids, null ratings and ratings that are not finite."""
    rating = F.col("rating")
    bad = {
        "a null user id": F.col("user_id").isNull(),
        "a null item id": F.col("item_id").isNull(),
        "a null rating": rating.isNull(),
        "a rating that is not finite": F.isnan(rating) | (F.abs(rating) == float("inf")),
    }
    row = ratings.agg(*[F.count_if(condition) for condition in bad.values()]).first()
    assert row is not None
    for what, count in zip(bad, row, strict=True):
        if count:
            rows = "1 row has" if count == 1 else f"{count} rows have"
            raise InputError(f"ALS: {rows} {what}; drop or correct these rows")
