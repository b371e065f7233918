"""One module for each job; its `main` is the command behind `jobs/X.py` and `unlearn-spark X`."""
