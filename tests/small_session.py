"""Settings of a Spark session for the few rows of a test."""

CONF = {
    "spark.sql.shuffle.partitions": "2",
    # For so few rows Spark takes longer to compile expressions than to interpret them.
    "spark.sql.codegen.wholeStage": "false",
    "spark.sql.codegen.factoryMode": "NO_CODEGEN",
}
"""What to give as `spark.conf`."""
