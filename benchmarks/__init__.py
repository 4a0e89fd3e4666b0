"""Measurements against plain ways, behind the figures of RESULTS.md; run from the repository, not installed."""
