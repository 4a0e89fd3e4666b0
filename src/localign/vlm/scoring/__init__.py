"""What benchmarks share: questions, readers of official files, normalised answers, boxes, metrics."""
