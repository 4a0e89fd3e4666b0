"""Intervals, paired differences and tests. The package computes each of them here and nowhere else."""
