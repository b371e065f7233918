"""The jobs, a module each: `main` is the command of `jobs/X.py` and of `unlearn-spark X`."""
