"""Distributed matrix factorisation on Spark and Delta that can forget, with a certificate."""

__version__ = "0.1.0"
