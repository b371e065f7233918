"""Temporary Spark settings for particular kinds of queries."""

from __future__ import annotations

NARROW_ROWS = {"spark.sql.execution.arrow.maxBytesPerBatch": str(2**31 - 1)}
"""For tables of a few numbers per row: limit batches for Python by rows only. To limit bytes too,
Spark 4.1 adds up the sizes of all vectors after every row, which takes most of the time."""

LARGE_ROWS = {"spark.sql.inMemoryColumnarStorage.batchSize": "1"}
"""For rows of large binaries: cache every row by itself. Spark would gather several in buffers so
large that the JVM's heap grows (see `core.solver.MESSAGE_BYTES`)."""

SMALL_QUERIES = {
    # Interpret expressions outside of whole-stage code. The rows in which Delta keeps a table's
    # state have too many fields for whole-stage code, so every task would generate the code of its
    # projections anew. That is slow, and small tables do not need compiled code.
    "spark.sql.codegen.factoryMode": "NO_CODEGEN",
    # A Delta log read as text still needs generated code, and every task unpacks its plan: use one
    # task for what fits into one.
    "spark.sql.files.minPartitionNum": "1",
    "spark.sql.files.maxPartitionBytes": "32m",
    "spark.sql.shuffle.partitions": "1",
    # One partition leaves nothing to adapt, and replanning takes longer than most stages.
    "spark.sql.adaptive.enabled": "false",
}
"""For many queries over small tables, where planning and starting tasks takes the time. A query
that may have many rows must name its number of partitions."""
