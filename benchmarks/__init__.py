"""The benchmarks behind the figures of RESULTS.md; they run from the repository and are not installed."""
