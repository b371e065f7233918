"""Settings of a Spark session for some kinds of queries."""

from __future__ import annotations

NARROW_ROWS = {"spark.sql.execution.arrow.maxBytesPerBatch": str(2**31 - 1)}
"""Hand rows to Python in batches that the number of rows alone limits. Spark 4.1 also limits their
bytes, and to do so adds up the sizes of all vectors after every row: with rows of three numbers
that takes longer than all the rest."""

LARGE_ROWS = {"spark.sql.inMemoryColumnarStorage.batchSize": "1"}
"""Cache every row by itself. Else their bytes are gathered in buffers of up to 4 MB that grow step
by step, and objects of that size make the JVM's heap grow (see `solver.MESSAGE_BYTES`)."""

SMALL_QUERIES = {
    # Interpret expressions outside of whole-stage code. Delta keeps the state of a table in rows of
    # so many fields that Spark compiles none of their stages whole; each of their tasks then writes
    # the code of its projections anew, and to split it measures it line by line with regular
    # expressions. That was two fifths of what the tasks of a night took, and its small tables do
    # not need compiled code.
    "spark.sql.codegen.factoryMode": "NO_CODEGEN",
    # For the commits of a Delta log, read as text, such code is written all the same, and every
    # task has its share of unpacking plans: one task for what fits into one, however many cores.
    "spark.sql.files.minPartitionNum": "1",
    "spark.sql.files.maxPartitionBytes": "32m",
    "spark.sql.shuffle.partitions": "1",
    # Nothing is left to adapt, and to plan anew after every stage takes longer than most stages.
    "spark.sql.adaptive.enabled": "false",
}
"""For many queries over small tables, where planning and starting tasks is what takes time. Where
there may be many rows, the number of partitions must be said."""
