"""Scoring, as benchmarks share it: questions, readers of official files, normalised answers, boxes, metrics."""
