"""The keys that the JSON of every job has at least, beside `engine`."""

NAMES = {
    "ingest_ratings": "ratings_read ratings_written superseded quarantined ratings_version",
    "train": "model_version users items ratings sweeps converged objective max_residual seconds "
    "sweep_seconds encode_seconds",
    "ingest_tombstones": "read accepted duplicates quarantined tombstones_version",
    "unlearn": "model_version parent requests ratings_removed ratings_added rows_resolved "
    "blocks_written blocks_total rounds sweeps work_sweeps max_residual seconds",
    "audit": "model_version max_residual ledger_holds tombstoned_ratings_found tau holds",
    "evaluate": "model_version rmse mae ndcg_at_10 precision_at_10 recall_at_10 map_at_10 users "
    "ratings ratings_known",
    "recommend": "users rows model_version output",
    "rollback": "model_version parent rolled_back_to",
}

KEYS = {job: {*text.split(), "engine"} for job, text in NAMES.items()}
KEYS["update"] = KEYS["unlearn"]
KEYS["import_model"] = {*KEYS["train"], "rows_over_tau"}
